"""nmgraph uses no name of TensorRT that the real bindings do not have, and calls each with arguments they take.

The real names and parameters were recorded from the bindings of four releases by ``bindings_wheels.py record``.
"""

import ast
import inspect
import json
from pathlib import Path

import fake_tensorrt
import pytest
from bindings_wheels import RECORD

import nmgraph
from nmgraph.export.trt_build import REQUIRED_API
from nmgraph.export.trt_machine import OLDEST

RECORDED = json.loads(RECORD.read_text())
PACKAGE = Path(nmgraph.__file__).parent
TREES = {path.stem: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
HOLDS = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
    "cache": "ITimingCache", "profile": "IOptimizationProfile", "tensor": "ITensor", "error": "ParserError",
    "engine": "ICudaEngine", "runtime": "Runtime", "inspector": "EngineInspector", "context": "IExecutionContext",
    "severity": "ILogger.Severity", "kind": "DataType",
}  # fmt: skip
"""Variables of trt_build.py and trt_run.py that hold objects of TensorRT, and their classes."""


def uses():
    """Yield (path in TensorRT, syntax node) of every use in the package."""
    for stem, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                root, _, rest = ast.unparse(node).partition(".")
                if root == "trt":
                    yield rest, node
                elif root in HOLDS and stem in ("trt_build", "trt_run") and isinstance(node.value, ast.Name):
                    yield f"{HOLDS[root]}.{rest}", node


def overridden():
    """Yield (path, parameters) of the methods that nmgraph writes for TensorRT to call."""
    for node in ast.walk(TREES["trt_build"]):
        if isinstance(node, ast.ClassDef) and node.bases and ast.unparse(node.bases[0]).startswith("trt."):
            base = ast.unparse(node.bases[0]).removeprefix("trt.")
            for method in (m for m in node.body if isinstance(m, ast.FunctionDef)):
                if f"{base}.{method.name}" in REQUIRED_API and method.name != "__init__":
                    yield f"{base}.{method.name}", [a.arg for a in method.args.args[1:]]


def calls():
    """Yield (path, number of positional arguments, names of the others) of every call."""
    called = {id(n.func): n for tree in TREES.values() for n in ast.walk(tree) if isinstance(n, ast.Call)}
    for path, node in uses():
        if id(node) in called:
            call = called[id(node)]
            construct = path if f"{path}.__init__" not in REQUIRED_API else f"{path}.__init__"
            own = construct.endswith(".__init__") and construct == path  # trt.ILogger.__init__(self)
            yield construct, len(call.args) - own, [k.arg for k in call.keywords]


def takes(signature, count, names):
    free = signature[count:]
    needed = [p for p in free if not p.endswith("=")]
    return count <= len(signature) and set(needed) <= set(names) <= {p.rstrip("=") for p in free}


def prefixes(path):
    parts = path.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}


def test_table_names_exactly_what_is_used():
    used = {path for path, _ in uses()}
    classes = {p for path in REQUIRED_API for p in prefixes(path)} - set(REQUIRED_API)
    constructed = {f"{path}.__init__" for path in used if f"{path}.__init__" in REQUIRED_API}
    assert used - classes - set(REQUIRED_API) == set()
    assert set(REQUIRED_API) - used - constructed - {path for path, _ in overridden()} == set()


def test_no_other_file_imports_tensorrt():
    for stem, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not [n for n in names if n.split(".")[0].startswith("tensorrt")], stem
            if isinstance(node, ast.Constant) and node.value == "tensorrt":
                assert stem == "trt_machine"


@pytest.mark.parametrize("version", RECORDED)
def test_real_bindings_have_every_name(version):
    assert sorted(RECORDED[version]) == sorted(REQUIRED_API)
    assert [path for path, found in RECORDED[version].items() if found is None] == []


def test_both_lines_of_releases_are_recorded():
    assert {version.split(".")[0] for version in RECORDED} == {"10", "11"}
    assert min(tuple(map(int, v.split(".")[:2])) for v in RECORDED) == OLDEST


@pytest.mark.parametrize("version", RECORDED)
def test_every_call_fits_a_real_signature(version):
    found = list(calls())
    assert len(found) > 25
    for path, count, names in found:
        real = RECORDED[version][path]
        assert real["kind"] == "method", path
        assert any(takes(signature, count, names) for signature in real["signatures"]), (path, count, names)


@pytest.mark.parametrize("version", RECORDED)
def test_methods_that_tensorrt_calls_have_its_parameters(version):
    found = dict(overridden())
    assert len(found) == 4
    assert {path: [RECORDED[version][path]["signatures"][0]] for path in found} == {
        p: [names] for p, names in found.items()
    }


@pytest.mark.parametrize("version", RECORDED)
def test_what_is_assigned_is_a_property(version):
    assigned = [path for path, node in uses() if isinstance(node.ctx, ast.Store)]
    assert sorted(assigned) == ["IBuilderConfig.profiling_verbosity", "IBuilderConfig.progress_monitor"]
    assert {RECORDED[version][path]["kind"] for path in assigned} == {"property"}


def fake_names():
    for name, value in vars(fake_tensorrt).items():
        if inspect.isclass(value) and value.__module__ == "fake_tensorrt" and not name.startswith("Fake"):
            for method, function in vars(value).items():
                if inspect.isfunction(function) and not method.startswith(("_", "fake_")):
                    yield f"{name}.{method}", function


def test_fake_has_no_method_that_the_real_bindings_lack():
    found = dict(fake_names())
    assert set(found) <= set(REQUIRED_API)
    for path, function in found.items():
        parameters = [p.name for p in list(inspect.signature(function).parameters.values())[1:]]
        for version in RECORDED:
            assert any(takes(real, 0, parameters) for real in RECORDED[version][path]["signatures"]), (path, version)
