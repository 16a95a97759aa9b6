"""LBC against the literal method: one trained score per combination, removed by top-k (Zhang et al., NeurIPS 2022)."""

import itertools
import math

import pytest
import torch
from torch import nn

from nmgraph.methods.contract import Clock
from nmgraph.methods.lbc import LBC
from nmgraph.nm.packing import unpack_bits
from nmgraph.nm.pattern import Pattern

STEPS, RATE, MOMENTUM, DECAY = 60, 0.1, 0.9, 5e-4


class LiteralLBC:
    """One score per combination and block, trained by torch's own SGD; a Python loop over blocks and combinations."""

    def __init__(self, blocks, pattern, total_steps, t_f=0.5):
        self.pattern, self.total_steps, self.t_f = pattern, total_steps, t_f
        self.theta = list(itertools.combinations(range(pattern.m), pattern.n))
        self.scores = nn.Parameter(torch.ones(blocks, len(self.theta), dtype=torch.float64))
        self.sgd = torch.optim.SGD([self.scores], lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
        self.alive = [set(range(len(self.theta))) for _ in range(blocks)]

    def step(self, weight_GM, grad_GM, done):
        """Train the scores of living combinations, then leave as many as the schedule wants."""
        salience = weight_GM * grad_GM
        self.scores.grad = torch.zeros_like(self.scores)
        for g, alive in enumerate(self.alive):
            for j in alive:
                self.scores.grad[g, j] = sum(salience[g, i] for i in self.theta[j])
        self.sgd.step()
        x = min(1.0, done / self.total_steps / self.t_f)
        keep = len(self.theta) - math.floor((len(self.theta) - 1) * (1 - (1 - x) ** 3))
        for g, alive in enumerate(self.alive):
            ranked = sorted(alive, key=lambda j: -self.scores[g, j].item())
            self.alive[g] = set(ranked[:keep])

    def mask(self):
        held = [{i for j in alive for i in self.theta[j]} for alive in self.alive]
        return torch.tensor([[i in block for i in range(self.pattern.m)] for block in held])


@pytest.mark.parametrize(("pattern", "blocks"), [("2:4", 12), ("1:4", 12), ("4:8", 3), ("1:16", 4)])
def test_a_sum_of_accumulators_is_the_score_of_every_living_combination(pattern, blocks):
    pattern = Pattern.parse(pattern)
    method = LBC(momentum=MOMENTUM, score_decay=DECAY)
    literal = LiteralLBC(blocks, pattern, STEPS)
    weight = torch.randn(blocks, 1, pattern.m, dtype=torch.float64)
    target = torch.randn_like(weight)
    state = method.init(weight, pattern)
    c, v = 1.0, 0.0
    masks = []
    for step in range(STEPS):
        grad = state.mask * (weight * state.mask - target + 0.5 * torch.randn_like(weight))
        literal.step(weight[:, 0], grad[:, 0], step + 1)
        state, passed_on, _ = method.update(weight, grad, state, pattern, Clock(step, STEPS, RATE))
        v = MOMENTUM * v + DECAY * c
        c = c - RATE * v
        weight = weight - 0.05 * grad

        assert passed_on is grad
        alive = unpack_bits(state.alive, pattern.combinations).flatten(0, 2)
        assert [set(row.nonzero().flatten().tolist()) for row in alive] == literal.alive
        assert torch.equal(state.mask[:, 0], literal.mask())
        if (step + 1) / STEPS <= method.t_f:
            members = torch.tensor(literal.theta)
            additive = c + state.accumulator[:, 0][:, members].sum(-1)
            assert torch.allclose(additive[alive], literal.scores.detach()[alive], rtol=0.0, atol=1e-12)
        masks.append(state.mask)
    assert (masks[STEPS // 2 - 1].sum(-1) == pattern.n).all()
    assert all(torch.equal(mask, masks[-1]) for mask in masks[STEPS // 2 - 1 :])
    assert not masks[0].all() or not masks[STEPS // 4].all()  # removal was gradual, not all at the end


def test_the_removals_of_2_4_happen_at_the_published_times():
    method, pattern = LBC(t_f=1.0), Pattern(2, 4)
    first = {k: next(x for x in range(10_001) if method.removed(x / 10_000, pattern) >= k) / 10_000 for k in range(6)}
    assert first == {0: 0.0, 1: 0.0717, 2: 0.1566, 3: 0.2632, 4: 0.4152, 5: 1.0}
    exact = {k: 1 - (1 - k / 5) ** (1 / 3) for k in range(6)}
    assert all(0 <= first[k] - exact[k] < 1e-4 for k in range(6))


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "2:8", "4:8", "1:16"])
@pytest.mark.parametrize("phase", [(0.0, 0.5), (0.25, 0.75), (0.5, 0.5)])
def test_removal_follows_its_equation_and_waits_for_t_i(pattern, phase):
    t_i, t_f = phase
    method, pattern = LBC(t_i=t_i, t_f=t_f), Pattern.parse(pattern)
    for step in range(129):
        progress = step / 128
        if progress < t_i:
            expected = 0
        elif progress >= t_f:
            expected = pattern.combinations - 1
        else:
            x = (progress - t_i) / (t_f - t_i)
            # The official code's form: 1 + ceil((C - 1) (1 - x)^3) are left.
            expected = pattern.combinations - 1 - math.ceil((pattern.combinations - 1) * (1 - x) ** 3)
        assert method.removed(progress, pattern) == expected
