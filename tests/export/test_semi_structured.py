"""Sparse tensor cores in PyTorch: decided layer by layer, and said why not. The products themselves need a GPU."""

import pytest
import torch
from models import deit, mlp
from rich.console import Console
from torch import nn

import nmgraph
from nmgraph.errors import ConversionError, ExportError


def finalized(make=mlp, method="static"):
    return nmgraph.finalize(nmgraph.convert(make(), method=method))


def test_on_a_cpu_nothing_changes_and_every_layer_says_why():
    model, x = finalized(), torch.randn(2, 16)
    before, answer = dict(model.named_parameters()), model(x)
    found = nmgraph.accelerate(model, example_inputs=x)
    assert str(found) == "0 of 2 linear layers run on sparse tensor cores"
    assert [layer.reason for layer in found.layers] == [
        "its weight is on the cpu; sparse tensor cores are in NVIDIA GPUs from Ampere on"
    ] * 2
    assert all(before[name] is p for name, p in model.named_parameters())
    assert torch.equal(model(x), answer)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_rows_are_those_of_the_largest_call():
    found = nmgraph.accelerate(finalized(deit), example_inputs=torch.randn(3, 3, 32, 32))
    rows = {layer.name: layer.rows for layer in found.layers}
    assert rows["blocks.0.mlp.fc1"] == 3 * 17  # images times tokens
    assert rows["head"] == 3


def test_a_model_in_training_is_refused():
    with pytest.raises(ConversionError, match=r"^0 is still being trained\. Finalize the model first"):
        nmgraph.accelerate(nmgraph.convert(mlp(), method="static"), example_inputs=torch.randn(2, 16))


def test_inputs_the_model_does_not_take_are_refused_and_no_hook_stays():
    model = finalized()
    with pytest.raises(ExportError, match="does not take the inputs"):
        nmgraph.accelerate(model, example_inputs=torch.randn(2, 5))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_table_names_the_decision(capsys):
    Console(width=200).print(nmgraph.accelerate(finalized(), example_inputs=torch.randn(2, 16)))
    assert "dense: its weight is on the cpu" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU with sparse tensor cores")
def test_on_a_gpu_what_is_changed_gives_the_same_answer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 8192), nn.GELU(), nn.Linear(8192, 4096))
    model = nmgraph.finalize(nmgraph.convert(model, method="asp")).cuda().half()
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    expected = model(x)
    found = nmgraph.accelerate(model, example_inputs=x)
    assert all(layer.dense_ms > 0 and layer.sparse_ms > 0 for layer in found.layers)
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
