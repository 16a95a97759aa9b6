"""Layers whose input gradient goes through a weight of its own, held to autograd written out in float64."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from handles import nm
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from nmgraph.layers.kinds import layer_axis
from nmgraph.layers.masked import SplitMasked, Training, sparsify
from nmgraph.layers.recipe import Recipe
from nmgraph.methods.contract import Method, Update
from nmgraph.nm.grouping import restore
from nmgraph.nm.pattern import Pattern


class TwoMasksState(NamedTuple):
    forward_mask: torch.Tensor
    backward_mask: torch.Tensor


@dataclass(frozen=True)
class TwoMasks(Method[TwoMasksState]):
    """Two fixed masks, unrelated to each other and to any pattern."""

    name: ClassVar[str] = "two-masks"
    state_type: ClassVar[type[tuple[Any, ...]]] = TwoMasksState
    splits_backward: ClassVar[bool] = True

    def init(self, w_OSC, pattern):
        forward, part = (torch.rand(w_OSC.shape, generator=torch.Generator().manual_seed(i)) > 0.5 for i in (1, 2))
        return TwoMasksState(forward, forward & part)

    def mask(self, w_OSC, state, pattern):
        return state.forward_mask

    def forward_weight(self, w_OSC, state, pattern):
        return w_OSC * state.forward_mask

    def backward_weight(self, forward_OSC, state, pattern):
        return forward_OSC.detach() * state.backward_mask

    def update(self, w_OSC, grad_OSC, state, pattern, clock):
        return Update(state, grad_OSC)


@dataclass(frozen=True)
class Forgetful(TwoMasks):
    """Promises a backward weight and gives none."""

    name: ClassVar[str] = "forgetful"

    def backward_weight(self, forward_OSC, state, pattern):
        return None


def split(layer, method=None):
    recipe = Recipe(method or TwoMasks(), Pattern(2, 4), layer_axis(layer))
    sparsify(layer, "weight", "site", recipe, Training())
    return layer


def masks(layer):
    shape = tuple(nm(layer).raw.shape)
    return [restore(mask, shape, layer_axis(layer)) for mask in nm(layer).state]


def literal(layer, x, dy):
    """Give Y and dW of the forward weight, and dX of the backward one, by two ordinary layers under autograd."""
    results = []
    for mask in masks(layer):
        plain = layer.nm_base(*layer.made_of[0], **layer.made_of[1]).to(x.dtype)
        plain.weight.data = nm(layer).raw.detach() * mask
        if plain.bias is not None:
            plain.bias.data = layer.bias.detach().clone()
        own = x.detach().clone().requires_grad_()
        y = plain(own)
        y.backward(dy)
        results.append((y.detach(), own.grad, plain.weight.grad, None if plain.bias is None else plain.bias.grad))
    (y, _, dw, db), (_, dx, _, _) = results
    return y, dx, dw * masks(layer)[0], db


LAYERS = {
    "linear": (nn.Linear, (12, 8), {}, (5, 12)),
    "linear of three axes": (nn.Linear, (12, 8), {}, (2, 5, 12)),
    "linear of one axis": (nn.Linear, (12, 8), {}, (12,)),
    "linear without bias": (nn.Linear, (12, 8), {"bias": False}, (5, 12)),
    "conv1d": (nn.Conv1d, (8, 4, 3), {}, (2, 8, 9)),
    "conv1d strided": (nn.Conv1d, (8, 4, 3), {"stride": 2, "padding": 1}, (2, 8, 9)),
    "conv1d dilated": (nn.Conv1d, (8, 4, 3), {"dilation": 2, "padding": "same"}, (2, 8, 9)),
    "conv1d circular": (nn.Conv1d, (8, 4, 3), {"padding": 2, "padding_mode": "circular"}, (2, 8, 9)),
    "conv2d": (nn.Conv2d, (8, 4, 3), {}, (2, 8, 7, 6)),
    "conv2d strided": (nn.Conv2d, (8, 4, 3), {"stride": (2, 3), "padding": (1, 2)}, (2, 8, 8, 9)),
    "conv2d strided, rows left over": (nn.Conv2d, (8, 4, 3), {"stride": 3}, (2, 8, 11, 10)),
    "conv2d grouped": (nn.Conv2d, (8, 4, 3), {"groups": 2, "padding": 1}, (2, 8, 6, 6)),
    "conv2d same, even kernel": (nn.Conv2d, (8, 4, (4, 2)), {"padding": "same"}, (2, 8, 6, 7)),
    "conv2d valid": (nn.Conv2d, (8, 4, 3), {"padding": "valid"}, (2, 8, 6, 7)),
    "conv2d reflected": (nn.Conv2d, (8, 4, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 8, 6, 7)),
    "conv2d replicated, strided": (
        nn.Conv2d,
        (8, 4, 3),
        {"padding": 1, "padding_mode": "replicate", "stride": 2},
        (2, 8, 6, 7),
    ),
    "conv2d all at once": (
        nn.Conv2d,
        (8, 4, (3, 2)),
        {"stride": 2, "padding": (2, 1), "dilation": (2, 1), "groups": 2, "bias": False},
        (2, 8, 9, 8),
    ),
    "conv2d without a batch": (nn.Conv2d, (8, 4, 3), {}, (8, 7, 6)),
    "conv3d": (nn.Conv3d, (4, 4, 2), {}, (2, 4, 4, 3, 5)),
    "conv3d strided": (nn.Conv3d, (4, 4, 2), {"stride": 2, "padding": 1, "dilation": 2}, (2, 4, 5, 6, 5)),
    "transposed conv1d": (nn.ConvTranspose1d, (8, 4, 3), {}, (2, 8, 9)),
    "transposed conv2d": (nn.ConvTranspose2d, (8, 4, 3), {"stride": 2, "padding": 1}, (2, 8, 5, 6)),
    "transposed conv2d without a batch": (nn.ConvTranspose2d, (8, 4, 2), {"stride": 2}, (8, 5, 6)),
    "transposed conv2d, output padded": (
        nn.ConvTranspose2d,
        (8, 4, 3),
        {"stride": (2, 1), "padding": 1, "output_padding": (1, 2), "dilation": (1, 3), "groups": 2, "bias": False},
        (2, 8, 5, 6),
    ),
    "transposed conv3d": (nn.ConvTranspose3d, (4, 4, 2), {"stride": 2}, (2, 4, 3, 2, 3)),
    "Hugging Face's Conv1D": (Conv1D, (8, 12), {}, (2, 5, 12)),
}


def make(kind, dtype=torch.float64, channels_last=False):
    cls, args, options, shape = LAYERS[kind]
    layer = cls(*args, **options).to(dtype)
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
    layer.made_of = (args, options)
    return split(layer), torch.randn(shape, dtype=dtype).requires_grad_()


kinds = pytest.mark.parametrize("kind", LAYERS)


@kinds
def test_the_input_gradient_uses_the_backward_weight_and_all_else_the_forward_one(kind):
    layer, x = make(kind)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    wanted_y, dx, dw, db = literal(layer, x, dy)
    assert isinstance(layer, SplitMasked)
    assert torch.allclose(y, wanted_y)
    assert torch.allclose(x.grad, dx)
    assert torch.allclose(nm(layer).raw.grad, dw)
    assert db is None or torch.allclose(layer.bias.grad, db)


def test_a_channels_last_convolution_is_split_in_the_same_way():
    layer, x = make("conv2d strided", channels_last=True)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    wanted_y, dx, dw, _ = literal(layer, x, dy)
    assert torch.allclose(y, wanted_y)
    assert torch.allclose(x.grad, dx)
    assert torch.allclose(nm(layer).raw.grad, dw)


@pytest.mark.parametrize("kind", ["linear", "conv2d strided", "conv2d reflected", "conv3d"])
def test_with_equal_masks_the_whole_layer_passes_gradcheck(kind):
    layer, x = make(kind)
    layer._buffers["nm_backward_mask"].copy_(layer._buffers["nm_forward_mask"])
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(layer, {"weight": w}, (x,)), (x, nm(layer).raw)
    )


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_two_layers_in_a_row_each_use_their_own_backward_weight(kind):
    first, x = make(kind)
    second = nn.Linear(first(x).shape[-1], 4).double()
    second.made_of = ((second.in_features, 4), {})
    split(second)
    hidden = first(x)
    hidden.retain_grad()
    y = second(hidden)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.allclose(hidden.grad, literal(second, hidden, dy)[1])
    assert torch.allclose(x.grad, literal(first, x, hidden.grad)[1])


@pytest.mark.parametrize("kind", ["linear", "conv2d strided"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(kind, reentrant):
    layer, x = make(kind)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    dy = torch.randn_like(y)
    y.backward(dy)
    _, dx, dw, _ = literal(layer, x, dy)
    assert torch.allclose(x.grad, dx)
    assert torch.allclose(nm(layer).raw.grad, dw)


@pytest.mark.parametrize("kind", ["linear", "linear of three axes", "conv2d", "conv2d strided", "transposed conv3d"])
def test_the_output_is_not_copied_on_its_way(kind, monkeypatch):
    layer, x = make(kind)
    monkeypatch.setattr(torch.Tensor, "clone", lambda *_: pytest.fail("an activation was copied"))
    layer(x)


@pytest.mark.parametrize(
    "kind", ["linear", "linear of three axes", "conv1d", "conv2d strided", "conv2d reflected", "conv3d"]
)
def test_under_autocast_both_ways_run_in_bfloat16_and_gradients_come_in_float32(kind):
    layer, x = make(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    dy = torch.randn_like(y)
    y.backward(dy)
    assert x.grad.dtype == nm(layer).raw.grad.dtype == torch.float32
    wanted_y, dx, dw, _ = literal(layer, x, dy.float())
    for actual, wanted in ((y.float(), wanted_y), (x.grad, dx), (nm(layer).raw.grad, dw)):
        assert (actual - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_what_follows_may_work_in_place(kind):
    layer, x = make(kind)
    F.relu(layer(x), inplace=True).sum().backward()
    in_place = x.grad.clone()
    x.grad = None
    F.relu(layer(x)).sum().backward()
    assert torch.equal(in_place, x.grad)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_an_input_that_needs_no_gradient_still_trains_the_weight(kind):
    layer, x = make(kind)
    y = layer(x.detach())
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.allclose(nm(layer).raw.grad, literal(layer, x, dy)[2])


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_without_gradients_the_forward_weight_is_used_as_ever(kind):
    layer, x = make(kind)
    with torch.no_grad():
        y = layer(x)
    assert not y.requires_grad
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_frozen_weight_still_sends_the_input_gradient_through_the_backward_one(kind):
    layer, x = make(kind)
    nm(layer).raw.requires_grad_(False)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.allclose(x.grad, literal(layer, x, dy)[1])


def test_a_method_that_promises_a_backward_weight_and_gives_none_is_named():
    layer = split(nn.Linear(12, 8), Forgetful())
    with pytest.raises(RuntimeError, match=r"^site: forgetful promised a backward weight and gave none\.$"):
        layer(torch.randn(2, 12))


def test_a_weight_read_by_foreign_code_holds_the_forward_mask():
    layer, _ = make("linear")
    assert torch.equal(layer.weight, nm(layer).raw * masks(layer)[0])
