"""MaxQ against loops: block order, two soft queries, and the gradient (Xiang et al., CVPR 2024, and the official code)."""

import copy
import itertools
import math

import pytest
import torch
from handles import nm
from torch import nn
from torch.nn import functional as F

import nmgraph
from nmgraph.methods.contract import Clock
from nmgraph.methods.maxq import MaxQ, MaxQState
from nmgraph.nm.grouping import canonical
from nmgraph.nm.pattern import Pattern

DECAY = 0.3  # far above the paper's, so that a factor missing or doubled shows
TEMPERATURE = 0.01
PATTERNS = ["2:4", "1:4", "1:16"]


def literal_blocks(shape, m):
    """List every block of a weight: the indices [o, c, ...] of M neighbours along the input channels."""
    kernel = [range(size) for size in shape[2:]]
    places = itertools.product(range(shape[0]), range(0, shape[1], m), *kernel)
    return [[(o, c + i, *position) for i in range(m)] for o, c, *position in places]


def literal_support(weight, pattern, share):
    """Keep N of each block, but all of the int(share G) blocks of the smallest L1 norm."""
    blocks = literal_blocks(weight.shape, pattern.m)
    by_norm = sorted(range(len(blocks)), key=lambda k: sum(abs(weight[i].item()) for i in blocks[k]))
    dense = set(by_norm[: int(share * len(blocks))])
    support = torch.zeros_like(weight, dtype=torch.bool)
    for k, block in enumerate(blocks):
        ranked = sorted(block, key=lambda i: -abs(weight[i].item()))
        for index in block if k in dense else ranked[: pattern.n]:
            support[index] = True
    return support


def literal_query(values, pattern):
    """Weigh the largest N/M of a list by how far they are above the threshold; the others get 0."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    q = int((pattern.m - pattern.n) / pattern.m * len(values))
    threshold = (values[order[q - 1]] + values[order[q]]) / 2
    query = [0.0] * len(values)
    for i in order[q:]:
        query[i] = 1 / (1 + math.exp(-(values[i] - threshold) / TEMPERATURE))
    return query


def literal_factor(weight, pattern):
    """Add to 1 the query within each filter and, where there are several, within each kernel position."""
    factor = torch.ones_like(weight)
    for o in range(len(weight)):
        factor[o] += torch.tensor(literal_query(weight[o].abs().flatten().tolist(), pattern)).reshape(weight[o].shape)
    positions = weight[0, 0].numel()
    if positions > 1:
        flat = weight.reshape(*weight.shape[:2], positions)
        for s in range(positions):
            query = torch.tensor(literal_query(flat[..., s].abs().flatten().tolist(), pattern))
            factor.view_as(flat)[..., s] += query.reshape(weight.shape[:2])
    return factor


def weight_of(*shape):
    return 0.05 * torch.randn(shape, dtype=torch.float64)


def state_of(share):
    return MaxQState(torch.tensor(share))


def network(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 4)).to(dtype)


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    x, target = torch.randn(8, 8, 4, 4, generator=generator), torch.randn(8, 4, generator=generator)
    return x.to(dtype), target.to(dtype)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("share", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("shape", [(3, 16, 2, 3), (4, 32, 3), (5, 16, 1, 1), (6, 32)])
def test_the_layer_multiplies_by_the_literal_mask(pattern, share, shape):
    pattern, weight = Pattern.parse(pattern), weight_of(*shape)
    value = MaxQ().operand(canonical(weight), state_of(share), pattern).forward
    expected = weight * literal_support(weight, pattern, share) * literal_factor(weight, pattern)
    # Queries are computed in float32, and divided by the temperature.
    assert torch.allclose(value, canonical(expected), rtol=1e-5, atol=1e-12)
    assert torch.equal(value != 0, canonical(expected) != 0)


def test_a_query_by_hand():
    weight = torch.tensor([[[0.1, -0.31, 0.2, 0.34]]], dtype=torch.float64)
    value = MaxQ().operand(weight, state_of(0.0), Pattern(2, 4)).forward
    # Half of the row lies below (0.2 + 0.31) / 2 = 0.255; 0.31 is 5.5 temperatures above it, 0.34 is 8.5.
    expected = [0.0, -0.31 * (1 + 1 / (1 + math.exp(-5.5))), 0.0, 0.34 * (1 + 1 / (1 + math.exp(-8.5)))]
    assert value.flatten().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_support_is_n_of_m_once_no_block_is_dense(pattern):
    pattern, weight = Pattern.parse(pattern), weight_of(4, 16, 3, 3)
    mask = MaxQ().mask(canonical(weight), state_of(0.0), pattern)
    assert torch.equal(mask, canonical(literal_support(weight, pattern, 0.0)))
    assert (mask.reshape(-1, pattern.m).sum(1) == pattern.n).all()


@pytest.mark.parametrize("share", [1.0, 0.99, 0.5, 0.3, 0.1, 0.0])
def test_the_blocks_of_the_smallest_norm_stay_dense_the_longest(share):
    # Eight blocks; the norm of the k-th is 4 times this.
    norms = [5.0, 2.0, 8.0, 1.0, 7.0, 3.0, 6.0, 4.0]
    weight = torch.tensor(norms).reshape(2, 2, 2, 1).expand(2, 2, 2, 4).flatten(-2)
    mask = MaxQ().mask(weight, state_of(share), Pattern(2, 4)).reshape(8, 4)
    dense = {1.0: 8, 0.99: 7, 0.5: 4, 0.3: 2, 0.1: 0, 0.0: 0}[share]  # int(share * 8)
    assert [norm for norm, row in zip(norms, mask, strict=True) if row.all()] == [n for n in norms if n <= dense]
    assert all(int(row.sum()) in (2, 4) for row in mask)


@pytest.mark.parametrize(("shape", "most"), [((8, 16, 3, 3), 3.0), ((8, 16, 1, 1), 2.0), ((8, 16), 2.0)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_mask_is_0_or_between_1_and_3_and_at_most_2_without_kernel_positions(shape, most, pattern):
    weight = weight_of(*shape)
    value = canonical(weight).clone()
    factor = MaxQ().operand(value, state_of(0.0), Pattern.parse(pattern)).forward / value
    kept = factor[factor != 0]
    assert ((kept > 1 - 1e-6) & (kept < most + 1e-6)).all()
    assert kept.max() > most - 0.2
    # A query of a weight that is above its threshold is at least a half.
    assert not ((kept > 1 + 1e-6) & (kept < 1.5 - 1e-6)).any()


def gradients_used(dense_phase, micro_batches, scaled):
    """Take one step; give layers, raw weights before it, and the gradients that the optimizer used."""
    t_i = 0.9 if dense_phase else 0.0
    model = nmgraph.convert(network(), method="maxq", decay=DECAY, t_i=t_i, t_f=t_i)
    dense = copy.deepcopy(network())
    layers, plain = [model[0], model[3]], [dense[0], dense[3]]
    for ours, theirs in zip(layers, plain, strict=True):
        theirs.weight.data = ours.weight.detach().clone()
    raw = [nm(layer).raw.detach().clone() for layer in layers]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    nmgraph.attach(model, optimizer, total_steps=10)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=1024.0, enabled=scaled)
    x, target = batch()
    for part, wanted in zip(x.chunk(micro_batches), target.chunk(micro_batches), strict=True):
        scaler.scale(F.mse_loss(model(part), wanted) / micro_batches).backward()
    scaler.step(optimizer)
    F.mse_loss(dense(x), target).backward()
    moved = [(before - nm(layer).raw.detach()) / 0.5 for before, layer in zip(raw, layers, strict=True)]
    return raw, [layer.weight.grad for layer in plain], moved


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_gradient_passes_straight_through_and_masked_weights_decay_once(micro_batches, scaled):
    # No factor of the mask, which lies between 1 and 3, is on the gradient.
    for raw, grad, moved in zip(*gradients_used(False, micro_batches, scaled), strict=True):
        decayed = DECAY * raw * ~literal_support(raw, Pattern(2, 4), 0.0)
        assert torch.allclose(moved, grad + decayed, rtol=1e-9, atol=1e-12)
        assert decayed.abs().max() > 0.01


def test_nothing_decays_while_every_block_is_dense():
    for _, grad, moved in zip(*gradients_used(True, 1, False), strict=True):
        assert torch.allclose(moved, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_folded_network_gives_the_same_outputs(dtype):
    model = nmgraph.convert(network(dtype), method="maxq", pattern="1:4", t_f=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    nmgraph.attach(model, optimizer, total_steps=4)
    x, target = batch(dtype)
    for _ in range(4):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()
    folded = nmgraph.finalize(model)
    assert type(folded[0]) is nn.Conv2d
    assert torch.equal(folded(x), model(x))
    assert nmgraph.verify(folded).holds
    raw = nm(model[0]).raw.detach()
    support = literal_support(raw, Pattern(1, 4), 0.0)
    assert torch.equal(folded[0].weight != 0, support)
    assert not torch.allclose(folded[0].weight[support], raw[support], rtol=0.1)  # the query is folded in


@pytest.mark.parametrize(
    ("curve", "dense"),
    [
        ("cosine", lambda x: math.cos(math.pi * x / 2)),
        ("cubic", lambda x: (1 - x) ** 3),
        ("linear", lambda x: 1 - x),
    ],
)
@pytest.mark.parametrize(("t_i", "t_f"), [(0.0, 0.75), (0.25, 0.5), (0.0, 1.0)])
def test_the_dense_share_follows_its_curve(curve, dense, t_i, t_f):
    method, weight, pattern = MaxQ(curve=curve, t_i=t_i, t_f=t_f), weight_of(8, 1, 16), Pattern(2, 4)
    state = method.init(weight, pattern)
    assert float(state.dense_share) == 1.0
    for step in range(16):
        state = method.update(weight, torch.zeros_like(weight), state, pattern, Clock(step, 16, 0.1)).state
        progress = (step + 1) / 16
        expected = 1.0 if progress <= t_i else 0.0 if progress >= t_f else dense((progress - t_i) / (t_f - t_i))
        assert float(state.dense_share) == pytest.approx(expected, abs=1e-6)
        whole = method.mask(weight, state, pattern).reshape(-1, 4).all(1)
        assert int(whole.sum()) == int(float(state.dense_share) * 32)
        assert (method.unfinished(weight, state, pattern) is None) == (not whole.any())
    assert method.unfinished(weight, state, pattern) is None


def test_an_unfinished_state_is_concluded_by_making_every_block_sparse():
    method, weight, pattern = MaxQ(), weight_of(4, 1, 16), Pattern(2, 4)
    concluded = method.conclude(weight, state_of(0.5), pattern)
    assert method.unfinished(weight, concluded, pattern) is None
