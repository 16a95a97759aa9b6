"""BAME against the formulas of its paper (Yang et al., ICML 2025), written out block by block.

Where the paper leaves a choice, the comment says which reading is held to.
"""

import math
from fractions import Fraction

import pytest
import torch
from handles import nm
from torch import nn
from torch.nn import functional as F

import nmgraph
from nmgraph.methods.bame import BAME
from nmgraph.methods.contract import Clock
from nmgraph.nm.pattern import Pattern

TOTAL, INTERVAL, LR = 60, 4, 0.1
GRADUAL_END, ADAPTION_END = 20, 40  # a third and two thirds of all steps
ADAPTIONS = [20, 24, 28, 32, 36]  # t % ΔT == 0 and T_i <= t < T_f


def network():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(32, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.05)  # small weights, so that growing others is worth it
    return model


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 32, generator=generator, dtype=torch.float64)
    # The answer is a function of x that turns with time, so that weights gain and lose importance.
    return x, torch.sin(x[:, :8] + x[:, 8:16] * math.cos(step / 9) + x[:, 16:24])


def loss_of(y, target):
    return (y - target).square().sum(1).mean()


# --- the paper, literally


def block_places(weight, m):
    """Yield the places of every block: M consecutive weights of a row."""
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], m):
            yield row, slice(start, start + m)


def literal_keep(done, n, m):
    """Linear from M to N over the first T_i steps, every ΔT of them; halves round up."""
    if done >= GRADUAL_END:
        return n
    whole = done // INTERVAL * INTERVAL
    return m - math.floor(Fraction((m - n) * whole, GRADUAL_END) + Fraction(1, 2))


def literal_prune(w, b, keep, m):
    """Keep the largest of those that are kept still."""
    pruned = torch.zeros_like(b)
    for row, places in block_places(w, m):
        magnitude, kept = w[row, places].abs().tolist(), b[row, places].tolist()
        ranked = sorted((j for j in range(m) if kept[j]), key=lambda j: (-magnitude[j], j))
        for j in ranked[:keep]:
            pruned[row, places.start + j] = True
    return pruned


def literal_candidate(w, b, g, n, m, lr=LR, gain="sgd"):
    """Rank by Eq. 4 (kept: |G W|) and Eq. 5 (pruned: η G²), keep N by Eq. 6; of equals, the kept one."""
    candidate = torch.zeros_like(b)
    for row, places in block_places(w, m):
        ws, gs, kept = w[row, places].tolist(), g[row, places].tolist(), b[row, places].tolist()
        worth = []
        for j in range(m):
            if kept[j]:
                worth.append(abs(gs[j] * ws[j]))
            else:
                worth.append(lr * gs[j] ** 2 if gain == "sgd" else lr * abs(gs[j]))
        for j in sorted(range(m), key=lambda j: (-worth[j], not kept[j], j))[:n]:
            candidate[row, places.start + j] = True
    return candidate


def literal_memory(o, before, after, m, gamma):
    """Eq. 7 and 8, for every block."""
    new = []
    for k, (row, places) in enumerate(block_places(before, m)):
        sad = sum(abs(int(p) - int(q)) for p, q in zip(before[row, places], after[row, places], strict=True))
        new.append(gamma * o[k] + (1 - gamma) * sad)
    return new


def largest(values, count):
    return set(sorted(range(len(values)), key=lambda k: (-values[k], k))[:count])


def literal_frozen(w, b, o, m, beta, alpha, combine, thaw):
    """Eq. 9 and 10 by rank, and only blocks that did oscillate."""
    norms = [math.sqrt(sum(v * v for v in (w * b)[row, places].tolist())) for row, places in block_places(w, m)]
    oscillating = {k for k in largest(o, math.floor(beta * len(o))) if o[k] > thaw}
    large = largest(norms, math.floor(alpha * len(norms)))
    return oscillating | large if combine == "or" else oscillating & large


def literal_run(weights, n, m, options):
    """Train with SGD and momentum 0.9; give weights and masks after every step, and what was counted."""
    gamma, beta = options.get("memory", 0.9), options.get("freeze_oscillating", 0.5)
    alpha, combine = options.get("freeze_large", 0.5), options.get("combine", "or")
    changes, gain = options.get("changes", "applied"), options.get("gain", "sgd")
    thaw, averaged = options.get("thaw", 0.0), options.get("score_steps", 1)
    ws = [w.clone() for w in weights]
    bs = [torch.ones_like(w, dtype=torch.bool) for w in ws]
    vs = [torch.zeros_like(w) for w in ws]
    os = [[0.0] * (w.numel() // m) for w in ws]
    recent = [[] for _ in ws]
    history, changed_blocks, frozen_blocks = [], 0, 0
    for t in range(TOTAL):
        used = [(w * b).requires_grad_() for w, b in zip(ws, bs, strict=True)]
        x, target = batch(t)
        loss_of(F.linear(F.linear(x, used[0]).tanh(), used[1]), target).backward()
        for i, dense in enumerate(u.grad for u in used):
            before = bs[i]
            recent[i].append(dense)
            if literal_keep(t + 1, n, m) < literal_keep(t, n, m):
                bs[i] = literal_prune(ws[i], bs[i], literal_keep(t + 1, n, m), m)
            if t in ADAPTIONS:
                g = sum(recent[i][-averaged:]) / averaged
                candidate = literal_candidate(ws[i], bs[i], g, n, m, LR, gain)
                if changes == "candidate":
                    os[i] = literal_memory(os[i], bs[i], candidate, m, gamma)
                frozen = literal_frozen(ws[i], bs[i], os[i], m, beta, alpha, combine, thaw)
                adapted = candidate.clone()
                for k, (row, places) in enumerate(block_places(ws[i], m)):
                    moves = not torch.equal(candidate[row, places], bs[i][row, places])
                    if k in frozen:
                        adapted[row, places] = bs[i][row, places]
                        frozen_blocks += moves
                    else:
                        changed_blocks += moves
                if changes == "applied":
                    os[i] = literal_memory(os[i], bs[i], adapted, m, gamma)
                bs[i] = adapted
            begins_anew = bs[i] != before
            ws[i][begins_anew] = 0.0
            vs[i][begins_anew] = 0.0
            vs[i] = 0.9 * vs[i] + dense * bs[i]
            ws[i] = ws[i] - LR * vs[i]
        history.append(([w.clone() for w in ws], [b.clone() for b in bs], [list(o) for o in os]))
    return history, changed_blocks, frozen_blocks


# --- ours


def converted(pattern="2:4", lr=LR, **options):
    model = nmgraph.convert(network(), method="bame", pattern=pattern, interval=INTERVAL, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    nmgraph.attach(model, optimizer, total_steps=TOTAL)
    return model, optimizer


def train(model, optimizer, steps=range(TOTAL), before_step=lambda t: None, after_step=lambda t: None):
    for t in steps:
        optimizer.zero_grad()
        x, target = batch(t)
        loss_of(model(x), target).backward()
        before_step(t)
        optimizer.step()
        after_step(t)


def layers(model):
    return model[0], model[2]


def masks_of(model):
    return [nm(layer).mask().clone() for layer in layers(model)]  # a copy: it is the buffer that is trained


def history_of_masks(**options):
    """Give every layer's mask before the first and after every step: ``[layer][step]``."""
    model, optimizer = converted(**options)
    seen = [[mask] for mask in masks_of(model)]

    def after_step(t):
        for masks, mask in zip(seen, masks_of(model), strict=True):
            masks.append(mask)

    train(model, optimizer, after_step=after_step)
    return seen


def counts(mask, m):
    return mask.unflatten(-1, (-1, m)).sum(-1)


SOME_FROZEN = {"freeze_oscillating": 0.2, "freeze_large": 0.2}
OPTIONS = [
    {},
    {"memory": 0.5, "combine": "and"},
    {"changes": "candidate", "memory": 0.75},
    {"freeze_oscillating": 0.0, "freeze_large": 0.0},
    {"freeze_oscillating": 0.3, "freeze_large": 0.1, "thaw": 0.05},
    {"gain": "adam"},
    {"score_steps": 3, **SOME_FROZEN},
    {"score_steps": 4, "gain": "adam"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "default")
def test_a_whole_run_is_that_of_the_paper(options):
    compare_runs(2, 4, options)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (4, 8), (1, 16)])
def test_a_whole_run_is_that_of_the_paper_for_every_pattern(n, m):
    compare_runs(n, m, SOME_FROZEN)


def compare_runs(n, m, options):
    model, optimizer = converted(f"{n}:{m}", **options)
    start = [nm(layer).raw.detach().clone() for layer in layers(model)]
    expected, changed, frozen = literal_run(start, n, m, options)
    assert changed >= 4  # or the comparison would say little
    assert frozen >= 4 or options.get("freeze_large") == 0.0

    def compare(t):
        weights, masks, memories = expected[t]
        for layer, w, b, o in zip(layers(model), weights, masks, memories, strict=True):
            assert torch.equal(nm(layer).mask(), b), f"mask after step {t}"
            torch.testing.assert_close(nm(layer).raw.detach() * b, w * b, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(layer.nm_oscillation.flatten().tolist(), o, rtol=1e-6, atol=1e-7)

    train(model, optimizer, after_step=compare)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 16)])
def test_the_keep_count_falls_linearly_and_nothing_is_regrown_meanwhile(n, m):
    for masks in history_of_masks(pattern=f"{n}:{m}"):
        for t in range(GRADUAL_END):
            assert (counts(masks[t + 1], m) == literal_keep(t + 1, n, m)).all()
            assert not (masks[t + 1] & ~masks[t]).any()


def test_the_keep_count_of_one_in_sixteen_is_a_straight_line():
    kept = [BAME(t_i=0.5, interval=1).kept(done, 32, Pattern(1, 16)) for done in range(18)]
    assert kept == [16, 15, 14, 13, 12, 11, 10, 9, 8, 8, 7, 6, 5, 4, 3, 2, 1, 1]  # halves are pruned: 8.5 keeps 8


def test_every_block_keeps_exactly_n_once_the_gradual_phase_is_over():
    for masks in history_of_masks(pattern="2:4", freeze_oscillating=0.0, freeze_large=0.0):
        assert all((counts(mask, 4) == 2).all() for mask in masks[GRADUAL_END:])
        assert len({mask.numpy().tobytes() for mask in masks[GRADUAL_END:]}) > 2


def test_masks_move_on_adaption_steps_alone_and_rest_after_the_last():
    moved = set()
    for masks in history_of_masks(pattern="2:4", **SOME_FROZEN):
        moved |= {t for t in range(GRADUAL_END, TOTAL) if not torch.equal(masks[t], masks[t + 1])}
    assert moved == set(ADAPTIONS)


@pytest.mark.parametrize(
    ("t_i", "t_f", "interval", "total", "expected"),
    [
        (1 / 3, 2 / 3, 4, 60, [20, 24, 28, 32, 36]),
        (0.25, 0.75, 5, 50, [15, 20, 25, 30, 35]),  # 12.5 to 37.5
        (0.2, 0.6, 10, 50, [10, 20]),  # 30 is t_f itself
        (0.5, 0.5, 1, 20, []),
    ],
)
def test_adaptions_come_every_interval_between_both_ends(t_i, t_f, interval, total, expected):
    method = BAME(t_i=t_i, t_f=t_f, interval=interval, score_steps=1)
    assert [t for t in range(total) if method.adapts(t, total)] == expected
    assert [t for t in range(total) if method.scores(t, total)] == expected


@pytest.mark.parametrize("score_steps", [1, 3])
def test_backward_is_masked_except_where_an_adaption_needs_the_dense_gradient(score_steps):
    model, optimizer = converted(score_steps=score_steps)
    dense_steps = {a - back for a in ADAPTIONS for back in range(score_steps)}
    seen = {}

    def before_step(t):
        seen[t] = [(nm(layer).raw.grad[~nm(layer).mask()] != 0).tolist() for layer in layers(model)]

    def in_optimizer(*_):
        for layer in layers(model):
            assert not nm(layer).raw.grad[~nm(layer).mask()].any()
            assert nm(layer).raw.grad[nm(layer).mask()].all()

    optimizer.register_step_pre_hook(in_optimizer)
    train(model, optimizer, before_step=before_step)
    for t in range(8, TOTAL):  # from the first pruning on
        for dropped in seen[t]:
            assert all(dropped) if t in dense_steps else not any(dropped), t
            assert dropped


def test_a_grown_weight_starts_at_zero_and_takes_the_step_that_its_gain_reckons_with():
    model, optimizer = converted(**SOME_FROZEN)
    grown_in_all, pruned_in_all = 0, 0
    noted = {}

    def before_step(t):
        noted["masks"] = masks_of(model)
        noted["grads"] = [nm(layer).raw.grad.clone() for layer in layers(model)]

    def in_optimizer(*_):
        for layer, before in zip(layers(model), noted["masks"], strict=True):
            restarts = nm(layer).mask() ^ before
            assert not nm(layer).raw[restarts].any()
            moments = optimizer.state[nm(layer).raw].get("momentum_buffer")
            assert moments is None or not moments[restarts].any()

    def after_step(t):
        nonlocal grown_in_all, pruned_in_all
        for layer, before, grad in zip(layers(model), noted["masks"], noted["grads"], strict=True):
            grown, pruned = nm(layer).mask() & ~before, before & ~nm(layer).mask()
            assert torch.equal(nm(layer).raw[grown], -LR * grad[grown])
            assert not nm(layer).raw[~nm(layer).mask()].any()  # and stays there
            grown_in_all, pruned_in_all = grown_in_all + int(grown.sum()), pruned_in_all + int(pruned.sum())

    optimizer.register_step_pre_hook(in_optimizer)
    train(model, optimizer, before_step=before_step, after_step=after_step)
    assert grown_in_all > 10
    assert pruned_in_all > grown_in_all


# --- one adaption, on blocks made for it


def adaption(method, w, grad, mask, n=2, oscillation=None, lr=LR, gradient=None, step=ADAPTIONS[0], fresh=False):
    """Adapt blocks ``[K, M]`` once; give the new mask, the moving average and the update."""
    w, grad, mask = (torch.as_tensor(t).unsqueeze(1) for t in (w, grad, mask))
    pattern = Pattern(n, w.shape[-1])
    state = method.init(w, pattern)._replace(mask=mask, keep=torch.tensor(n), dense=torch.tensor(True))
    if oscillation is not None:
        state = state._replace(oscillation=torch.tensor(oscillation).reshape(-1, 1, 1))
    if gradient is not None:
        state = state._replace(gradient=gradient.unsqueeze(1))
    update = method.update(w, grad, state, pattern, Clock(step, TOTAL, lr, fresh))
    return update.state.mask.squeeze(1), update.state.oscillation.flatten().tolist(), update


def free(**options):
    """Make a method in which no block is frozen."""
    return BAME(**{"interval": INTERVAL, "freeze_oscillating": 0.0, "freeze_large": 0.0, **options})


def random_blocks(count, m, n):
    """Give weights, gradients and a random N:M mask, all ``[K, M]``, with gains about as large as losses."""
    w, g = (torch.randn(count, m, dtype=torch.float64) for _ in range(2))
    mask = torch.zeros(count, m, dtype=torch.bool)
    mask.scatter_(1, torch.rand(count, m).argsort(1)[:, :n], True)
    return w * mask * 0.3, g * 3, mask


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (1, 16)])
@pytest.mark.parametrize("gain", ["sgd", "adam"])
def test_the_candidate_is_what_is_worth_most(n, m, gain):
    w, g, mask = random_blocks(200, m, n)
    adapted, _, _ = adaption(free(gain=gain), w, g, mask, n)
    expected = literal_candidate(w, mask, g, n, m, gain=gain)
    assert torch.equal(adapted, expected)
    assert 20 < int((expected != mask).any(1).sum()) < 200
    other = literal_candidate(w, mask, g, n, m, gain="adam" if gain == "sgd" else "sgd")
    assert not torch.equal(other, expected)


def test_worked_example_of_equations_4_to_6():
    w = torch.tensor([[0.5, 0.2, 0.0, 0.0]])
    g = torch.tensor([[1.0, -1.0, 2.0, 1.0]])
    mask = torch.tensor([[True, True, False, False]])
    # Losses 0.5 and 0.2; gains 0.1 * 4 = 0.4 and 0.1 * 1 = 0.1.
    adapted, memory, update = adaption(free(memory=0.75), w, g, mask)
    assert adapted.tolist() == [[True, False, True, False]]
    assert memory == [0.25 * 2]
    assert update.grad.tolist() == [[[1.0, 0.0, 2.0, 0.0]]]
    assert update.restart.tolist() == [[[False, True, True, False]]]


def test_no_block_changes_where_a_grown_weight_would_gain_less_than_is_lost():
    w, g, mask = random_blocks(500, 4, 2)
    losses = (g * w).abs().masked_fill(~mask, math.inf).amin(1)
    gains = (LR * g * g).masked_fill(mask, -math.inf).amax(1)
    adapted, _, _ = adaption(free(), w, g, mask)
    changed = (adapted != mask).any(1)
    assert torch.equal(changed, gains > losses)
    assert changed.any()
    assert not changed.all()


def test_blocks_without_gradient_change_nothing():
    w, g, mask = random_blocks(50, 4, 2)
    adapted, memory, _ = adaption(free(), w, torch.zeros_like(g), mask)
    assert torch.equal(adapted, mask)
    assert memory == [0.0] * 50
    g[::2] = 0.0  # dead ones between others
    adapted, memory, _ = adaption(free(), w, g, mask)
    assert torch.equal(adapted[::2], mask[::2])
    assert not torch.equal(adapted, mask)


def test_of_equal_worth_the_weight_stays_that_is_there():
    w, g = torch.tensor([[0.0, 0.0, 0.5, 0.5]]), torch.tensor([[2.0, 2.0, 1.0, 1.0]])
    mask = torch.tensor([[False, False, True, True]])
    adapted, _, _ = adaption(free(), w, g, mask, lr=0.125)  # 0.125 * 4 == 0.5 * 1
    assert torch.equal(adapted, mask)


# In each of four blocks the second weight gives way to the third, if it may.
SWAP_W = [[s, s / 10, 0.0, 0.0] for s in (1.0, 2.0, 3.0, 4.0)]
SWAP_G = [[9.0, 0.0, 9.0, 0.0]] * 4
SWAP_MASK = [[True, True, False, False]] * 4


def swapped(oscillation=None, **options):
    """Tell which of the four blocks change."""
    adapted, memory, _ = adaption(free(**options), SWAP_W, SWAP_G, SWAP_MASK, oscillation=oscillation)
    assert all(row in ([True, False, True, False], [True, True, False, False]) for row in adapted.tolist())
    return [row[2] for row in adapted.tolist()], memory


def test_without_freezing_every_block_with_a_gain_changes():
    assert swapped()[0] == [True] * 4


def test_large_blocks_keep_their_masks():
    assert swapped(freeze_large=0.5)[0] == [True, True, False, False]
    assert swapped(freeze_large=0.3)[0] == [True, True, True, False]  # floor of 1.2
    assert swapped(freeze_large=1.0)[0] == [False] * 4


def test_what_stands_in_pruned_places_makes_no_block_large():
    weights = [[*row[:3], 99.0] for row in SWAP_W[:2]] + SWAP_W[2:]  # such as an optimizer without a mask leaves
    adapted, _, _ = adaption(free(freeze_large=0.5), weights, SWAP_G, SWAP_MASK)
    assert [row[2] for row in adapted.tolist()] == [True, True, False, False]


def test_a_run_attached_late_prunes_to_its_keep_count_at_once():
    w, _, _ = random_blocks(20, 4, 4)
    for step, kept in ((11, 3), (30, 2)):
        after, _, _ = adaption(free(), w, w, torch.ones(20, 4, dtype=torch.bool), step=step + 1, fresh=True)
        assert torch.equal(after, literal_prune(w, torch.ones(20, 4, dtype=torch.bool), kept, 4))


def test_oscillating_blocks_keep_their_masks():
    assert swapped([0.1, 0.9, 0.0, 0.2], freeze_oscillating=0.5)[0] == [True, False, True, False]
    assert swapped([0.1, 0.9, 0.0, 0.2], freeze_oscillating=0.25)[0] == [True, False, True, True]


def test_a_block_is_frozen_for_either_reason_or_for_both():
    oscillation = [0.9, 0.0, 0.0, 0.9]
    both = {"freeze_oscillating": 0.5, "freeze_large": 0.5}
    assert swapped(oscillation, **both, combine="or")[0] == [False, True, False, False]
    assert swapped(oscillation, **both, combine="and")[0] == [True, True, True, False]


def test_blocks_that_moved_little_thaw():
    oscillation = [0.9, 0.3, 0.2, 0.1]
    options = {"freeze_oscillating": 1.0, "changes": "applied"}
    assert swapped(oscillation, **options)[0] == [False] * 4
    assert swapped(oscillation, **options, thaw=0.25)[0] == [False, False, True, True]
    assert swapped([0.0] * 4, **options)[0] == [True] * 4


def test_a_change_counts_as_it_was_wanted_or_as_it_was_made():
    oscillation = [0.5, 0.0, 0.0, 0.25]
    options = {"freeze_oscillating": 0.25, "memory": 0.5}
    # Wanted by all four: the first has the highest average, whether it counts before or after.
    assert swapped(oscillation, **options, changes="candidate") == ([False, True, True, True], [1.25, 1.0, 1.0, 1.125])
    assert swapped(oscillation, **options, changes="applied") == ([False, True, True, True], [0.25, 1.0, 1.0, 1.125])


def test_a_wanted_change_freezes_its_block_at_once():
    assert swapped(freeze_oscillating=1.0, changes="candidate")[0] == [False] * 4
    assert swapped(freeze_oscillating=1.0, changes="applied")[0] == [True] * 4


def test_the_moving_average_is_that_of_equation_8():
    method, o, mask = (
        free(memory=0.9, freeze_oscillating=0.5, changes="candidate"),
        [0.0] * 30,
        random_blocks(30, 4, 2)[2],
    )
    for _ in range(6):
        w, g, _ = random_blocks(30, 4, 2)
        w = torch.where(mask, torch.randn(30, 4, dtype=torch.float64) * 0.3, 0.0)
        wanted = literal_candidate(w, mask, g, 2, 4)
        expected = literal_memory(o, mask, wanted, 4, 0.9)
        mask, o, _ = adaption(method, w, g, mask, oscillation=o)
        assert o == pytest.approx(expected, rel=1e-6)
    assert len(set(o)) > 5


def test_the_adaption_decides_by_the_mean_of_its_last_gradients():
    torch.manual_seed(4)
    w, g, mask = random_blocks(100, 4, 2)
    others = 3.0 * torch.randn(2, *g.shape, dtype=torch.float64)
    mean = (g + others.sum(0)) / 3
    method, gradient = free(score_steps=3), torch.zeros_like(g)
    for back, grad in ((2, others[0]), (1, others[1])):
        seen, _, update = adaption(method, w, grad, mask, gradient=gradient, step=ADAPTIONS[1] - back)
        gradient = update.state.gradient.squeeze(1)
        assert torch.equal(seen, mask)
        assert torch.equal(update.grad.squeeze(1), grad.masked_fill(~mask, 0.0))
    adapted, _, update = adaption(method, w, g, mask, gradient=gradient, step=ADAPTIONS[1])
    expected = literal_candidate(w, mask, mean, 2, 4)
    assert torch.equal(adapted, expected)
    assert not torch.equal(expected, literal_candidate(w, mask, g, 2, 4))
    assert torch.equal(update.grad.squeeze(1), g.masked_fill(~adapted, 0.0))  # this step's own, not the mean
    assert not update.state.gradient.any()


def test_a_kept_weight_of_exactly_zero_stays_kept_after_resuming():
    w = torch.tensor([[0.0, 0.0, 0.0, 0.7]])  # the third is kept and happens to be 0
    mask = torch.tensor([[False, False, True, True]])
    after, _, _ = adaption(free(), w, torch.ones(1, 4), mask, step=ADAPTIONS[0] + 1, fresh=True)
    assert torch.equal(after, mask)


def test_a_weight_of_exactly_zero_counts_among_those_kept_of_a_gradual_phase():
    method, pattern = BAME(interval=1), Pattern(1, 4)
    w, mask = torch.tensor([[[0.0, 0.0, 0.0, 0.7]]]), torch.tensor([[[False, True, True, True]]])
    state = method.init(w, pattern)._replace(mask=mask, keep=torch.tensor(3))
    for done in range(GRADUAL_END):
        if method.kept(done + 1, TOTAL, pattern) == 2 and method.kept(done, TOTAL, pattern) == 3:
            state = method.update(w, torch.ones_like(w), state, pattern, Clock(done, TOTAL, LR)).state
    assert state.mask.tolist() == [[[False, True, False, True]]]


# --- BAME†


def literal_backward_weight(weight, mask, permutation, n, m):
    """Of every M rows that are neighbours under the permutation, keep the N largest kept weights of a column."""
    kept = torch.zeros_like(weight)
    order = permutation.tolist()
    for column in range(weight.shape[1]):
        for start in range(0, len(order), m):
            live = [row for row in order[start : start + m] if mask[row, column]]
            for row in sorted(live, key=lambda row: -abs(weight[row, column].item()))[:n]:
                kept[row, column] = weight[row, column]
    return kept


@pytest.mark.parametrize("candidates", [0, 10])
@pytest.mark.parametrize("search", ["swap", "random"])
def test_the_input_gradient_of_a_bidirectional_layer_uses_a_weight_that_is_n_of_m_along_rows(search, candidates):
    model, optimizer = converted("2:4", bidirectional=True, search=search, candidates=candidates)
    permutations = []

    def compare(t):
        layer, first = model[2], model[0]
        x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
        seeds = torch.randn(5, 8, dtype=torch.float64)
        y = layer(x)
        forward = nm(layer).raw.detach() * nm(layer).mask()
        torch.testing.assert_close(y, x @ forward.T, rtol=1e-12, atol=1e-13)  # nothing of it in the forward
        order, keep = layer.nm_permutation, literal_keep(t + 1, 2, 4)
        assert sorted(order.tolist()) == list(range(8))
        backward = literal_backward_weight(nm(layer).raw.detach(), nm(layer).mask(), order, keep, 4)
        (got,) = torch.autograd.grad(y, x, seeds)
        torch.testing.assert_close(got, seeds @ backward, rtol=1e-12, atol=1e-13)
        if t >= GRADUAL_END:
            assert ((backward[order] != 0).unflatten(0, (-1, 4)).sum(1) <= 2).all()
            assert (backward != 0).sum() < (forward != 0).sum()
        permutations.append((first.nm_permutation.tolist(), order.tolist()))

    train(model, optimizer, after_step=compare)
    changes = {t for t in range(1, TOTAL) if permutations[t] != permutations[t - 1]}
    if candidates:
        assert changes <= set(range(0, TOTAL, INTERVAL))
        assert changes
    else:
        assert permutations[-1] == (list(range(16)), list(range(8)))


def test_the_backward_mask_changes_the_gradient_of_the_layers_before_it_alone():
    ordinary, optimizer = converted("2:4")
    train(ordinary, optimizer, range(45))
    other, _ = converted("2:4", bidirectional=True)
    for ours, theirs in zip(layers(other), layers(ordinary), strict=True):
        nm(ours).raw.data.copy_(nm(theirs).raw)
        nm(ours).state = nm(ours).state._replace(mask=nm(theirs).state.mask, keep=nm(theirs).state.keep)
    grads = []
    for model in (ordinary, other):
        model.zero_grad()
        x, target = batch(45)
        loss_of(model(x), target).backward()
        grads.append([nm(layer).raw.grad for layer in layers(model)])
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(grads[0][0], grads[1][0])
