"""T-Mask against the literal method: the best transposable mask by trying all, refreshed every 40 steps (Hubara et al., NeurIPS 2021)."""

import itertools

import pytest
import torch
from handles import nm
from torch import nn
from torch.nn import functional as F

import nmgraph
from nmgraph.nm.grouping import canonical
from nmgraph.nm.masks import check_blocks
from nmgraph.nm.pattern import Pattern

RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-3
DECAY = 0.3  # far above any sensible one, so that a factor missing or doubled shows


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(4, 8, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4)).double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x, target = torch.randn(8, 4, 2, 2, generator=generator), torch.randn(8, 4, generator=generator)
    return x.double(), target.double()


def all_masks(n, m):
    rows = [[i in chosen for i in range(m)] for chosen in itertools.combinations(range(m), n)]
    masks = torch.tensor(list(itertools.product(rows, repeat=m)))
    return masks[(masks.sum(1) == n).all(-1)]


def literal_mask(weight, n=2, m=4):
    """Try every mask on every tile of output by input channels, one kernel position at a time."""
    masks = all_masks(n, m)
    kept = torch.zeros_like(weight, dtype=torch.bool)
    matrices, flags = (t.reshape(*t.shape[:2], -1) for t in (weight, kept))
    for s in range(matrices.shape[2]):
        for o in range(0, matrices.shape[0], m):
            for c in range(0, matrices.shape[1], m):
                sums = (matrices[o : o + m, c : c + m, s].abs() * masks).sum((1, 2))
                flags[o : o + m, c : c + m, s] = masks[sums.argmax()]
    return flags.reshape(weight.shape)


def literal_run(steps, interval, decay):
    """Train by hand; give the weights after, and the masks used in, every step."""
    model = network()
    weights = [model[0].weight.detach().clone(), model[3].weight.detach().clone()]
    biases = [model[0].bias.detach().clone(), model[3].bias.detach().clone()]
    masks = [literal_mask(w) for w in weights]
    moments = [torch.zeros_like(p) for p in weights + biases]
    history, used = [], []
    for step in range(steps):
        used.append([mask.clone() for mask in masks])
        x, target = batch(step)
        leaves = [(w * mask).requires_grad_() for w, mask in zip(weights, masks, strict=True)]
        shifts = [b.clone().requires_grad_() for b in biases]
        hidden = F.conv2d(x, leaves[0], shifts[0]).tanh().flatten(1)
        F.mse_loss(F.linear(hidden, leaves[1], shifts[1]), target).backward()
        gradients = [leaf.grad for leaf in leaves + shifts]
        for i, (w, mask) in enumerate(zip(weights, masks, strict=True)):
            gradients[i] = gradients[i] + decay * (~mask * w)
        if step > 0 and step % interval == 0:
            masks = [literal_mask(w) for w in weights]
        for p, v, g in zip(weights + biases, moments, gradients, strict=True):
            v.mul_(MOMENTUM).add_(g + WEIGHT_DECAY * p)
            p.sub_(RATE * v)
        history.append([w.clone() for w in weights])
    return history, used


def converted(**options):
    model = nmgraph.convert(network(), method="tmask", pattern="2:4", **options)
    return model, [model[0], model[3]]


@pytest.mark.parametrize(
    ("steps", "options"), [(90, {}), (90, {"decay": 0.02}), (12, {"interval": 5}), (5, {"interval": 1, "decay": 0.02})]
)
def test_training_equals_the_literal_method_step_by_step(steps, options):
    history, used = literal_run(steps, options.get("interval", 40), options.get("decay", 0.0))
    assert not all(torch.equal(first, last) for first, last in zip(used[0], used[-1], strict=True))
    model, layers = converted(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    nmgraph.attach(model, optimizer, total_steps=steps)
    for step in range(steps):
        assert all(torch.equal(nm(layer).mask(), mask) for layer, mask in zip(layers, used[step], strict=True))
        x, target = batch(step)
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        for layer, weight in zip(layers, history[step], strict=True):
            assert torch.allclose(nm(layer).raw.detach(), weight, rtol=1e-9, atol=1e-12)


def test_the_mask_is_searched_at_steps_40_and_80_and_at_no_other():
    model, layers = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    nmgraph.attach(model, optimizer, total_steps=100)
    changed = []
    for step in range(100):
        with torch.no_grad():
            for layer in layers:
                nm(layer).raw.copy_(torch.randn_like(nm(layer).raw))  # another mask would be best at every step
        before = [nm(layer).mask().clone() for layer in layers]
        optimizer.step()
        if not all(torch.equal(nm(layer).mask(), mask) for layer, mask in zip(layers, before, strict=True)):
            changed.append(step)
            assert all(torch.equal(nm(layer).mask(), literal_mask(nm(layer).raw.detach())) for layer in layers)
    assert changed == [40, 80]


def test_a_weight_that_is_masked_comes_back_when_it_has_grown():
    layer = nmgraph.convert(nn.Sequential(nn.Linear(4, 4, bias=False)), method="tmask", interval=1)[0]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    nmgraph.attach(layer, optimizer, total_steps=10)
    row, column = (~nm(layer).mask()).nonzero()[0].tolist()
    with torch.no_grad():
        nm(layer).raw[row, column] = 100.0
    optimizer.step()
    assert not nm(layer).mask()[row, column]  # step 0 keeps the first mask
    optimizer.step()
    assert nm(layer).mask()[row, column]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize(("kind", "sizes", "shape"), [(nn.Linear, (16, 24), (16,)), (nn.Conv2d, (8, 16, 3), (8, 3, 3))])
def test_forward_and_input_gradient_both_multiply_by_an_n_m_weight(kind, sizes, shape, pattern):
    layer = nn.Sequential(kind(*sizes, bias=False, dtype=torch.float64))
    layer = nmgraph.convert(layer, method="tmask", pattern=pattern)[0]
    outputs, pattern = nm(layer).raw.shape[0], Pattern.parse(pattern)
    # One row of x for every output, and dY the identity: what comes back is the weight of dX = dY W.
    x = torch.zeros(outputs, *shape, dtype=torch.float64, requires_grad=True)
    layer(x).reshape(outputs, outputs).backward(torch.eye(outputs, dtype=torch.float64))
    assert torch.equal(x.grad, layer.weight)
    w_OSC = canonical(x.grad)
    for each in (w_OSC, w_OSC.transpose(0, 2)):
        found = check_blocks(each, pattern)
        assert found.holds
        assert found.density == pattern.density


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_decay_is_added_once_however_a_gradient_is_put_together(micro_batches, scaled):
    model, layers = converted(decay=DECAY)
    dense = network()
    masks = [literal_mask(nm(layer).raw.detach()) for layer in layers]
    for i, mask in zip((0, 3), masks, strict=True):
        dense[i].weight.data *= mask
    x, target = batch(0)
    F.mse_loss(dense(x), target).backward()
    expected = [
        dense[i].weight.grad + DECAY * (~mask * nm(layer).raw.detach())
        for i, mask, layer in zip((0, 3), masks, layers, strict=True)
    ]

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    nmgraph.attach(model, optimizer, total_steps=10)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10, enabled=scaled)
    for part, wanted in zip(x.chunk(micro_batches), target.chunk(micro_batches), strict=True):
        scaler.scale(F.mse_loss(model(part), wanted) / micro_batches).backward()
    scaler.step(optimizer)
    for layer, gradient in zip(layers, expected, strict=True):
        assert torch.allclose(nm(layer).raw.grad, gradient, rtol=1e-9, atol=1e-12)


def test_without_decay_the_gradient_passes_straight_through():
    model, layers = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    nmgraph.attach(model, optimizer, total_steps=10)
    x, target = batch(0)
    F.mse_loss(model(x), target).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))
    assert all((nm(layer).raw.grad[~nm(layer).mask()] != 0).all() for layer in layers)


def test_outputs_that_fill_no_whole_tile_keep_both_ways_n_m():
    layer = nmgraph.convert(nn.Sequential(nn.Linear(8, 10)), method="tmask", pattern="2:4")[0]
    mask = nm(layer).mask()
    assert (mask.reshape(10, 2, 4).sum(-1) == 2).all()
    assert all((part.sum(0) <= 2).all() for part in mask.split(4))
