"""TensorRT's real Python bindings without its libraries: enough to see every name and signature, not to build anything.

    python tests/export/bindings_wheels.py fetch     # the pinned wheels, by hash, into .tensorrt-bindings/
    python tests/export/bindings_wheels.py record    # tests/export/data/tensorrt_api.json from them

The extension module of a bindings wheel needs three libraries, of which it calls nine entry points. Stand-ins with these
names, compiled here, let it be imported. Constructors that need the library then fail, which is why engines are built
against ``fake_tensorrt.py`` in tests, and that fake is held to what is recorded here.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("NMGRAPH_TENSORRT_BINDINGS", ROOT / ".tensorrt-bindings"))
RECORD = Path(__file__).parent / "data" / "tensorrt_api.json"
PACKAGE = "tensorrt_cu13_bindings"
HASHES = {
    "10.13.2.6": (
        "53954b35c5a2280a428b708485bb03cbe6f72ff4e6006bbb8bc97d6576f51206",
        "84478a7d45e184e397ead086463bcb7a49744948a8c5f00a7ecfaabb9ec0c17b",
        "0e81c17a28572b58fe136377a8e8ef55821890beccb361601b7ee274b89664a8",
    ),
    "10.16.1.11": (
        "f986d47980d042cc126506a9b84586e55ad13737a7a46826fe45457c04d66294",
        "2fb87ac24a5e5f42e43f283c16d1b661dc72ef18568fd847ce2080b7db9ca232",
        "da17c222ba99f46e77e1dab568cd17c4652b0432d4fae074e4c79285356aa0ac",
    ),
    "11.0.0.114": (
        "af42b7a12813d4615e1a3c7defea86d5223b902f6f209abe540d822d94eb2da7",
        "9ad9c94e15899660e4d755339733655c7e61bc3ee1fb68f9c44d21217e2dacd9",
        "9e69f5d6377612f182b0d73042df9d46bdc3eb47285f709e9ca4bd16eddcb36f",
    ),
    "11.4.0.106": (
        "d072ac2a095e2be749fefc847adfb25d5ebe70303401df62ede8fe67a59f27fc",
        "5fc7a6c412881f7212030893bd5531b1a0ff415c72c7678dfe4ead7a7765b38d",
        "bac9a362c9189b5f5dd0444213913846e4b46003237834958e890eff57d86ed5",
    ),
}  # of the wheels for Linux on x86-64, CPython 3.11 to 3.13
ENTRY_POINTS = {
    "nvinfer": (
        "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry", "getPluginRegistry",
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
    "nvonnxparser": (
        "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion",
    ),
}  # fmt: skip

LOOK = """
import json, sys
import tensorrt_bindings as trt

def describe(path):
    found = trt
    for name in path.split("."):
        if not hasattr(found, name):
            return None
        found = getattr(found, name)
    doc = type(found).__doc__ if isinstance(found, property) else getattr(found, "__doc__", None)
    return {"kind": type(found).__name__, "doc": doc or ""}

print(json.dumps({path: describe(path) for path in sys.argv[1:]}))
"""


def wheels():
    """Give the wheels that are there for this Python, by version."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = {version: next(FOLDER.glob(f"{PACKAGE}-{version}-{tag}-*.whl"), None) for version in HASHES}
    return {version: wheel for version, wheel in found.items() if wheel is not None}


def fetch():
    """Download the wheels for this Python, refusing any other content than is pinned."""
    FOLDER.mkdir(exist_ok=True)
    for version, hashes in HASHES.items():
        requirement = FOLDER / f"{version}.txt"
        requirement.write_text(f"{PACKAGE}=={version} " + " ".join(f"--hash=sha256:{h}" for h in hashes) + "\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--require-hashes", "-r", str(requirement), "-d", str(FOLDER)], check=True)
        requirement.unlink()


def stand_ins(folder, line):
    """Compile libraries with the names that a line of bindings links to, whose functions give NULL."""
    folder.mkdir(parents=True, exist_ok=True)
    for library, functions in ENTRY_POINTS.items():
        source, name = folder / f"{library}.c", f"lib{library}.so.{line}"
        source.write_text("".join(f"void *{function}(void) {{ return 0; }}\n" for function in functions))
        command = [shutil.which("cc") or "gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source]
        subprocess.run(command, check=True)
    return folder


def unpack(version, wheel, folder):
    """Give the environment in which ``import tensorrt_bindings`` gives this version."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / version)
    libraries = stand_ins(folder / f"libraries-{version}", version.partition(".")[0])
    return {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(folder / version)}


def look(environment, paths):
    """Describe names of the real module: kind, and its signatures."""
    run = subprocess.run(
        [sys.executable, "-c", LOOK, *paths], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return {path: found and summary(path, found) for path, found in json.loads(run.stdout).items()}


def summary(path, found):
    """Reduce a docstring to what a caller depends on: for each overload the parameters, and which may be left away."""
    name = re.escape(path.rpartition(".")[2])
    lines = re.findall(rf"^(?:\d+\. )?{name}\((.*)\) ->", found["doc"], re.MULTILINE)
    kind = "method" if lines else "property" if found["kind"] == "property" else "value"
    return {"kind": kind, "signatures": [parameters(line) for line in lines if not line.startswith("*")]}


def parameters(text):
    """Read ``self: X, flags: int = 0`` as ``["flags="]``: names without self, with = where there is a default."""
    parts = re.split(r", (?=\w+: )", text)
    named = [re.match(r"(\w+): ", part) for part in parts]
    return [m[1] + ("=" if " = " in p else "") for m, p in zip(named, parts, strict=True) if m and m[1] != "self"]


def record(folder):
    from nmgraph.export.trt_build import REQUIRED_API

    found = {version: look(unpack(version, wheel, folder), REQUIRED_API) for version, wheel in wheels().items()}
    assert set(found) == set(HASHES), f"only {sorted(found)} are in {FOLDER}; fetch first"
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["fetch"]:
        fetch()
    elif sys.argv[1:] == ["record"]:
        with tempfile.TemporaryDirectory() as unpacked:
            record(Path(unpacked))
    else:
        sys.exit(__doc__)
