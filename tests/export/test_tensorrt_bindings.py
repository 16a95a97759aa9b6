"""The same against the bindings themselves, where their wheels are: ``make bindings`` fetches them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bindings_wheels import FOLDER, HASHES, RECORD, look, unpack, wheels

import nmgraph
from nmgraph.export.trt_build import REQUIRED_API

WHEELS = wheels()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WHEELS, reason=f"no wheels of TensorRT's bindings in {FOLDER}: run `make bindings`"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the stand-in libraries"),
]

USE = """
import sys
import tensorrt_bindings as trt
from nmgraph.errors import ExportError
from nmgraph.export import trt_build

logger = trt_build.logger_of(trt)
assert isinstance(logger, trt.ILogger) and trt_build.logger_of(trt) is logger
for severity in (trt.ILogger.Severity.VERBOSE, trt.ILogger.Severity.ERROR):
    logger.log(severity, "said")
logger.log(trt.ILogger.Severity.VERBOSE, "(Sparsity) said")
assert logger.lines == ["[ERROR] said", "[VERBOSE] (Sparsity) said"], logger.lines

told = []
monitor = trt_build._monitor_of(trt)(told.append)
assert isinstance(monitor, trt.IProgressMonitor)
monitor.phase_start("Build", None, 2)
assert monitor.step_complete("Build", 0) is True
monitor.phase_finish("Build")
assert told == ["Build 50 %"], told

assert int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) in (0, 1)  # 1 in TensorRT 10, where 0 is another flag
assert trt.DataType.HALF.name == "HALF"
assert tuple(trt.Dims((1, 2))) == (1, 2)
try:
    trt_build.build_engine(trt, None, {}, sparse=True, progress=print)
except ExportError as error:
    print(error)
"""


@pytest.fixture(scope="module", params=[pytest.param(v, id=v) for v in WHEELS] or ["none"])
def bindings(request, tmp_path_factory):
    return request.param, unpack(request.param, WHEELS[request.param], tmp_path_factory.mktemp("bindings"))


def test_wheels_of_all_releases_are_there():
    assert sorted(WHEELS) == sorted(HASHES)


def test_names_and_signatures_are_as_recorded(bindings):
    version, environment = bindings
    assert look(environment, REQUIRED_API) == json.loads(RECORD.read_text())[version]


def test_what_nmgraph_derives_from_real_classes_works_and_a_builder_without_library_is_refused(bindings):
    version, environment = bindings
    path = f"{environment['PYTHONPATH']}:{Path(nmgraph.__file__).parents[1]}"
    run = subprocess.run(
        [sys.executable, "-c", USE],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stderr == ""
    # The logger has lines of its own from above; none of them is the library's.
    assert run.stdout.startswith("TensorRT can't start: ")
    assert "factory function returned nullptr" in run.stdout
    assert run.stdout.endswith("Check the GPU with nvidia-smi.\n")
    assert version.split(".")[0] in ("10", "11")


def test_precision_flags_are_gone_in_11(bindings):
    version, environment = bindings
    found = look(environment, ["BuilderFlag.FP16", "BuilderFlag.INT8", "BuilderFlag.SPARSE_WEIGHTS"])
    weak = version.startswith("10.")
    assert [found[name] is not None for name in found] == [weak, weak, True]
