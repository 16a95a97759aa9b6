"""Where a method says that it does not look across blocks, a part of a weight's rows does without the others."""

import pytest
import torch
from variants import VARIANTS

from nmgraph.methods import make_method
from nmgraph.methods.contract import Clock
from nmgraph.nm.pattern import Pattern

PATTERN = Pattern(2, 4)
STEPS = 12
PARTS = (slice(0, 3), slice(3, 8), slice(8, 8))


def rows_of(state, part):
    return type(state)(*(tensor[part] if tensor.dim() >= 3 else tensor for tensor in state))


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_of_the_rows_do_as_the_whole(variant):
    name, options = VARIANTS[variant]
    method = make_method(name, options)
    w_OSC = torch.randn(8, 3, 16)
    state, apart = method.init(w_OSC, PATTERN), 0
    for step in range(STEPS):
        clock, grad_OSC = Clock(step, STEPS, 0.05, fresh=step == 0), torch.randn(8, 3, 16)
        after = method.update(w_OSC, grad_OSC.clone(), state, PATTERN, clock)
        for part in PARTS:
            if not method.update_looks_across(clock):
                apart += 1
                own = method.update(w_OSC[part], grad_OSC[part].clone(), rows_of(state, part), PATTERN, clock)
                assert torch.equal(own.grad, after.grad[part])
                for one, other in zip(own.state, rows_of(after.state, part), strict=True):
                    assert torch.equal(one, other)
                assert (own.restart is None) == (after.restart is None)
                assert own.restart is None or torch.equal(own.restart, after.restart[part])
            if not method.operand_looks_across:
                own, whole = (
                    method.operand(w, s, PATTERN).forward
                    for w, s in ((w_OSC[part], rows_of(state, part)), (w_OSC, state))
                )
                assert torch.equal(own, whole[part])
                assert torch.equal(
                    method.mask(w_OSC[part], rows_of(state, part), PATTERN), method.mask(w_OSC, state, PATTERN)[part]
                )
        w_OSC, state = w_OSC - 0.05 * after.grad, after.state
    assert apart or variant in ("maxq", "bimask by lot")
