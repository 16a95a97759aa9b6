"""What a method says that a step needs is what the step is seen to need."""

import math

import pytest
import torch
from handles import nm
from torch import nn
from variants import VARIANTS

import nmgraph
from nmgraph.methods import make_method
from nmgraph.methods.contract import Clock
from nmgraph.nm.pattern import Pattern

STEPS = 24


def share(tensor):
    return float((tensor != 0).float().mean())


def lbc_fewest(method, clock, pattern):
    left = pattern.combinations - method.removed(clock.progress_before, pattern)
    return next(k for k in range(pattern.n, pattern.m + 1) if math.comb(k, pattern.n) >= left) / pattern.m


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_work_is_what_a_step_needs(variant, pattern):
    name, options = VARIANTS[variant]
    method = make_method(name, options)
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    nmgraph.convert(model, method=method, pattern=pattern)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    masked = nm(model)
    for step in range(STEPS):
        work = method.work(Pattern.parse(pattern), Clock(step, STEPS, 0.01))
        optimizer.zero_grad()
        operand = masked.operand()
        (model(torch.randn(256, 64)) - torch.randn(256, 64)).square().sum().backward()
        gradient = share(model._parameters["weight"].grad)
        optimizer.step()
        if name == "lbc":  # what is left is no lot: at least the fewest weights that have so many combinations
            fewest = lbc_fewest(method, Clock(step, STEPS, 0.01), Pattern.parse(pattern))
            assert fewest <= share(operand.forward) == gradient <= work.forward + 0.02
            continue
        assert share(operand.forward) == pytest.approx(work.forward, abs=0.002)
        assert gradient == pytest.approx(work.weight_gradient, abs=0.002)
        if operand.backward is None:
            assert work.input_gradient == work.forward
        else:  # a backward block may lie where the forward mask has left less than N
            assert 0.5 * work.input_gradient < share(operand.backward) <= work.input_gradient


def test_frozen_blocks_and_living_combinations_can_be_watched():
    model = nn.Linear(64, 64)
    nmgraph.convert(model, method="lbc", pattern="2:4")
    weight = nm(model)
    assert float(weight.gauges()["live_combinations"]) == 6
    nmgraph.convert(other := nn.Linear(64, 64), method="bame")
    assert float(nm(other).gauges()["frozen"]) == pytest.approx(0.5, abs=0.01)  # the half with the largest norms
    nmgraph.convert(third := nn.Linear(64, 64), method="static")
    assert nm(third).gauges() == {}
