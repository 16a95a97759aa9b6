"""An export that is killed leaves nothing under its name, and an earlier one as it was."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import nmgraph

STAGES = ("finalizing", "checking weights", "writing ONNX", "proving", "comparing", "writing safetensors")
SCRIPT = """
import sys, time, torch, nmgraph
def progress(stage):
    if stage.startswith(sys.argv[2]):
        print("there", flush=True)
        time.sleep(float(sys.argv[3]))
        if float(sys.argv[3]) > 1:
            raise SystemExit("was not killed")
model = nmgraph.convert(torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 512)), method="srste")
nmgraph.export(model, sys.argv[1], example_inputs=torch.zeros(1, 512), safetensors=True, overwrite=True, progress=progress)
print("done", flush=True)
"""


def kill_at(directory, stage, later=0.0):
    """Start an export in a process of its own, and kill it in a stage, or some seconds later."""
    wait = "60" if not later else "0"
    environment = {**os.environ, "PYTHONPATH": str(Path(nmgraph.__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(directory), stage, wait],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout.readline() == "there\n"
    if later:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(later)
    process.send_signal(signal.SIGKILL)
    return process.wait()


def test_killed_export_leaves_no_directory_and_the_next_one_works(tmp_path):
    assert kill_at(tmp_path / "out", "comparing") == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    model = nmgraph.convert(nn.Sequential(nn.Linear(16, 8)), method="srste")
    assert nmgraph.export(model, tmp_path / "out", example_inputs=torch.zeros(1, 16)).holds


@pytest.mark.slow
@pytest.mark.parametrize("later", [0.0, 0.003, 0.01, 0.03, 0.1])
@pytest.mark.parametrize("stage", STAGES)
def test_export_killed_at_any_moment_leaves_the_earlier_one_whole(stage, later, tmp_path):
    model = nmgraph.convert(nn.Sequential(nn.Linear(16, 8)), method="srste")
    nmgraph.export(model, tmp_path / "out", example_inputs=torch.zeros(1, 16))
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    kill_at(tmp_path / "out", stage, later)
    if (tmp_path / "out").exists():  # whole: the old one, or if the kill came too late, the new one
        assert nmgraph.verify(tmp_path / "out" / "model.onnx").holds
        after = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
        assert after == before or set(after) == {*before, "model.safetensors"}
    else:  # between taking the old one away and putting the new one there, both are beside it
        assert any(f.name != "out" for f in tmp_path.iterdir())
