"""RigL within blocks (Evci et al., ICML 2020) as a plain loop, and the static random mask that it starts from."""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from handles import nm
from torch import nn
from torch.nn import functional as F

import nmgraph
from nmgraph.methods.contract import Clock
from nmgraph.methods.rigl import RigL
from nmgraph.methods.static import Static
from nmgraph.nm.pattern import Pattern

TOTAL, INTERVAL, LR, DROP = 60, 5, 0.02, 0.4
LAST_CHANGE = 40  # 45 is three quarters of all steps, and no change comes then


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(32, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False)).double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 32, generator=generator, dtype=torch.float64)
    return x, torch.sin(x[:, :8] + x[:, 8:16] - x[:, 16:24])


def loss_of(y, target):
    return (y - target).square().sum(1).mean()


def converted(pattern="2:4", **options):
    options = {"interval": INTERVAL, "drop": DROP, **options}
    model = nmgraph.convert(network(), method="rigl", pattern=pattern, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    nmgraph.attach(model, optimizer, total_steps=TOTAL)
    return model, optimizer


def layers(model):
    return model[0], model[2]


def masks_of(model):
    return [nm(layer).mask().clone() for layer in layers(model)]  # a copy: it is the buffer that is trained


def train(model, optimizer, before_step=lambda t: None, after_step=lambda t: None):
    for t in range(TOTAL):
        optimizer.zero_grad()
        x, target = batch(t)
        loss_of(model(x), target).backward()
        before_step(t)
        optimizer.step()
        after_step(t)


def literal_change(w, mask, g, n, m, step):
    """Drop the f(t) smallest of the layer's kept weights, and grow as many in each block by |G|."""
    share = DROP / 2 * (1 + math.cos(math.pi * step / (0.75 * TOTAL)))
    kept = [(abs(w[r, c].item()), r, c) for r in range(w.shape[0]) for c in range(w.shape[1]) if mask[r, c]]
    new = mask.clone()
    for _, r, c in sorted(kept)[: int(share * len(kept))]:
        new[r, c] = False
    for r in range(w.shape[0]):
        for start in range(0, w.shape[1], m):
            empty = [c for c in range(start, start + m) if not new[r, c]]  # those just dropped among them
            for c in sorted(empty, key=lambda c: (-abs(g[r, c].item()), not mask[r, c], c))[: n - (m - len(empty))]:
                new[r, c] = True
    return new


def literal_run(ws, masks, n, m):
    """Train with SGD and momentum 0.9; give effective weights, masks and momenta after every step."""
    vs, history = [torch.zeros_like(w) for w in ws], []
    for t in range(TOTAL):
        used = [(w * b).requires_grad_() for w, b in zip(ws, masks, strict=True)]
        x, target = batch(t)
        loss_of(F.linear(F.linear(x, used[0]).tanh(), used[1]), target).backward()
        for i, g in enumerate(u.grad for u in used):
            if t in range(INTERVAL, LAST_CHANGE + 1, INTERVAL):
                new = literal_change(ws[i], masks[i], g, n, m, t)
                grown = new & ~masks[i]
                ws[i], vs[i], masks[i] = ws[i].masked_fill(grown, 0.0), vs[i].masked_fill(grown, 0.0), new
            vs[i] = 0.9 * vs[i] + g * masks[i]
            ws[i] = ws[i] - LR * vs[i]
        history.append([(w * b, b, v * b) for w, b, v in zip(ws, masks, vs, strict=True)])
    return history


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 16)])
def test_a_whole_run_is_that_of_the_plain_loop(n, m):
    model, optimizer = converted(f"{n}:{m}")
    start = [nm(layer).raw.detach().clone() for layer in layers(model)]
    expected = literal_run(start, masks_of(model), n, m)

    def compare(t):
        for layer, (w, b, v) in zip(layers(model), expected[t], strict=True):
            assert torch.equal(nm(layer).mask(), b), f"mask after step {t}"
            torch.testing.assert_close(layer.weight.detach(), w, rtol=1e-9, atol=1e-11)
            momentum = optimizer.state[nm(layer).raw]["momentum_buffer"]
            torch.testing.assert_close(momentum * b, v, rtol=1e-9, atol=1e-11)

    train(model, optimizer, after_step=compare)
    changed = [not torch.equal(expected[t][0][1], expected[t - 1][0][1]) for t in range(1, TOTAL)]
    assert sum(changed) >= 3


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 16)])
def test_every_block_keeps_n_at_every_step(n, m):
    model, optimizer = converted(f"{n}:{m}", drop=1.0)
    seen = [set(), set()]

    def after_step(t):
        for masks, mask in zip(seen, masks_of(model), strict=True):
            assert (mask.unflatten(-1, (-1, m)).sum(-1) == n).all()
            masks.add(mask.numpy().tobytes())

    train(model, optimizer, after_step=after_step)
    assert all(len(masks) > 3 for masks in seen)


def test_masks_change_every_interval_until_the_end_of_the_phase_and_never_after():
    model, optimizer = converted()
    history = [masks_of(model)]
    train(model, optimizer, after_step=lambda t: history.append(masks_of(model)))
    changed = [
        t for t in range(TOTAL) if any(not torch.equal(a, b) for a, b in zip(history[t], history[t + 1], strict=True))
    ]
    assert changed[0] == INTERVAL  # not on the very first step
    assert set(changed) <= set(range(INTERVAL, LAST_CHANGE + 1, INTERVAL))
    assert len(changed) > 5


@pytest.mark.parametrize("t_f", [0.0, 0.5, 41 / 60, 1.0])
def test_changes_come_before_the_end_of_the_phase(t_f):
    method = RigL(interval=10, t_f=t_f)
    expected = [t for t in (10, 20, 30, 40, 50) if t < t_f * 60]
    assert [t for t in range(60) if method.changes(Clock(t, 60, LR))] == expected


def test_backward_is_masked_except_on_the_step_of_a_change_and_the_optimizer_gets_it_masked():
    model, optimizer = converted()
    dense_on = []

    def before_step(t):
        outside = [nm(layer).raw.grad[~nm(layer).mask()] for layer in layers(model)]
        if all(bool(g.all()) for g in outside):
            dense_on.append(t)
        else:
            assert not any(bool(g.any()) for g in outside)

    def in_optimizer(*_):
        for layer in layers(model):
            assert not nm(layer).raw.grad[~nm(layer).mask()].any()

    optimizer.register_step_pre_hook(in_optimizer)
    train(model, optimizer, before_step=before_step)
    assert dense_on == list(range(INTERVAL, LAST_CHANGE + 1, INTERVAL))


def test_new_weights_start_at_zero_without_momentum_and_those_that_stay_go_on():
    model, optimizer = converted()
    noted, grown_in_all = {}, 0

    def before_step(t):
        noted["masks"] = masks_of(model)
        noted["raw"] = [nm(layer).raw.detach().clone() for layer in layers(model)]
        noted["momentum"] = [
            optimizer.state[nm(layer).raw]["momentum_buffer"].clone() if t else None for layer in layers(model)
        ]

    def in_optimizer(*_):
        nonlocal grown_in_all
        for layer, before, raw, momentum in zip(layers(model), *noted.values(), strict=True):
            grown = nm(layer).mask() & ~before
            grown_in_all += int(grown.sum())
            assert torch.equal(nm(layer).raw.detach(), raw.masked_fill(grown, 0.0))
            if momentum is not None:
                now = optimizer.state[nm(layer).raw]["momentum_buffer"]
                assert torch.equal(now, momentum.masked_fill(grown, 0.0))

    optimizer.register_step_pre_hook(in_optimizer)
    train(model, optimizer, before_step=before_step)
    assert grown_in_all > 20


# --- one change, on weights made for it


def change(method, w, grad, mask, n, step):
    """Change the mask of ``[O, C]`` once; give the update."""
    pattern = Pattern(n, 4)
    state = method.init(w.unsqueeze(1), pattern)._replace(mask=mask.unsqueeze(1), dense=torch.tensor(True))
    return method.update(w.unsqueeze(1), grad.unsqueeze(1), state, pattern, Clock(step, TOTAL, LR))


@pytest.mark.parametrize("step", [5, 10, 20, 30, 40])
@pytest.mark.parametrize("drop", [0.3, 1.0])
def test_the_share_that_is_dropped_falls_on_a_cosine(step, drop):
    torch.manual_seed(step)
    w = torch.randn(32, 32)
    mask = torch.tensor([True, False, False, False]).repeat(32, 8)
    gradient = (~mask).float()  # whatever is dropped finds a better place in its block
    update = change(RigL(interval=5, drop=drop, t_f=0.75), w, gradient, mask, 1, step)
    dropped = mask & ~update.state.mask.squeeze(1)
    count = int(drop / 2 * (1 + math.cos(math.pi * step / 45)) * 256)
    assert int(dropped.sum()) == count
    assert w[dropped].abs().max() <= w[mask & ~dropped].abs().min()  # the smallest of the layer, not of a block


def test_a_dropped_weight_with_the_largest_gradient_comes_back_as_it_was():
    w = torch.tensor([[0.1, 0.9, 0.0, 0.0, 5.0, 6.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False, False, True, True, False, False]])
    gradient = torch.tensor([[3.0, 0.0, 2.0, 1.0, 0.0, 0.0, 9.0, 9.0]])
    update = change(RigL(interval=5, drop=1.0, t_f=0.75), w, gradient, mask, 2, 22)  # not a step of a change
    assert torch.equal(update.state.mask.squeeze(1), mask)
    # Half of the kept four are dropped at the middle of the cosine: 0.1 and 0.9.
    update = change(RigL(interval=1, drop=1.0, t_f=44 / 60), w, gradient, mask, 2, 22)
    assert update.state.mask.squeeze(1).tolist() == [[True, False, True, False, True, True, False, False]]
    assert update.restart.squeeze(1).tolist() == [[False, False, True, False, False, False, False, False]]


# --- static


PATTERN = Pattern(2, 4)


def drawn(seed, shape=(8, 1, 16), pattern=PATTERN, weight_seed=7):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(weight_seed))
    return Static(seed=seed).init(w, pattern).mask


def test_a_static_mask_never_moves_while_its_weights_do():
    model = nmgraph.convert(network(), method="static")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    nmgraph.attach(model, optimizer, total_steps=TOTAL)
    first, raw = masks_of(model), [nm(layer).raw.detach().clone() for layer in layers(model)]

    def after_step(t):
        assert all(torch.equal(a, b) for a, b in zip(masks_of(model), first, strict=True))

    train(model, optimizer, after_step=after_step)
    for layer, mask, before in zip(layers(model), first, raw, strict=True):
        assert (nm(layer).raw[mask] != before[mask]).all()
        assert torch.equal(nm(layer).raw[~mask], before[~mask])
        assert not layer.weight[~mask].any()


def test_a_static_layer_trains_as_a_dense_one_under_the_same_mask():
    ours, dense = nmgraph.convert(network(), method="static", pattern="1:4"), network()
    for layer, mask in zip(layers(dense), masks_of(ours), strict=True):
        layer.weight.data *= mask
        layer.weight.register_hook(lambda grad, mask=mask: grad * mask)
    for model in (ours, dense):
        train(model, torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9))
    for layer, other in zip(layers(ours), layers(dense), strict=True):
        torch.testing.assert_close(layer.weight.detach(), other.weight.detach(), rtol=1e-12, atol=1e-14)


def test_the_same_seed_gives_the_same_mask_and_another_one_another():
    assert torch.equal(drawn(0), drawn(0))
    assert len({drawn(seed).numpy().tobytes() for seed in range(20)}) == 20


def test_layers_with_other_weights_get_other_masks():
    assert not torch.equal(drawn(0, weight_seed=7), drawn(0, weight_seed=8))


def test_drawing_a_mask_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    drawn(0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 16)])
def test_masks_are_uniform_over_places_and_over_pairs_of_places(n, m):
    drawn_BM = torch.cat([drawn(seed, (32, 2, 16), Pattern(n, m)).reshape(-1, m) for seed in range(20)]).double()
    assert (drawn_BM.sum(1) == n).all()
    count = len(drawn_BM)
    for share, expected in [
        (drawn_BM.mean(0), n / m),
        ((drawn_BM.T @ drawn_BM / count)[~torch.eye(m, dtype=torch.bool)], n * (n - 1) / (m * (m - 1))),
    ]:
        assert (share - expected).abs().max() <= 5 * math.sqrt(expected * (1 - expected) / count)


def test_neighbouring_blocks_are_drawn_apart():
    blocks = drawn(0, (512, 1, 16)).reshape(512, 4, 4)
    pairs = Counter((tuple(a.tolist()), tuple(b.tolist())) for row in blocks for a, b in pairwise(row))
    assert len(pairs) == 36  # each of the six with each of the six
    assert max(pairs.values()) < 3 * min(pairs.values())
