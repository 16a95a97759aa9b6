"""The decaying mask against autograd of ``W (B + δ (1 - B))`` written out (Bambhaniya et al., CPAL 2025, MDGF)."""

import math

import pytest
import torch
from handles import nm
from torch import nn
from torch.nn import functional as F

import nmgraph
from nmgraph.methods.contract import Clock
from nmgraph.methods.decaying_mask import DecayingMask, DecayingMaskState
from nmgraph.nm.pattern import Pattern

PATTERNS = ["2:4", "1:4", "1:16"]


def literal_mask(weight, pattern):
    """Keep the N largest magnitudes of every block of the last axis."""
    mask = torch.zeros_like(weight)
    rows, flags = weight.detach().reshape(-1, pattern.m), mask.view(-1, pattern.m)
    for row, flag in zip(rows, flags, strict=True):
        for i in sorted(range(pattern.m), key=lambda i: (-abs(row[i].item()), i))[: pattern.n]:
            flag[i] = 1.0
    return mask


def literal_weight(weight, pattern, delta):
    b = literal_mask(weight, pattern)
    return weight * (b + delta * (1 - b))


def state_of(delta):
    return DecayingMaskState(torch.tensor(delta))


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("delta", [1.0, 0.375, 0.0])
@pytest.mark.parametrize("gradient_flow", ["faded", "dense"])
def test_forward_and_gradient_are_the_literal_ones(text, delta, gradient_flow):
    pattern, method = Pattern.parse(text), DecayingMask(gradient_flow=gradient_flow)
    weight = torch.randn(3, 2, 16, dtype=torch.float64, requires_grad=True)
    x, target = torch.randn(5, 16, dtype=torch.float64), torch.randn(5, 3, 2, dtype=torch.float64)

    def loss(w):
        return (torch.einsum("bc,osc->bos", x, w).tanh() - target).square().sum()

    value = method.operand(weight, state_of(delta), pattern).forward
    (grad,) = torch.autograd.grad(loss(value), weight)
    literal = literal_weight(weight, pattern, delta)
    assert torch.allclose(value, literal, rtol=1e-12, atol=0.0)
    (faded,) = torch.autograd.grad(loss(literal), weight, retain_graph=True)
    (straight,) = torch.autograd.grad(loss(literal), literal)
    assert torch.allclose(grad, faded if gradient_flow == "faded" else straight, rtol=1e-9, atol=1e-12)
    if delta < 1:
        assert not torch.allclose(faded, straight)


@pytest.mark.parametrize("gradient_flow", ["faded", "dense"])
def test_a_step_gives_the_optimizer_the_gradient_as_it_came(gradient_flow):
    method, weight, grad = DecayingMask(gradient_flow=gradient_flow), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    assert method.update(weight, grad, state_of(0.5), Pattern(2, 4), Clock(3, 10, 0.1)).grad is grad


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"curve": "linear"}, {0: 1, 0.25: 2 / 3, 0.375: 0.5, 0.5: 1 / 3, 0.75: 0, 1: 0}),
        ({"curve": "linear", "t_i": 0.25}, {0: 1, 0.25: 1, 0.375: 0.75, 0.5: 0.5, 0.625: 0.25, 0.75: 0, 1: 0}),
        ({}, {0: 1, 0.25: math.exp(-7 / 3), 0.375: math.exp(-3.5), 0.74: math.exp(-7 * 0.74 / 0.75), 0.75: 0, 1: 0}),
        ({"t_i": 0.5, "t_f": 1.0, "rate": 2.0}, {0: 1, 0.5: 1, 0.75: math.exp(-1), 0.99: math.exp(-1.96), 1: 0}),
        ({"t_i": 0.5, "t_f": 0.5}, {0: 1, 0.25: 1, 0.499: 1, 0.5: 0, 1: 0}),
        ({"rate": 0.0}, {0: 1, 0.5: 1, 0.749: 1, 0.75: 0}),
    ],
)
def test_the_factor_falls_on_its_curve(options, expected):
    method = DecayingMask(**options)
    assert {x: method.factor(x) for x in expected} == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("curve", ["exponential", "linear"])
def test_every_step_sets_the_factor_of_its_progress(curve):
    method, pattern = DecayingMask(curve=curve, t_i=0.25, t_f=0.75, rate=3.0), Pattern(2, 4)
    weight = torch.randn(2, 1, 8)
    state = method.init(weight, pattern)
    assert float(state.factor) == 1.0
    for step in range(8):
        state = method.update(weight, weight, state, pattern, Clock(step, 8, 0.1)).state
        x = min(max(((step + 1) / 8 - 0.25) / 0.5, 0.0), 1.0)
        expected = 0.0 if x == 1 else math.exp(-3 * x) if curve == "exponential" else 1 - x
        assert float(state.factor) == pytest.approx(expected, rel=1e-6)
        assert state.factor.dtype == torch.float32


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 4)).double()


@pytest.mark.parametrize("gradient_flow", ["faded", "dense"])
def test_training_is_dense_until_t_i_unfinished_until_t_f_and_n_of_m_from_then_on(gradient_flow):
    model, dense = nmgraph.convert(network(), method="decaying-mask", t_i=0.375, t_f=0.75, gradient_flow=gradient_flow), network()  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    x, target = torch.randn(8, 8, 4, 4, generator=generator).double(), torch.randn(8, 4, generator=generator).double()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, dense)]
    nmgraph.attach(model, optimizers[0], total_steps=8)
    same, said = [], []
    for _ in range(8):
        for m, optimizer in zip((model, dense), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(m(x), target).backward()
            optimizer.step()
        same.append(torch.allclose(model(x), dense(x), rtol=1e-12, atol=0.0))
        said.append([nm(layer).unfinished() for layer in (model[0], model[3])])
        kept = (model[3].weight != 0).reshape(-1, 4).sum(1)
        assert (kept == (2 if said[-1][1] is None else 4)).all()
    assert same == [True] * 3 + [False] * 5
    assert said[:5] == [["144 of 144 blocks still keep more than 2 of 4", "32 of 32 blocks still keep more than 2 of 4"]] * 5  # fmt: skip
    assert said[5:] == [[None, None]] * 3
    assert nmgraph.verify(nmgraph.finalize(model)).holds


@pytest.mark.parametrize("gradient_flow", ["faded", "dense"])
def test_a_weight_that_left_the_mask_can_come_back(gradient_flow):
    method, pattern = DecayingMask(gradient_flow=gradient_flow), Pattern(2, 4)
    weight = torch.tensor([[[3.0, 2.0, 1.0, 0.5]]])
    assert method.operand(weight, state_of(0.25), pattern).forward.flatten().tolist() == [3.0, 2.0, 0.25, 0.125]
    weight = torch.tensor([[[3.0, 2.0, 2.5, 0.5]]])
    assert method.operand(weight, state_of(0.25), pattern).forward.flatten().tolist() == [3.0, 0.5, 2.5, 0.125]


def test_an_unfinished_state_is_concluded_by_cutting_off_what_is_outside_the_mask():
    method, pattern, weight = DecayingMask(), Pattern(2, 4), torch.randn(3, 2, 16)
    assert method.unfinished(weight, state_of(1e-6), pattern) is not None
    concluded = method.conclude(weight, state_of(0.5), pattern)
    assert method.unfinished(weight, concluded, pattern) is None
    assert torch.equal(method.operand(weight, concluded, pattern).forward, weight * literal_mask(weight, pattern))


@pytest.mark.parametrize("gradient_flow", ["faded", "dense"])
def test_a_weight_outside_the_mask_is_plain_zero_at_the_end_whatever_it_was(gradient_flow):
    method, pattern = DecayingMask(gradient_flow=gradient_flow), Pattern(2, 4)
    weight = torch.tensor([[[torch.inf, torch.inf, torch.inf, -1.0]]])
    value = method.operand(weight, state_of(0.0), pattern).forward
    assert value.flatten().tolist() == [torch.inf, torch.inf, 0.0, 0.0]
    assert not torch.signbit(value).any()
