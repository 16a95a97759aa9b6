"""Masking a weight, with the gradient masked or passed on."""

import pytest
import torch

from nmgraph.nm.straight_through import masked, replaced, straight_through

MASK = torch.tensor([[True, False, True, False], [False, True, True, False]])
PASSES = torch.tensor([[True, True, False, False], [True, False, True, False]])


@pytest.fixture(autouse=True, params=[1 << 16, 0], ids=["small", "large"])
def _large(request, monkeypatch):
    """Mask small weights as small ones are, and as large ones are."""
    monkeypatch.setattr("nmgraph.nm.straight_through._LARGE", request.param)


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
    assert torch.autograd.gradcheck(lambda w: masked(w, MASK), weight, check_forward_ad=True)


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


def test_the_gradient_passes_where_it_is_said_to(weight):
    grad = torch.randn(2, 4, dtype=torch.float64)
    out = straight_through(weight, MASK, PASSES)
    out.backward(grad)
    assert torch.equal(out, weight * MASK)
    assert torch.equal(weight.grad, grad * PASSES)


def test_a_stopped_gradient_is_zero_even_where_it_is_not_finite(weight):
    straight_through(weight, MASK, PASSES).backward(torch.full((2, 4), torch.nan, dtype=torch.float64))
    assert torch.equal(weight.grad.isnan(), PASSES)
    assert (weight.grad[~PASSES] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_replaced_gives_the_value_and_trains_the_weight(dtype):
    weight, value, grad = (torch.randn(2, 4).to(dtype).requires_grad_() for _ in range(3))
    out = replaced(weight, value * 1.0)
    assert out.dtype == dtype
    assert torch.equal(out, value)
    out.backward(grad.detach())
    assert torch.equal(weight.grad, grad)
    assert value.grad is None


def test_a_weight_that_is_not_trained_needs_no_gradient(weight):
    assert not straight_through(weight.detach(), MASK, PASSES).requires_grad
    assert not replaced(weight.detach(), weight).requires_grad


def test_second_derivatives_stop_where_first_ones_do(weight):
    loss = (straight_through(weight, MASK, PASSES) ** 2).sum()
    (first,) = torch.autograd.grad(loss, weight, create_graph=True)
    assert torch.equal(first, 2.0 * weight * MASK * PASSES)
    (second,) = torch.autograd.grad(first.sum(), weight)
    assert torch.equal(second, 2.0 * PASSES.double())


def test_what_is_multiplied_by_may_be_changed_in_place(weight):
    before, value = weight.detach().clone(), torch.randn(2, 4, dtype=torch.float64)
    for out, expected in [(straight_through(weight, MASK), before * MASK), (replaced(weight, value), value.clone())]:
        weight.grad = None
        out.mul_(2.0)
        out.sum().backward()
        assert torch.equal(out, 2.0 * expected)
        assert torch.equal(weight.detach(), before)
        assert torch.equal(weight.grad, torch.full((2, 4), 2.0, dtype=torch.float64))
    assert torch.equal(value, expected)


def test_vmap_with_stopped_gradients_equals_a_loop():
    weights, masks, passes, slopes = (torch.randn(3, 2, 4) for _ in range(4))
    masks, passes = masks > 0, passes > 0

    def loss(w, mask, where, slope):
        return (straight_through(w, mask, where) * slope).sum()

    together = torch.func.vmap(torch.func.grad(loss))(weights, masks, passes, slopes)
    assert torch.equal(together, slopes * passes)
    shared = torch.func.vmap(torch.func.grad(loss), in_dims=(0, 0, None, 0))(weights, masks, PASSES, slopes)
    assert torch.equal(shared, slopes * PASSES)


def test_vmap_over_values_equals_a_loop():
    weight, values, slopes = torch.randn(2, 4), torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    assert torch.equal(torch.func.vmap(replaced, in_dims=(None, 0))(weight, values), values)
    slope_of = torch.func.grad(lambda w, v, s: (replaced(w, v) * s).sum())
    assert torch.equal(torch.func.vmap(slope_of, in_dims=(None, 0, 0))(weight, values, slopes), slopes)
