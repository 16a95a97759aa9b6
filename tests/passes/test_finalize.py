"""Folding masks: exact zeros, a copy, and never half-trained masks by accident."""

import pytest
import torch
from handles import nm
from models import cnn, mlp, resnet
from torch import nn

import nmgraph
from nmgraph.errors import ConversionError, UnfinishedError
from nmgraph.layers.masked import masked_weights

METHODS = sorted(nmgraph.METHODS)


def train(model, steps, total_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    nmgraph.attach(model, optimizer, total_steps=total_steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("method", METHODS)
def test_finalized_weights_are_the_masked_ones(method):
    model = train(nmgraph.convert(mlp(), method=method), 8, 8).eval()
    finished, x = nmgraph.finalize(model), torch.randn(4, 16)
    for name, layer in masked_weights(model).items():
        weight = finished.get_submodule(name).weight
        assert torch.equal(weight, layer.layer.weight)
    assert torch.equal(finished(x), model(x))


def test_zeros_are_written_without_a_sign():
    model = nn.Linear(4, 1, bias=False)
    model.weight = nn.Parameter(torch.tensor([[-0.0, -0.0, -0.0, 1.0]]))
    weight = nmgraph.finalize(nmgraph.convert(model, method="srste")).weight
    assert torch.signbit(weight).tolist() == [[False] * 4]


@pytest.mark.parametrize("method", METHODS)
def test_model_itself_is_not_changed_by_finalizing(method):
    model = nmgraph.convert(mlp(), method=method)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    finished = nmgraph.finalize(model, force=True)
    with torch.no_grad():
        finished[0].weight.zero_()
    assert list(masked_weights(model)) == ["0", "2"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_memory_format_stay(dtype):
    model = nmgraph.convert(cnn().to(dtype=dtype, memory_format=torch.channels_last), method="srste")
    finished = nmgraph.finalize(model)
    assert finished[3].weight.dtype == dtype
    assert finished[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_layers_left_dense_keep_every_weight():
    model = resnet()
    before = model.conv1.weight.clone()
    finished = nmgraph.finalize(nmgraph.convert(model, method="srste"))
    assert torch.equal(finished.conv1.weight, before)


def test_never_trained_masks_are_refused_with_what_is_missing():
    with pytest.raises(UnfinishedError) as caught:
        nmgraph.finalize(nmgraph.convert(mlp(), method="lbc"))
    assert str(caught.value) == (
        "2 layers are not N:M yet (lbc 2:4; it was never trained with attach):\n"
        "  0: 64 of 64 blocks still keep more than 2 of 4\n"
        "  2: 32 of 32 blocks still keep more than 2 of 4\n"
        "Train to the end, or use --force (force=True) to prune now by what the method knows. The average of a trained "
        "model takes that model's masks first: nmgraph.integrations.averages.take_masks(average, model)."
    )


def test_half_trained_masks_are_refused_with_how_far_they_came():
    model = train(nmgraph.convert(mlp(), method="lbc", t_i=0.5, t_f=0.75), 3, 1000)
    with pytest.raises(
        UnfinishedError, match=r"^2 layers are not N:M yet \(lbc 2:4 \(.*\); 3 of 1,000 steps are done\):"
    ):
        nmgraph.finalize(model)


def test_long_list_of_unfinished_layers_is_cut():
    model = nmgraph.convert(nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))), method="lbc")
    with pytest.raises(UnfinishedError, match=r"3: 4 of 4 blocks still keep more than 2 of 4\n  and 2 more layers\n"):
        nmgraph.finalize(model)


def test_force_prunes_by_the_scores_learned_so_far():
    model = nmgraph.convert(nn.Sequential(nn.Linear(4, 1, bias=False)), method="lbc")
    layer = model[0]
    with torch.no_grad():
        nm(layer).raw.copy_(torch.tensor([[9.0, 1.0, 8.0, 2.0]]))
        layer._buffers["nm_accumulator"].copy_(torch.tensor([[[0.0, 1.0, 0.0, 2.0]]]))
    assert nmgraph.finalize(model, force=True)[0].weight.tolist() == [[0.0, 1.0, 0.0, 2.0]]


def test_finished_masks_need_no_force():
    model = train(nmgraph.convert(mlp(), method="lbc"), 5, 10)  # LBC's removal ends at half of all steps
    assert nmgraph.verify(nmgraph.finalize(model)).holds


def test_model_that_cannot_be_copied_says_why():
    model = nmgraph.convert(mlp(), method="srste")
    model.file = (c for c in "an open generator")
    with pytest.raises(ConversionError) as caught:
        nmgraph.finalize(model)
    assert str(caught.value) == (
        "Sequential can't be copied: cannot pickle 'generator' object. Remove what it holds besides layers and values, "
        "such as open files or locks."
    )
