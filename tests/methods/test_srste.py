"""Straight through with a decay of the masked weights: the pure functions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmgraph.methods.contract import Clock
from nmgraph.methods.srste import SRSTE
from nmgraph.nm.grouping import blocks
from nmgraph.nm.pattern import Pattern

CLOCK = Clock(3, 10, 0.1)


def literal_mask(w_OSC, pattern):
    """Keep the N largest magnitudes of every block, by sorting each in Python."""
    mask = torch.zeros_like(w_OSC, dtype=torch.bool)
    for o, s, c in torch.cartesian_prod(*(torch.arange(n) for n in w_OSC.shape)).tolist():
        block = range(c - c % pattern.m, c - c % pattern.m + pattern.m)
        ranked = sorted(block, key=lambda i: (-abs(w_OSC[o, s, i].item()), i))
        mask[o, s, c] = c in ranked[: pattern.n]
    return mask


@pytest.mark.parametrize("text", ["1:4", "2:4", "2:8", "4:8", "8:16"])
def test_the_forward_weight_is_the_magnitude_masked_one(text):
    pattern, w_OSC = Pattern.parse(text), torch.randn(3, 2, 16)
    operand = SRSTE().operand(w_OSC, SRSTE().init(w_OSC, pattern), pattern)
    assert torch.equal(operand.forward, w_OSC * literal_mask(w_OSC, pattern))
    assert operand.backward is None


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.floats(0, 10))
def test_the_optimizer_gets_the_gradient_plus_the_decay_of_masked_weights(seed, decay):
    generator = torch.Generator().manual_seed(seed)
    w_OSC, grad = (torch.randn(2, 2, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    pattern = Pattern(2, 4)
    new = SRSTE(decay).update(w_OSC, grad, SRSTE().init(w_OSC, pattern), pattern, CLOCK).grad
    assert torch.equal(new, grad + decay * (~literal_mask(w_OSC, pattern) * w_OSC))


def test_update_changes_neither_the_weight_nor_the_gradient_it_was_given():
    w_OSC, grad, pattern = torch.randn(2, 2, 8), torch.randn(2, 2, 8), Pattern(2, 4)
    copies = w_OSC.clone(), grad.clone()
    SRSTE(1.0).update(w_OSC, grad, SRSTE().init(w_OSC, pattern), pattern, CLOCK)
    assert torch.equal(w_OSC, copies[0])
    assert torch.equal(grad, copies[1])


@pytest.mark.parametrize("text", ["1:4", "2:4", "8:16", "16:32"])
def test_the_mask_is_exact_from_the_start_and_for_every_pattern(text):
    method, pattern, w_OSC = SRSTE(), Pattern.parse(text), torch.randn(3, 2, 32)
    state = method.init(w_OSC, pattern)
    assert method.refusal(pattern) is None
    assert (blocks(method.mask(w_OSC, state, pattern), pattern.m).sum(-1) == pattern.n).all()
    assert method.unfinished(w_OSC, state, pattern) is None


def test_only_the_decay_needs_the_step_hook():
    assert SRSTE().needs_attach
    assert not SRSTE(decay=0.0).needs_attach
