"""The four criteria of LBC's Table 6 against a ranking of every combination, one by one (Zhang et al., NeurIPS 2022)."""

import itertools
import math

import pytest
import torch
from torch import nn

from nmgraph.errors import MethodError
from nmgraph.methods import make_method
from nmgraph.methods.contract import Clock
from nmgraph.methods.lbc import LBC
from nmgraph.nm.packing import unpack_bits
from nmgraph.nm.pattern import Pattern

CRITERIA = ["score", "inverse", "magnitude", "gradient"]
STEPS, RATE, MOMENTUM, DECAY = 30, 0.1, 0.9, 5e-4


class LiteralCriterion:
    """A number for each combination of each block; the worst of those alive leave."""

    def __init__(self, criterion, blocks, pattern):
        self.criterion, self.pattern = criterion, pattern
        self.theta = list(itertools.combinations(range(pattern.m), pattern.n))
        self.scores = nn.Parameter(torch.ones(blocks, len(self.theta), dtype=torch.float64))
        self.sgd = torch.optim.SGD([self.scores], lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
        self.alive = [set(range(len(self.theta))) for _ in range(blocks)]

    def worth(self, g, j, weight_GM, grad_GM):
        members = self.theta[j]
        return {
            "score": lambda: self.scores[g, j].item(),
            "inverse": lambda: -self.scores[g, j].item(),
            "magnitude": lambda: sum(abs(weight_GM[g, i].item()) for i in members),
            "gradient": lambda: sum(abs(grad_GM[g, i].item()) for i in members),
        }[self.criterion]()

    def step(self, weight_GM, grad_GM, done):
        self.scores.grad = torch.zeros_like(self.scores)
        for g, alive in enumerate(self.alive):
            for j in alive:
                self.scores.grad[g, j] = sum(weight_GM[g, i] * grad_GM[g, i] for i in self.theta[j])
        self.sgd.step()
        x = min(1.0, 2 * done / STEPS)
        keep = len(self.theta) - math.floor((len(self.theta) - 1) * (1 - (1 - x) ** 3))
        for g, alive in enumerate(self.alive):
            if len(alive) > keep:
                ranked = sorted(alive, key=lambda j: -self.worth(g, j, weight_GM, grad_GM))
                self.alive[g] = set(ranked[:keep])

    def mask(self):
        held = [{i for j in alive for i in self.theta[j]} for alive in self.alive]
        return torch.tensor([[i in block for i in range(self.pattern.m)] for block in held])


def run(method, pattern, blocks, literal=None):
    """Train towards a target; give the masks after every step."""
    generator = torch.Generator().manual_seed(3)
    randn = lambda: torch.randn(blocks, 1, pattern.m, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, target = randn(), randn()
    state, masks = method.init(weight, pattern), []
    for step in range(STEPS):
        grad = state.mask * (weight * state.mask - target + 0.5 * randn())
        update = method.update(weight, grad, state, pattern, Clock(step, STEPS, RATE))
        state = update.state
        assert update.grad is grad
        if literal is not None:
            literal.step(weight[:, 0], grad[:, 0], step + 1)
            alive = unpack_bits(state.alive, pattern.combinations).flatten(0, 2)
            assert [set(row.nonzero().flatten().tolist()) for row in alive] == literal.alive
            assert torch.equal(state.mask[:, 0], literal.mask())
        weight = weight - 0.05 * grad
        masks.append(state.mask)
    return masks


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("text", "blocks"), [("2:4", 12), ("1:4", 12), ("4:8", 3)])
def test_combinations_leave_in_the_order_of_the_criterion(criterion, text, blocks):
    pattern = Pattern.parse(text)
    method = LBC(criterion=criterion, momentum=MOMENTUM, score_decay=DECAY)
    masks = run(method, pattern, blocks, LiteralCriterion(criterion, blocks, pattern))
    assert (masks[STEPS // 2 - 1].sum(-1) == pattern.n).all()
    assert torch.equal(masks[-1], masks[STEPS // 2 - 1])


def test_the_four_criteria_come_to_different_masks():
    last = [run(LBC(criterion=criterion), Pattern(2, 4), 12)[-1] for criterion in CRITERIA]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(last, 2))


def test_the_trained_score_is_the_default():
    assert LBC().criterion == "score"
    pattern, blocks = Pattern(2, 4), 12
    run(LBC(), pattern, blocks, LiteralCriterion("score", blocks, pattern))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_an_unfinished_state_is_concluded_by_the_same_criterion(criterion):
    # By score (-w g summed up) 0 and 1 are best, by magnitude 0 and 2, by gradient 1 and 2.
    weight = torch.tensor([[[9.0, 2.0, 8.0, 4.0]]])
    grad = torch.tensor([[[-1.0, -3.0, 2.0, 0.5]]])
    method, pattern = LBC(criterion=criterion, t_f=1.0, score_decay=0.0), Pattern(2, 4)
    state = method.update(weight, grad, method.init(weight, pattern), pattern, Clock(0, 1000, 0.1)).state
    assert state.mask.all()
    kept = method.conclude(weight, state, pattern).mask.flatten().nonzero().flatten().tolist()
    assert kept == {"score": [0, 1], "inverse": [2, 3], "magnitude": [0, 2], "gradient": [1, 2]}[criterion]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_counts_as_none(value):
    weight, grad = torch.ones(1, 1, 4), torch.tensor([[[1.0, value, 3.0, 2.0]]])
    method, pattern = LBC(criterion="gradient", t_f=0.25), Pattern(2, 4)
    state = method.update(weight, grad, method.init(weight, pattern), pattern, Clock(0, 4, 0.1)).state
    assert state.mask.flatten().tolist() == [False, False, True, True]


def test_a_criterion_that_is_none_is_refused_with_the_ones_that_are():
    with pytest.raises(
        MethodError, match=r"^lbc: criterion='taylor' is none of score, inverse, magnitude, gradient\.$"
    ):
        make_method("lbc", {"criterion": "taylor"})
