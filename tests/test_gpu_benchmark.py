"""The benchmark for GPUs, tried out where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu" / "run.py"
SECTIONS = ("probes", "agreement", "gemms", "steps", "share", "masks", "accuracy")


def run(*args, before=()):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *before, str(SCRIPT), *map(str, args)],
        capture_output=True, text=True, timeout=280, env=environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def run_with(sections, *args):
    """Run it with sections of our own: pieces by name, as source."""
    source = "\n".join([
        f"import os, signal, sys, time; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'benchmarks')!r}]",
        "import bench, run",
        f"sys.argv[1:] = {list(map(str, args))!r}",
        "def broken(): raise ValueError('this is broken')",
        "def lose_gpu(): bench.Bench.synchronize = lambda self: broken()",
        f"made = {{{', '.join(f'{name!r}: lambda bench: {pieces}' for name, pieces in sections.items())}}}",
        "first = run.loaded",
        "run.SECTIONS = dict.fromkeys(made, 1.0)",
        "run.loaded = lambda name: made.get(name) or first(name)",
        "run.main()",
    ])  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=100, env=environment
    )  # fmt: skip


def read(path, ran):
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(path.read_text())


def check_dry_run(path, ran):
    found = read(path, ran)
    assert found["dry_run"] is True
    assert found["figures"] == "made with a stand-in"
    assert tuple(found["sections"]) == SECTIONS
    for name, section in found["sections"].items():
        assert section["errors"] == {}, name
        assert section["left_out"] == [], name
        assert section["results"], name
    return found


def test_a_part_of_every_section_runs_on_the_cpu(tmp_path):
    path = tmp_path / "dry.json"
    found = check_dry_run(path, run("--dry-run", "--quick", "--json", path))
    forced = [r for name, r in found["sections"]["agreement"]["results"].items() if name.startswith("force")]
    assert {r["hardware"] for r in forced} == {"2 of 2 sparse layers train on sparse tensor cores"}
    assert all(r["right"] for name, r in found["sections"]["probes"]["results"].items() if name.startswith("products"))
    assert len(found["goals"]) == 13
    assert not any(goal.startswith(("met", "missed")) for goal in found["goals"])  # a stand-in meets nothing


@pytest.mark.slow
def test_all_of_it_runs_on_the_cpu(tmp_path):
    path = tmp_path / "dry.json"
    found = check_dry_run(path, run("--dry-run", "--json", path))
    assert not [goal for goal in found["goals"] if goal.startswith("not measured")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    ran = run("--json", tmp_path / "gpu.json")
    assert ran.returncode == 2
    assert ran.stderr == (
        f"torch {torch.__version__} sees no NVIDIA GPU here, and every figure is one of a GPU. Run it where nvidia-smi "
        "shows one, or try the script out with --dry-run.\n"
    )


def test_missing_packages_are_named_with_what_fetches_them(tmp_path):
    ran = run("--json", tmp_path / "gpu.json", before=["-S"])  # no site-packages
    assert ran.returncode == 2
    assert "nmgraph needs jinja2, numpy, onnx, onnx-ir, " in ran.stderr
    assert "python -m pip download -d wheels --only-binary=:all:" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_an_unknown_section_is_refused(tmp_path):
    ran = run("--json", tmp_path / "gpu.json", "--only", "gemm", before=["-S"])
    assert ran.returncode == 2
    assert "there is no section 'gemm'. Use probes, agreement, " in ran.stderr


def test_a_piece_that_fails_is_recorded_and_the_others_go_on(tmp_path):
    path = tmp_path / "dry.json"
    sections = {
        "probes": "iter([('fails', broken), ('goes on', lambda: 1)])",
        "agreement": "iter([('loses the GPU', lose_gpu), ('goes on', lambda: 2)])",
        "gemms": "iter([('is killed', lambda: os.kill(os.getpid(), signal.SIGKILL)), ('goes on', lambda: 3)])",
        "steps": "(broken() for _ in range(1))",
        "share": "iter([('hangs', lambda: time.sleep(60)), ('no time', lambda: 4)])",
        "masks": "iter([('too late', lambda: 5)])",
    }
    found = read(path, run_with(sections, "--dry-run", "--budget", "10", "--json", path))["sections"]
    assert {name: section["results"] for name, section in found.items()} == {
        "probes": {"goes on": 1}, "agreement": {"goes on": 2}, "gemms": {"goes on": 3}, "steps": {}, "share": {}, "masks": {},
    }  # fmt: skip
    errors = {name: {piece: e["error"] for piece, e in section["errors"].items()} for name, section in found.items()}
    assert errors == {
        "probes": {"fails": "ValueError: this is broken"},
        "agreement": {"loses the GPU": "ValueError: this is broken"},
        "gemms": {"is killed": "its process died: exit code -9"},
        "steps": {"section": "ValueError: this is broken"},
        "share": {"hangs": "its time was over, and it was ended"},
        "masks": {},
    }
    assert found["masks"]["left_out"] == ["section"]
    assert "broken" in found["probes"]["errors"]["fails"]["traceback"][-1]
