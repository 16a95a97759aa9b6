"""A save or an export that is killed leaves nothing under its name, and an earlier one as it was."""

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

sys.path.append(str(Path(__file__).parent.parent.parent / "benchmarks"))
import faults_files

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
    # Whole: the old one, or if the kill came too late, the new one.
    assert nmgraph.verify(tmp_path / "out" / "model.onnx").holds
    after = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    assert after == before or set(after) == {*before, "model.safetensors"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="two directories change places on Linux alone")
@pytest.mark.parametrize(("way", "count"), [("save", 8), ("export_weights", 4)])
def test_kill_at_a_random_moment_leaves_the_last_one_or_the_new_one(way, count):
    found = faults_files.kills(way, count)
    assert found["wrong"] == []
    assert sum(found["found"].values()) == count


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="two directories change places on Linux alone")
def test_kill_in_the_middle_of_replacing_a_directory_leaves_a_whole_one():
    assert faults_files.directory_kills(60)["wrong"] == []
