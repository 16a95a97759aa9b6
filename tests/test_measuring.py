"""`inspect --sensitivity`: data from files, suggestions for budgets, and recipes that convert to exactly these."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from commands import answer, call
from models import mlp
from transformers import BertConfig, BertForSequenceClassification

import nmgraph


def complaint(*arguments):
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert "Traceback" not in result.stderr
    return result.stderr.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def dense(tmp_path):
    torch.save(mlp(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.fixture
def bert(tmp_path):
    config = BertConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def patterns_of(found):
    return {e["name"]: e["pattern"] for e in found["entries"] if e["converted"]}


def pruned(suggestion):
    return {name: pattern for name, pattern in suggestion["patterns"].items() if pattern != "dense"}


@pytest.mark.parametrize(
    ("model", "budget", "inputs"),
    [
        ("torchvision:resnet18", "flops=0.4", ["--input", "2x3x32x32"]),
        ("torchvision:resnet18", "size=0.4", ["--input", "2x3x32x32"]),
        ("timm:vit_tiny_patch16_224,img_size=32,depth=2", "flops=0.4", []),
        ("bert", "flops=0.4", []),
    ],
)
def test_a_recipe_converts_to_exactly_the_patterns_that_were_suggested(
    model, budget, inputs, bert, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = bert if model == "bert" else model
    found = answer("inspect", model, *inputs, "--sensitivity", "--budget", budget, "--recipe", "out.json")
    suggested = found["suggestion"]
    assert suggested["reached"] <= 0.4 + 1e-9
    assert suggested["bound"] == suggested["harm"]
    assert len(set(suggested["patterns"].values())) > 1
    converted = answer("convert", model, *inputs, "--recipe", "out.json", "-o", "out.nm.pt")
    assert patterns_of(converted) == pruned(suggested)
    again = nmgraph.load("out.nm.pt")
    assert {e.name: e.pattern for e in nmgraph.manifest(again).converted} == pruned(suggested)


def test_without_data_the_table_says_that_it_tells_little(dense):
    result = call("inspect", dense, "--sensitivity", "--budget", "flops=0.5")
    assert result.exit_code == 0
    shown = " ".join(result.stdout.split())
    assert "lbc: 2 sites converted" in shown
    assert "Data: guessed from the first layer. These are no data of the model's own, and tell little" in shown
    assert "suggested for flops=0.5: " in shown


def write(path, tensors):
    if path.suffix == ".npz":
        np.savez(path, **{name: t.numpy() for name, t in tensors.items()})
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz"])
def test_data_of_every_form_is_measured_alike(dense, tmp_path, suffix):
    images, labels = torch.randn(12, 16, dtype=torch.float64), torch.randint(0, 8, (12,), dtype=torch.int32)
    data = write(tmp_path / f"data{suffix}", {"input": images, "labels": labels})
    found = answer("inspect", dense, "--sensitivity", "--data", data)["sensitivity"]
    model = torch.load(dense, weights_only=False)
    expected = nmgraph.sensitivity(model, images.float(), labels=labels.long())
    assert (found["criterion"], found["data"]) == ("cross entropy", "given")
    assert [site["changes"] for site in found["sites"]] == [site.changes for site in expected.sites]
    assert "Harm before training says little of harm after it." in " ".join(
        call("inspect", dense, "--sensitivity", "--data", data).stdout.split()
    )


def test_labels_go_to_a_hugging_face_model_which_knows_its_loss(bert, tmp_path):
    tensors = {"input_ids": torch.randint(0, 120, (4, 8)), "attention_mask": torch.ones(4, 8, dtype=torch.int64)}
    data = write(tmp_path / "data.pt", tensors | {"labels": torch.tensor([0, 1, 2, 0])})
    found = answer("inspect", bert, "--sensitivity", "--data", data)["sensitivity"]
    assert found["criterion"] == "the model's own loss"
    model = BertForSequenceClassification.from_pretrained(bert).eval()
    with torch.no_grad():
        assert found["dense"] == pytest.approx(float(model(**tensors, labels=torch.tensor([0, 1, 2, 0])).loss))


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("d.pt", {"inputs": torch.ones(2, 16)}, "the data holds inputs, and Sequential takes input. Name tensors by these; input is the first one, and labels are the labels."),
        ("d.pt", {"labels": torch.ones(2)}, "the data holds no input, and Sequential takes input. Name tensors by these; input is the first one, and labels are the labels."),
        ("d.pt", {"input": torch.ones(2, 5)}, "Sequential does not take the inputs input=2x5 (given): mat1 and mat2 shapes cannot be multiplied (2x5 and 16x16)"),
        ("d.npz", {"input": torch.ones(2, 16), "labels": torch.tensor([1, 8])}, "labels of the shape [2] (torch.int64) do not fit an answer of the shape [2, 8]: Target 8 is out of bounds. Give one whole number below 8 for each prediction, or leave the labels away."),
    ],
)  # fmt: skip
def test_data_that_the_model_does_not_take_is_said(dense, tmp_path, name, tensors, message):
    assert complaint("inspect", dense, "--sensitivity", "--data", write(tmp_path / name, tensors)) == message


def test_what_is_no_data_is_said(dense, tmp_path):
    def told(name):
        return complaint("inspect", dense, "--sensitivity", "--data", tmp_path / name).removeprefix(f"{tmp_path}/")

    assert told("missing.pt") == "missing.pt does not exist."
    assert told(".").endswith("is not a file.")
    torch.save({"input": torch.ones(2), "step": 3}, tmp_path / "mixed.pt")
    expected = (
        'As data it has to hold a tensor, or a dict of tensors by the names of the model\'s arguments, and "labels" if '
        "there are any."
    )
    assert told("mixed.pt") == f"mixed.pt holds a dict with 'step', a int. {expected}"
    assert told("net.pt") == f"net.pt holds a Sequential. {expected}"
    np.savez(tmp_path / "objects.npz", input=np.array([{}, None]))
    assert told("objects.npz").startswith(
        "objects.npz can't be read as arrays of numbers: Object arrays cannot be loaded"
    )
    np.savez(tmp_path / "whole.npz", input=np.ones((64, 16)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:3000])
    assert told("cut.npz").startswith("cut.npz can't be read as arrays of numbers: File is not a zip file")
    (tmp_path / "text.npz").write_text("1, 2, 3")
    assert told("text.npz").startswith("text.npz can't be read as arrays of numbers: ")


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_a_single_tensor_is_the_input(dense, tmp_path, suffix):
    path, x = tmp_path / f"x{suffix}", torch.randn(3, 16)
    if suffix == ".npz":
        with path.open("wb") as opened:
            np.save(opened, x.numpy())
    else:
        torch.save(x, path)
    (site, _) = answer("inspect", dense, "--sensitivity", "--data", path)["sensitivity"]["sites"]
    assert site["macs"] == 3 * 16 * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "d.pt"], "--data does nothing without --sensitivity. Add --sensitivity, or leave --data away."),
        (["--budget", "flops=0.5"], "--budget does nothing without --sensitivity. Add --sensitivity, or leave --budget away."),
        (["--sensitivity", "--recipe", "r.json"], "--recipe does nothing without --budget. Add --budget, or leave --recipe away."),
        (["--overwrite"], "--overwrite does nothing without --recipe. Add --recipe, or leave --overwrite away."),
        (["--sensitivity", "--data", "d.pt", "--input", "1x16"], "--data holds the inputs already. Leave --input away."),
        (["--sensitivity", "--budget", "flops=2"], "a budget of 2.0 is no share of the dense model. Use for example flops=0.5."),
        (["--sensitivity", "--budget", "flops=0.01"], "flops=0.01 can't be kept: with the sparsest of the patterns tried everywhere, 6.2% of the operations with weights are left. Allow at least flops=0.063, or try sparser patterns."),
    ],
)  # fmt: skip
def test_options_that_do_nothing_alone_are_refused(dense, options, message):
    assert complaint("inspect", dense, *options) == message


def test_an_earlier_recipe_is_kept_before_anything_is_measured(dense, tmp_path):
    path = tmp_path / "r.json"
    path.write_text("mine")
    asked = ["inspect", dense, "--sensitivity", "--budget", "flops=0.5", "--recipe", path]
    assert complaint(*asked).startswith(f"{path} exists and is kept. Choose another place with --recipe, or replace it")
    assert path.read_text() == "mine"
    asked_for_folder = [*asked[:-1], tmp_path, "--overwrite"]
    assert complaint(*asked_for_folder) == f"{tmp_path} is a directory. Give the name of a file in it."
    answer(*asked, "--overwrite")
    assert json.loads(path.read_text())["nmgraph_recipe"] == 1


def test_what_is_typed_beside_a_recipe_counts_more(dense, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(
        '{"nmgraph_recipe": 1, "method": "gradual", "options": {"interval": 7}, "pattern": "1:4", "layers": {"*": "1:8"}}'
    )
    out = ["-o", tmp_path / "out.nm.pt", "--overwrite"]
    found = answer("convert", dense, "--recipe", path, *out)
    assert (found["method"], found["options"]["interval"]) == ("gradual", 7)
    assert patterns_of(found) == {"0": "1:8", "2": "1:8"}
    found = answer("convert", dense, "--recipe", path, "--layer", "2=2:4", "--set", "interval=9", *out)
    assert found["options"]["interval"] == 9
    assert patterns_of(found) == {"0": "1:8", "2": "2:4"}
    found = answer("convert", dense, "--recipe", path, "--method", "srste", "--skip", "0", *out)
    assert found["method"] == "srste"
    assert patterns_of(found) == {"2": "1:8"}


def test_a_preset_of_a_recipe_is_explained(dense, tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"nmgraph_recipe": 1, "preset": "paper", "keep_dense": []}')
    result = call("convert", dense, "--recipe", path)
    assert result.exit_code == 0, result.output
    assert "Preset paper: " in result.stdout
    assert "Set otherwise here: layers kept dense: none." in result.stdout


def test_a_recipe_for_a_graph_module_is_for_python_alone(dense, tmp_path):
    (tmp_path / "r.json").write_text('{"nmgraph_recipe": 1, "mode": "graph"}')
    assert complaint("convert", dense, "--recipe", tmp_path / "r.json").endswith('or convert with mode="auto".')
