"""The installed command in processes of its own, as a person runs it."""

import json
from pathlib import Path

import pytest
import torch
import torchvision
from models import Branching

import nmgraph

SITE = Path(__file__).parent / "site"


@pytest.fixture
def here(tmp_path):
    torch.save(torchvision.models.resnet18(), tmp_path / "r18.pt")
    return tmp_path


def test_resnet18_is_converted_exported_and_verified_with_no_other_flag(here, run_command):
    converted = run_command("convert", "r18.pt", "--method", "lbc")
    assert (converted.returncode, converted.stderr) == (0, "")
    assert "lbc: 20 sites converted, 1 skipped, 99.9% of their weights" in " ".join(converted.stdout.split())
    assert converted.stdout.endswith("Wrote r18.nm.pt. Train it, then: nmgraph export r18.nm.pt\n")

    exported = run_command("export", "r18.nm.pt", "--force", "--json")
    assert (exported.returncode, exported.stderr) == (0, "")
    report = json.loads(exported.stdout)
    assert report["holds"] is True
    assert report["inputs"] == "1x3x224x224 (guessed from the first layer)"
    assert report["parity"]["outputs"][0]["relative_error"] < 1e-4
    assert {c["kind"] for c in report["onnx"]["checks"]} == {"Conv", "Gemm"}

    verified = run_command("verify", "r18-export/model.onnx")
    assert (verified.returncode, verified.stderr) == (0, "")
    assert "20 of 20 weights hold; 20 ready for 2:4 sparse tactics" in " ".join(verified.stdout.split())
    assert sorted(p.name for p in here.iterdir()) == ["r18-export", "r18.nm.pt", "r18.pt"]


def test_package_that_cannot_be_imported_is_named_with_the_reason(here, run_command):
    broken = here / "site" / "torchvision"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    result = run_command("convert", "r18.pt", PYTHONPATH=str(broken.parent))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: the model needs the package torchvision, which could not be imported: operator torchvision::nms does "
        "not exist. Install it, in a version that fits your torch.\n"
    )


def test_factory_is_found_in_the_current_directory_and_mistakes_show_no_traceback(tmp_path, run_command):
    (tmp_path / "nets.py").write_text("from torch import nn\n\n\ndef make():\n    return nn.Linear(16, 8)\n")
    torch.save(torch.nn.Linear(16, 8).state_dict(), tmp_path / "weights.pt")
    fine = run_command("inspect", "weights.pt", "--model", "nets:make", "--json")
    assert (fine.returncode, json.loads(fine.stdout)["entries"][0]["converted"]) == (0, True)
    wrong = run_command("inspect", "weights.pt")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == (
        "error: weights.pt holds a state_dict (2 tensors) without its model. Say what makes the model: "
        "--model package.module:function, timm:NAME or torchvision:NAME.\n"
    )


def test_model_that_torch_cannot_export_is_told_in_one_line(tmp_path, run_command):
    nmgraph.save(nmgraph.convert(Branching(), method="srste"), tmp_path / "net.nm.pt")
    paths = f"{SITE}:{SITE.parent}"
    result = run_command("export", "net.nm.pt", "--trust", "models", "--input", "1x16", PYTHONPATH=paths)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: Branching can't be exported to ONNX: ")
    assert len(result.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["net.nm.pt"]
