"""What people may give as MODEL, through the command line."""

import os
from pathlib import PureWindowsPath

import pytest
import timm
import torch
from commands import answer, call
from models import mlp
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import nmgraph
from nmgraph.checkpoint.dense_file import make_model
from nmgraph.checkpoint.named_models import NamedModel
from nmgraph.console import typed
from nmgraph.errors import FileError
from nmgraph.export.inputs import parse_inputs

WINDOWS = PureWindowsPath("C:/models/net.pt")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bert(here):
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=120
    )
    BertForSequenceClassification(config).save_pretrained("bert.v2", max_shard_size="20KB")
    return here / "bert.v2"


def test_named_model_is_inspected_and_converted_without_a_file(here):
    found = answer("inspect", "torchvision:squeezenet1_1")
    assert found["notes"] == ["torchvision:squeezenet1_1 was made with random weights; no file was read."]
    result = call("convert", "timm:resnet10t,num_classes=10", "--method", "srste")
    assert result.exit_code == 0
    assert result.stdout.endswith(
        "timm:resnet10t,num_classes=10 was made with random weights; no file was read.\n"
        "Wrote resnet10t.nm.pt. Train it, then: nmgraph export resnet10t.nm.pt\n"
    )
    assert [p.name for p in here.iterdir()] == ["resnet10t.nm.pt"]
    assert answer("status", "resnet10t.nm.pt")["layers"]
    assert nmgraph.load("resnet10t.nm.pt").num_classes == 10
    assert "exists and is kept" in call("convert", "timm:resnet10t").stderr


def test_state_dict_of_a_named_model_needs_naming_once(here):
    model = timm.create_model("resnet10t", num_classes=7)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, "w.pt")
    result = call("convert", "w.pt", "--model", "timm:resnet10t", "--method", "srste")
    assert result.stdout.endswith(
        "All keys of w.pt begin with 'module.', which was taken off.\n"
        "Wrote w.nm.pt. Train it, then: nmgraph export w.nm.pt\n"
    )
    assert torch.equal(nmgraph.load("w.nm.pt").conv1[0].weight, model.conv1[0].weight)
    assert answer("verify", "w.nm.pt")["holds"]


def test_hugging_face_directory_goes_through_every_command(bert):
    assert answer("inspect", "bert.v2")["notes"] == []
    found = answer("convert", "bert.v2", "--method", "srste")
    assert found["output"] == "bert.v2.nm.pt"
    assert answer("status", "bert.v2.nm.pt")["layers"]
    report = answer("export", "bert.v2.nm.pt", "--hf", "--no-onnx", "-o", "out")
    assert report["hugging_face"]["holds"]
    assert answer("verify", "out/hf")["holds"]
    assert answer("export", "bert.v2.nm.pt", "--hf", "--no-onnx", "-o", "out", "--overwrite")["holds"]
    assert answer("verify", "bert.v2", code=1)["holds"] is False


def test_directory_is_converted_beside_itself_from_within(bert, monkeypatch):
    monkeypatch.chdir(bert)
    assert answer("convert", ".", "--method", "srste")["output"] == str(bert.parent / "bert.v2.nm.pt")


def test_exported_program_is_named_again_with_its_trust(here):
    torch.export.save(torch.export.export(mlp(), (torch.randn(2, 16),)), "net.pt2")
    assert "exported program" in answer("convert", "net.pt2", code=2)["error"]
    result = call("convert", "net.pt2", "--trust", "torch.export", "--method", "srste")
    told = "nmgraph export net.nm.pt --model net.pt2 --trust torch.export"
    assert result.stdout.endswith(f"Wrote net.nm.pt. Train it, then: {told}\n")
    assert call(*told.split()[1:], "--input", "2x16").exit_code == 0
    assert "--model net.pt2 --trust torch.export" in answer("status", "net.nm.pt", code=2)["error"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "timm:resnet5"], "has no model resnet5. Did you mean "),
        (["convert", "timm:hf-hub:x/y"], "is no name of timm's own list"),
        (["convert", "torchvision:resnet18,weights=DEFAULT"], "weights would fetch or read other files"),
        (["convert", "w.pt", "--model", "timm:resnet5"], "has no model resnet5. Did you mean "),
        (["convert", "w.pt", "--model", "nowhere"], "'nowhere' does not name a function."),
        (["convert", "gone.pt2", "--trust", "torch.export"], "gone.pt2 does not exist."),
        (["convert", "w.pt", "--model", "gone.pt2"], "gone.pt2 does not exist."),
        (["verify", "."], "is a directory; give a model's file"),
        (["verify", "timm:resnet18"], "timm:resnet18 does not exist."),
        (["export", "timm:resnet18"], "timm:resnet18 does not exist."),
        (["inspect", "w.pt/x"], "w.pt/x does not exist."),
    ],
)
def test_mistake_is_said_in_one_json_object(arguments, said, here):
    torch.save(nn.Linear(16, 8).state_dict(), "w.pt")
    assert said in answer(*arguments, code=2)["error"]
    assert [p.name for p in here.iterdir()] == ["w.pt"]


def test_named_model_in_a_process_of_its_own(here, run_command):
    result = run_command("convert", "timm:resnet10t", "--method", "srste")
    assert (result.returncode, result.stderr) == (0, "")
    assert "was made with random weights; no file was read." in result.stdout


def test_drive_letter_is_no_library_and_no_module(here):
    """Here, such a path is a file name with a colon and backslashes in it."""
    assert not NamedModel.names(str(WINDOWS))
    assert not NamedModel.names(str(PureWindowsPath("T:/timm/resnet50.pt")))
    torch.save(mlp(), "net.pt")
    os.rename("net.pt", WINDOWS)
    assert answer("convert", WINDOWS, "-o", "D:\\out.nm.pt", "--method", "srste")["output"] == "D:\\out.nm.pt"
    assert answer("verify", "D:\\out.nm.pt")["holds"]
    torch.save(mlp().state_dict(), "w.pt")
    missing = str(WINDOWS.with_suffix(".pt2"))
    assert answer("inspect", "w.pt", "--model", missing, code=2)["error"] == f"{missing} does not exist."


def test_drive_letter_of_a_missing_maker_or_in_an_input_is_explained(here):
    with pytest.raises(FileError, match="does not name a function"):
        make_model(str(WINDOWS))
    with pytest.raises(nmgraph.NMGraphError, match="is no input"):
        parse_inputs([str(WINDOWS)])


def test_call_to_type_next_is_quoted_for_the_shell_of_the_machine(monkeypatch):
    words = ["nmgraph", "export", str(WINDOWS), "my model.nm.pt"]
    assert typed(words) == r"nmgraph export 'C:\models\net.pt' 'my model.nm.pt'"
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        said = typed(words)
    assert said == r'nmgraph export C:\models\net.pt "my model.nm.pt"'
