"""Masking a weight, with the gradient masked or passed on."""

import pytest
import torch

from nmgraph.nm.straight_through import masked, straight_through

MASK = torch.tensor([[True, False, True, False], [False, True, True, False]])


@pytest.fixture
def weight():
    return torch.randn(2, 4, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("function", [masked, straight_through])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropped_weights_are_zero_and_kept_ones_unchanged(function, dtype):
    w = torch.randn(2, 4).to(dtype)
    out = function(w, MASK)
    assert out.dtype == dtype
    assert torch.equal(out, w * MASK)


@pytest.mark.parametrize("function", [masked, straight_through])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_dropped_nan_or_infinity_gives_zero(function, value):
    w = torch.full((2, 4), value)
    assert torch.equal(function(w, MASK)[~MASK], torch.zeros(4))


def test_a_dropped_nan_leaves_the_masked_gradient_finite():
    w = torch.full((2, 4), torch.nan, requires_grad=True)
    masked(w, MASK).backward(torch.ones(2, 4))
    assert torch.equal(w.grad, MASK.float())


def test_masked_has_the_gradient_of_what_it_computes(weight):
    assert torch.autograd.gradcheck(lambda w: masked(w, MASK), weight)
    assert torch.autograd.gradgradcheck(lambda w: masked(w, MASK), weight)


def test_straight_through_passes_the_whole_gradient_on(weight):
    grad = torch.randn(2, 4, dtype=torch.float64)
    straight_through(weight, MASK).backward(grad)
    assert torch.equal(weight.grad, grad)


@pytest.mark.parametrize(
    ("function", "share"), [(masked, MASK.double()), (straight_through, torch.ones(2, 4).double())]
)
def test_functional_gradients_agree_with_autograd(weight, function, share):
    slope = torch.randn(2, 4, dtype=torch.float64)
    grad = torch.func.grad(lambda w: (function(w, MASK) * slope).sum())(weight.detach())
    assert torch.equal(grad, slope * share)


@pytest.mark.parametrize("function", [masked, straight_through])
def test_vmap_over_weights_and_masks_equals_a_loop(function):
    weights, masks = torch.randn(3, 2, 4), torch.rand(3, 2, 4) > 0.5
    together = torch.func.vmap(function)(weights, masks)
    assert torch.equal(together, torch.stack([function(w, m) for w, m in zip(weights, masks, strict=True)]))


@pytest.mark.parametrize(("function", "share"), [(masked, MASK.float()), (straight_through, torch.ones(2, 4))])
def test_vmap_over_gradients_equals_a_loop(function, share):
    weights, slopes = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    grads = torch.func.vmap(torch.func.grad(lambda w, s: (function(w, MASK) * s).sum()))(weights, slopes)
    assert torch.equal(grads, slopes * share)
