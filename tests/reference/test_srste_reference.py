"""SR-STE in training: the optimizer gets G + λ (1 - B) W (Zhou et al., ICLR 2021, Eq. 9), once, however it is reached."""

import copy

import pytest
import torch
from handles import nm
from torch import nn
from torch.nn import functional as F

import nmgraph

DECAY = 0.3  # far above the paper's, so that a factor missing or doubled shows
SCALE = 2.0**10


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 4)).double()


def literal_mask(weight):
    """Keep the 2 largest magnitudes of every 4 input channels, one output channel and kernel position at a time."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    rows = weight.reshape(*weight.shape[:2], -1)
    flags = mask.view(*weight.shape[:2], -1)
    for o in range(rows.shape[0]):
        for s in range(rows.shape[2]):
            for c in range(0, rows.shape[1], 4):
                ranked = sorted(range(c, c + 4), key=lambda i: (-abs(rows[o, i, s].item()), i))
                flags[o, ranked[:2], s] = True
    return mask


def literal_gradients(dense, x, target):
    """Differentiate the loss at the masked weights by plain autograd, and add the decay by hand."""
    masked = copy.deepcopy(dense)
    layers = [m for m in masked if isinstance(m, nn.Conv2d | nn.Linear)]
    originals = [layer.weight.detach().clone() for layer in layers]
    for layer in layers:
        layer.weight.data = layer.weight.data * literal_mask(layer.weight.data)
    F.mse_loss(masked(x), target).backward()
    return [layer.weight.grad + DECAY * (~literal_mask(w) * w) for layer, w in zip(layers, originals, strict=True)]


def batch(size):
    generator = torch.Generator().manual_seed(2)
    x, target = torch.randn(8, 8, 4, 4, generator=generator), torch.randn(8, 4, generator=generator)
    return x.double().repeat(size // 8, 1, 1, 1), target.double().repeat(size // 8, 1)


def gradients_used(optimizer_of, *, micro_batches=1, scaled=False, clipped=False, size=8):
    """Take one step of the converted network; give the gradients left behind, and by how much weights moved."""
    model = nmgraph.convert(network(), method="srste", decay=DECAY)
    raw = [nm(model[0]).raw, nm(model[3]).raw]
    before = [p.detach().clone() for p in raw]
    optimizer = optimizer_of(model.parameters())
    nmgraph.attach(model, optimizer, total_steps=10)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=SCALE, enabled=scaled)
    x, target = batch(size)
    for part, wanted in zip(x.chunk(micro_batches), target.chunk(micro_batches), strict=True):
        scaler.scale(F.mse_loss(model(part), wanted) / micro_batches).backward()
    if clipped:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
    scaler.step(optimizer)
    return [p.grad for p in raw], [b - p.detach() for b, p in zip(before, raw, strict=True)]


def close(actual, expected):
    return all(torch.allclose(a, e, rtol=1e-9, atol=1e-12) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("scaled", [False, True])
def test_sgd_gets_the_decay_once(micro_batches, scaled):
    grads, moved = gradients_used(lambda p: torch.optim.SGD(p, lr=0.5), micro_batches=micro_batches, scaled=scaled)
    expected = literal_gradients(network(), *batch(8))
    assert close(grads, expected)
    assert close(moved, [0.5 * g for g in expected])


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("clipped", [False, True])
def test_a_fused_sgd_that_unscales_in_its_kernel_gets_the_decay_once(micro_batches, clipped):
    _, moved = gradients_used(
        lambda p: torch.optim.SGD(p, lr=0.5, fused=True), micro_batches=micro_batches, scaled=True, clipped=clipped
    )
    assert close(moved, [0.5 * g for g in literal_gradients(network(), *batch(8))])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}], ids=["fused", "foreach", "plain"])
def test_adam_gets_the_decay_once(scaled, options):
    # A large eps makes Adam's first step nearly proportional to the gradient, so that its scale shows.
    _, moved = gradients_used(lambda p: torch.optim.Adam(p, lr=0.5, eps=10.0, **options), scaled=scaled)
    expected = [0.5 * g / (g.abs() + 10.0) for g in literal_gradients(network(), *batch(8))]
    assert close(moved, expected)


def test_clipping_an_unscaled_gradient_comes_before_the_decay():
    grads, _ = gradients_used(lambda p: torch.optim.SGD(p, lr=0.5), scaled=True, clipped=True)
    assert close(grads, literal_gradients(network(), *batch(8)))


def test_the_decay_does_not_depend_on_the_batch_size():
    sgd = lambda p: torch.optim.SGD(p, lr=0.5)  # noqa: E731
    assert close(gradients_used(sgd, size=8)[0], gradients_used(sgd, size=64)[0])


def test_without_decay_the_gradient_passes_straight_through():
    model = nmgraph.convert(network(), method="srste", decay=0.0)
    x, target = batch(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    nmgraph.attach(model, optimizer, total_steps=10)
    F.mse_loss(model(x), target).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))
    dropped = ~literal_mask(nm(model[3]).raw.detach())
    assert (nm(model[3]).raw.grad[dropped] != 0).all()
