"""Imports point one way through the floors of the package."""

import ast
from pathlib import Path

import pytest

import nmgraph

ROOT = Path(nmgraph.__file__).parent
MAY_IMPORT = {
    "compilation": set(),
    "errors": set(),
    "files": set(),
    "nm": set(),
    "methods": {"nm"},
    "layers": {"nm", "methods"},
    "passes": {"nm", "methods", "layers"},
    "accounting": {"nm", "methods", "layers", "passes", "training"},
    "training": {"nm", "methods", "layers"},
    "checkpoint": {"nm", "methods", "layers", "passes", "training"},
    "export": {"nm", "methods", "layers", "passes", "training"},
    "report": {"nm", "methods", "layers", "passes", "training", "accounting", "checkpoint", "export"},
    "api": {"nm", "methods", "layers", "passes", "training", "checkpoint", "export"},
    "seeing": {"api", "nm", "methods", "layers", "passes", "accounting", "training", "export", "report"},
    "integrations": {"api", "seeing", "layers", "passes", "training"},
    "__init__": {"api", "seeing", "methods", "nm"},
    "console": set(),
    "manual": set(),
    "suggestions": {"methods", "checkpoint"},
    "options": {"suggestions"},
    "measuring": {"seeing", "accounting", "checkpoint", "export", "methods", "passes"},
    "cli": {
        "console",
        "manual",
        "measuring",
        "options",
        "seeing",
        "suggestions",
        "nm",
        "methods",
        "layers",
        "passes",
        "training",
        "accounting",
        "checkpoint",
        "export",
        "report",
    },
    "__main__": {"cli"},
}
EVERYWHERE = {"compilation", "errors", "files"}
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def imports(file):
    """Name every module, or name in a module, that a file imports anywhere, also within functions."""
    tree = ast.parse((ROOT / file).read_text())
    package = ["nmgraph", *Path(file).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            yield from (f"{base}{node.module or ''}.{alias.name}".replace("..", ".") for alias in node.names)


def room(file):
    first = Path(file).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_the_floors_below(file):
    own = room(file)
    used = {name.split(".")[1] for name in imports(file) if name.startswith("nmgraph.")}
    assert used <= MAY_IMPORT[own] | EVERYWHERE | {own}, f"{file} imports {sorted(used)}"


def test_every_room_has_its_floor():
    assert {room(file) for file in FILES} == set(MAY_IMPORT)


def test_training_never_imports_passes():
    assert not [n for f in FILES if room(f) == "training" for n in imports(f) if n.startswith("nmgraph.passes")]


@pytest.mark.parametrize("file", [f for f in FILES if room(f) in ("nm", "methods")])
def test_the_lower_floors_know_tensors_only(file):
    forbidden = ("torch.nn", "torch.fx", "torch.optim", "logging", "pathlib", "os", "nmgraph.files")
    assert not [
        name for name in imports(file) if name in forbidden or name.startswith(tuple(f"{f}." for f in forbidden))
    ]


@pytest.mark.parametrize("file", FILES)
def test_no_file_has_a_name_that_says_nothing(file):
    assert Path(file).stem not in {"utils", "util", "helpers", "common", "misc"}
