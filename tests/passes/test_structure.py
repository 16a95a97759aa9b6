"""Copies of a model's modules, and what becomes of its tensors."""

import copy

import pytest
import torch
from models import Recorder, TiedLanguageModel, mlp, resnet
from torch import nn

from nmgraph.errors import ConversionError
from nmgraph.passes.structure import copy_structure, duplicate, share, share_parameters


def tensors(model):
    return list(model.state_dict(keep_vars=True).values())


def test_shared_copy_has_modules_of_its_own_and_the_very_tensors():
    model = resnet()
    copied = copy_structure(model, share)
    assert [id(t) for t in tensors(copied)] == [id(t) for t in tensors(model)]
    assert not {id(m) for m in copied.modules()} & {id(m) for m in model.modules()}


def test_buffers_may_be_copied_and_parameters_shared():
    model = resnet()
    copied = copy_structure(model, share_parameters)
    assert all(a is b for a, b in zip(copied.parameters(), model.parameters(), strict=True))
    assert all(a is not b and torch.equal(a, b) for a, b in zip(copied.buffers(), model.buffers(), strict=True))


def test_duplicate_shares_nothing_and_keeps_parameters_and_their_gradients_flags():
    model = mlp()
    model[0].weight.requires_grad_(False)
    copied = copy_structure(model, duplicate)
    for a, b in zip(copied.parameters(), model.parameters(), strict=True):
        assert a is not b
        assert torch.equal(a, b)
        assert isinstance(a, nn.Parameter)
        assert a.requires_grad is b.requires_grad


@pytest.mark.parametrize("become", [share, share_parameters, duplicate, lambda t: nn.Parameter(torch.zeros_like(t))])
def test_ties_stay_ties(become):
    copied = copy_structure(TiedLanguageModel(), become)
    assert copied.head.weight is copied.embedding.weight


def test_activations_on_a_module_are_cut_from_their_graph():
    model = Recorder()
    model(torch.randn(2, 16))
    copied = copy_structure(model, duplicate)
    assert torch.equal(copied.activation, model.activation)
    assert copied.activation is copied.kept[0]
    assert copied.activation.is_leaf


def test_copy_can_be_copied_again():
    copied = copy.deepcopy(copy_structure(resnet(), share))
    assert len(list(copied.parameters())) == len(list(resnet().parameters()))


def test_what_cannot_be_copied_is_named():
    model = mlp()
    with open(__file__) as model.source, pytest.raises(ConversionError) as caught:
        copy_structure(model, share)
    assert str(caught.value) == (
        "Sequential can't be copied: cannot pickle '_io.TextIOWrapper' object. Remove what it holds besides layers and "
        "values, such as open files or locks."
    )


def test_a_container_that_holds_itself_is_copied():
    model = mlp()
    model.notes = [torch.zeros(2)]
    model.notes.append(model.notes)
    copied = copy_structure(model, share)
    assert copied.notes[0] is model.notes[0]
    assert copied.notes[1] is copied.notes
