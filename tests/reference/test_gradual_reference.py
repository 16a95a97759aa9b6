"""Keep counts on a curve: gradual pruning (Zhu & Gupta, 2017), and SR-STE on the schedule of LBC's Table 5."""

import math
from fractions import Fraction

import pytest
import torch
from handles import nm
from torch import nn
from torch.nn import functional as F

import nmgraph
from nmgraph.methods.contract import Clock
from nmgraph.methods.gradual import Gradual
from nmgraph.methods.srste import SRSTE
from nmgraph.nm.pattern import Pattern

TOTAL = 16

# Weights kept of a block at 0, 1/8, ..., 1 of the phase, worked out by hand: M - round((M - N) x) and
# M - round((M - N) (1 - (1 - x)^3)), halves up. 4:8 at 1/2, cubic: 4 * 7/8 = 3.5, so 4 are pruned.
TABLE = {
    ("2:4", "linear"): [4, 4, 3, 3, 3, 3, 2, 2, 2],
    ("2:4", "cubic"): [4, 3, 3, 2, 2, 2, 2, 2, 2],
    ("1:4", "linear"): [4, 4, 3, 3, 2, 2, 2, 1, 1],
    ("1:4", "cubic"): [4, 3, 2, 2, 1, 1, 1, 1, 1],
    ("1:16", "linear"): [16, 14, 12, 10, 8, 7, 5, 3, 1],
    ("1:16", "cubic"): [16, 11, 7, 5, 3, 2, 1, 1, 1],
    ("4:8", "linear"): [8, 7, 7, 6, 6, 5, 5, 4, 4],
    ("4:8", "cubic"): [8, 7, 6, 5, 4, 4, 4, 4, 4],
}
ROWS = [pytest.param(*key, row, id="-".join(key)) for key, row in TABLE.items()]


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8))


def layers(model):
    return model[0], model[2]


def batch(step):
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
    return x, torch.sin(x[:, :8] + x[:, 8:16])


def converted(method, **options):
    total = options.pop("total", TOTAL)
    model = nmgraph.convert(network(), method=method, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    nmgraph.attach(model, optimizer, total_steps=total)
    return model, optimizer


def train(model, optimizer, steps=TOTAL, before_step=lambda t: None, after_step=lambda t: None):
    for t in range(steps):
        optimizer.zero_grad()
        x, target = batch(t)
        F.mse_loss(model(x), target).backward()
        before_step(t)
        optimizer.step()
        after_step(t)


def kept_of_blocks(layer):
    """Count the weights of every block that the layer multiplies by; all blocks must agree."""
    counts = (layer.weight.detach() != 0).unflatten(-1, (-1, nm(layer).told.pattern.m)).sum(-1)
    assert int(counts.min()) == int(counts.max())
    return int(counts.max())


def literal_mask(weight, allowed, keep, m):
    """Keep the largest magnitudes of every block among those allowed."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], m):
            places = [c for c in range(start, start + m) if allowed[row, c]]
            for c in sorted(places, key=lambda c: (-abs(weight[row, c].item()), c))[:keep]:
                mask[row, c] = True
    return mask


def literal_keep(done, total, start, end, curve, n, m):
    """Weights kept once so many steps are done, halves rounded up; the phase is in fractions of all steps."""
    progress, start, end = Fraction(done, total), Fraction(start), Fraction(end)
    if progress >= end:
        return n
    x = max(Fraction(0), (progress - start) / (end - start))
    pruned = (m - n) * (x if curve == "linear" else 1 - (1 - x) ** 3)
    return m - math.floor(pruned + Fraction(1, 2))


# --- gradual


@pytest.mark.parametrize("base", ["asp", "srste"])
@pytest.mark.parametrize(("pattern", "curve", "row"), ROWS)
def test_keep_counts_are_those_of_the_curve(base, pattern, curve, row):
    model, optimizer = converted("gradual", pattern=pattern, base=base, curve=curve, t_f=0.5, interval=1)
    seen = [kept_of_blocks(model[0])]
    train(model, optimizer, after_step=lambda t: seen.append(kept_of_blocks(model[0])))
    assert seen == row + [row[-1]] * (TOTAL - 8)
    assert kept_of_blocks(model[2]) == row[-1]


def test_a_later_beginning_keeps_everything_until_then():
    model, optimizer = converted("gradual", pattern="1:16", t_i=0.25, t_f=0.75, interval=1)
    seen = [kept_of_blocks(model[0])]
    train(model, optimizer, after_step=lambda t: seen.append(kept_of_blocks(model[0])))
    assert seen == [16] * 4 + TABLE["1:16", "cubic"] + [1] * 4


def test_pruning_comes_every_interval_and_at_the_end():
    model, optimizer = converted("gradual", pattern="1:16", curve="linear", t_f=0.5, interval=3)
    seen = [kept_of_blocks(model[0])]
    train(model, optimizer, after_step=lambda t: seen.append(kept_of_blocks(model[0])))
    row = TABLE["1:16", "linear"]
    assert seen == [16] * 3 + [row[3]] * 3 + [row[6]] * 2 + [1] * 9


def test_hard_pruning_keeps_the_largest_of_those_still_kept_and_regrows_nothing():
    model, optimizer = converted("gradual", pattern="1:16", base="asp", t_f=0.75, interval=2)
    before = {}
    would_regrow = 0

    def before_step(t):
        for layer in layers(model):
            before[layer] = nm(layer).raw.detach().clone(), nm(layer).mask().clone()

    def after_step(t):
        nonlocal would_regrow
        for layer, (raw, mask) in before.items():
            keep, kept = int(nm(layer).mask()[0, :16].sum()), int(mask[0, :16].sum())
            assert keep <= kept
            assert torch.equal(nm(layer).mask(), literal_mask(raw, mask, keep, 16) if keep < kept else mask)
            free_choice = literal_mask(nm(layer).raw.detach(), torch.ones_like(mask), keep, 16)
            would_regrow += int((free_choice & ~mask).sum())

    train(model, optimizer, before_step=before_step, after_step=after_step)
    assert would_regrow > 0  # a choice among all weights would have brought some back


def test_hard_pruning_masks_the_gradient():
    model, optimizer = converted("gradual", pattern="2:4", base="asp", t_f=0.5, interval=1)
    train(model, optimizer, 6)
    F.mse_loss(model(batch(6)[0]), batch(6)[1]).backward()
    for layer in layers(model):
        assert not nm(layer).raw.grad[~nm(layer).mask()].any()
        assert nm(layer).raw.grad[nm(layer).mask()].all()


def pruned_once(weights, mask, keep, step, fresh=False):
    """Prune one block by one update; at step 2 its count goes from 3 to 2."""
    w, method, pattern = torch.tensor([[weights]]), Gradual(interval=1, t_f=0.5), Pattern(2, 4)
    state = method.init(w, pattern)._replace(mask=torch.tensor([[mask]]), keep=torch.tensor(keep))
    clock = Clock(step, TOTAL, 0.1, fresh)
    return method.update(w, torch.ones_like(w), state, pattern, clock).state.mask.flatten().tolist()


def test_a_kept_weight_of_exactly_zero_stays_kept_after_resuming():
    mask = [False, False, True, True]
    assert pruned_once([0.9, 0.5, 0.0, 0.7], mask, 2, 12, fresh=True) == mask


def test_a_kept_weight_of_exactly_zero_counts_as_kept_when_more_is_pruned():
    pruned = pruned_once([0.9, 0.0, 0.0, 0.7], [False, True, True, True], 3, 2)
    assert pruned == [False, True, False, True]


@pytest.mark.parametrize("curve", ["linear", "cubic"])
@pytest.mark.parametrize(("t_i", "t_f"), [(0.0, 0.5), (0.25, 0.75), (0.5, 0.5)])
def test_gradual_srste_is_srste_with_the_same_keep_count(curve, t_i, t_f):
    options = {"pattern": "1:4", "curve": curve, "t_i": t_i, "t_f": t_f, "decay": 0.1}
    gradual = converted("gradual", base="srste", interval=1, **options)
    srste = converted("srste", **options)
    for _ in range(TOTAL):
        for model, optimizer in (gradual, srste):
            train(model, optimizer, 1)
        for ours, theirs in zip(layers(gradual[0]), layers(srste[0]), strict=True):
            assert int(ours.nm_keep) == int(theirs.nm_keep)
            assert torch.equal(nm(ours).raw, nm(theirs).raw)
            assert torch.equal(ours.weight, theirs.weight)
    assert int(ours.nm_keep) == 1


# --- SR-STE with a gradual phase

SCHEDULES = [(0.0, 0.0), (0.0, 0.25), (0.0, 0.5), (0.25, 0.5)]  # (0, 0), (0, 30), (0, 60), (30, 60) of 120 epochs


@pytest.mark.parametrize(("t_i", "t_f"), SCHEDULES)
@pytest.mark.parametrize("curve", ["cubic", "linear"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 16), (4, 8)])
def test_srste_keeps_what_the_schedule_of_lbc_says(t_i, t_f, curve, n, m):
    method, pattern, w = SRSTE(t_i=t_i, t_f=t_f, curve=curve), Pattern(n, m), torch.randn(2, 1, 16)
    state = method.init(w, pattern)
    for done in range(121):
        expected = literal_keep(done, 120, t_i, t_f, curve, n, m)
        assert int(state.keep) == expected, done
        assert (method.mask(w, state, pattern).unflatten(-1, (-1, m)).sum(-1) == expected).all()
        state = method.update(w, torch.zeros_like(w), state, pattern, Clock(done, 120, 0.1)).state


@pytest.mark.parametrize(("pattern", "curve", "row"), ROWS)
def test_srste_multiplies_by_as_many_weights_as_the_curve_says(pattern, curve, row):
    model, optimizer = converted("srste", pattern=pattern, curve=curve, t_f=0.5)
    seen, kept = [kept_of_blocks(model[0])], [int(model[0].nm_keep)]

    def after_step(t):
        seen.append(kept_of_blocks(model[0]))
        kept.append(int(model[0].nm_keep))

    train(model, optimizer, after_step=after_step)
    assert seen == kept == row + [row[-1]] * (TOTAL - 8)


def test_only_weights_that_are_masked_at_the_moment_decay():
    decay = 0.5
    model, optimizer = converted("srste", pattern="1:4", t_f=0.5, decay=decay)
    noted, decayed = {}, []

    def before_step(t):
        for layer in layers(model):
            everything = torch.ones_like(nm(layer).raw, dtype=torch.bool)
            keep = TABLE["1:4", "cubic"][min(t, 8)]
            mask = literal_mask(nm(layer).raw.detach(), everything, keep, 4)
            noted[layer] = nm(layer).raw.grad + decay * nm(layer).raw.detach().masked_fill(mask, 0.0)
            decayed.append(int((~mask).sum()) / mask.numel())

    def in_optimizer(*_):
        for layer, expected in noted.items():
            assert torch.equal(nm(layer).raw.grad, expected)

    optimizer.register_step_pre_hook(in_optimizer)
    train(model, optimizer, before_step=before_step)
    assert decayed[0] == 0.0  # all of them are kept in the first forward
    assert decayed[-1] == 0.75


class StraightThrough(torch.autograd.Function):
    """SR-STE's forward as it was before there was a gradual phase: N of M by a number, not by a tensor."""

    @staticmethod
    def forward(ctx, weight, mask):
        return weight.masked_fill(~mask, 0.0)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def n_largest(weight, n, m):
    magnitudes = weight.detach().abs().unflatten(-1, (-1, m))
    order = magnitudes.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(magnitudes, dtype=torch.bool).scatter(-1, order[..., :n], True).flatten(-2)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 16)])
def test_without_a_gradual_phase_srste_is_what_it_was_bit_for_bit(n, m):
    ours, optimizer = converted("srste", pattern=f"{n}:{m}", decay=0.01)
    first, second = former = [layer for layer in network() if isinstance(layer, nn.Linear)]
    parameters = [p for layer in former for p in layer.parameters()]
    sgd = torch.optim.SGD(parameters, lr=0.2, momentum=0.9)

    def former_step(t):
        sgd.zero_grad()
        x, target = batch(t)
        masks = [n_largest(layer.weight, n, m) for layer in former]
        hidden = F.linear(x, StraightThrough.apply(first.weight, masks[0]), first.bias).tanh()
        F.mse_loss(F.linear(hidden, StraightThrough.apply(second.weight, masks[1]), second.bias), target).backward()
        for layer, mask in zip(former, masks, strict=True):
            layer.weight.grad += 0.01 * layer.weight.detach().masked_fill(mask, 0.0)
        sgd.step()
        for layer, other in zip(layers(ours), former, strict=True):
            assert torch.equal(nm(layer).raw, other.weight), t
            assert torch.equal(layer.bias, other.bias)

    train(ours, optimizer, after_step=former_step)


def test_only_a_decay_or_a_gradual_phase_needs_the_step_hook():
    assert not SRSTE(decay=0.0).needs_attach
    assert SRSTE(decay=0.0, t_f=0.5).needs_attach
