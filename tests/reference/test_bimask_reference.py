"""Bi-Mask against the literal method: Eq. 8 to 11, one weight at a time (Zhang et al., ICML 2023)."""

import copy
import math

import pytest
import torch
from handles import nm
from torch import nn
from torch.nn import functional as F

import nmgraph
from nmgraph.layers.masked import Training, sparsify
from nmgraph.layers.recipe import Recipe
from nmgraph.methods.bimask import BiMask
from nmgraph.methods.contract import Clock
from nmgraph.nm.grouping import FLAT, canonical
from nmgraph.nm.masks import magnitude_mask
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.permutation import eligible_blocks, kept_weights
from nmgraph.nm.randomness import generator, seed_of

DECAY = 0.3  # far above the paper's, so that a factor missing or doubled shows
RATE, MOMENTUM = 0.1, 0.9
N, M = 2, 4


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 6, 3, stride=2), nn.Tanh(), nn.Flatten(),
        nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 4),
    ).double()  # fmt: skip


def batch(step, size=8):
    source = torch.Generator().manual_seed(step)
    x, target = torch.randn(8, 4, 5, 5, generator=source), torch.randn(8, 4, generator=source)
    return x.double().repeat(size // 8, 1, 1, 1), target.double().repeat(size // 8, 1)


def layers_of(model):
    return [m for m in model if isinstance(m, nn.Conv2d | nn.Linear)]


def literal_forward_mask(weight, n=N, m=M):
    """Keep the n largest magnitudes of every m input channels, one output and kernel position at a time."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    rows, flags = weight.reshape(*weight.shape[:2], -1), mask.view(*weight.shape[:2], -1)
    for o in range(rows.shape[0]):
        for s in range(rows.shape[2]):
            for c in range(0, rows.shape[1], m):
                ranked = sorted(range(c, c + m), key=lambda i: (-abs(rows[o, i, s].item()), i))
                flags[o, ranked[:n], s] = True
    return mask


def literal_backward_mask(scores_PK, live_PK, n=N, m=M):
    """Keep in each column the n highest live scores of every m permuted rows (Eq. 11)."""
    kept = torch.zeros_like(live_PK)
    for k in range(live_PK.shape[1]):
        for start in range(0, live_PK.shape[0], m):
            alive = [row for row in range(start, min(start + m, live_PK.shape[0])) if live_PK[row, k]]
            kept[sorted(alive, key=lambda row: (-scores_PK[row, k].item(), row))[:n], k] = True
    return kept


class LiteralBiLinear(torch.autograd.Function):
    """Multiply by ``B ⊙ W``; send dX through the backward mask of the permuted rows, and all of dW to W."""

    @staticmethod
    def forward(ctx, x, weight, mask, permutation):
        ctx.save_for_backward(x, weight * mask, mask, permutation)
        return x @ (weight * mask).T

    @staticmethod
    def backward(ctx, dy):
        x, masked, mask, permutation = ctx.saved_tensors
        permuted = masked[permutation]
        kept = literal_backward_mask(permuted.abs(), mask[permutation])  # Eq. 11
        dx = dy[..., permutation] @ (kept * permuted)  # Eq. 10
        return dx, dy.flatten(0, -2).T @ x.flatten(0, -2), None, None


def literal_layer(layer, x, mask, permutation):
    """Run a linear layer, or a convolution as a product with its unfolded input."""
    if isinstance(layer, nn.Linear):
        return LiteralBiLinear.apply(x, layer.weight, mask, permutation) + layer.bias
    patches = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).transpose(1, 2)
    y = LiteralBiLinear.apply(patches, layer.weight.flatten(1), mask.flatten(1), permutation) + layer.bias
    side = math.isqrt(patches.shape[1])
    return y.transpose(1, 2).reshape(len(x), -1, side, side)


def literal_loss(dense, permutations, x, target):
    waiting = iter(permutations)
    for module in dense:
        if isinstance(module, nn.Conv2d | nn.Linear):
            x = literal_layer(module, x, literal_forward_mask(module.weight.detach()), next(waiting))
        else:
            x = module(x)
    return F.mse_loss(x, target)


def add_decay(layers):
    for layer in layers:
        layer.weight.grad += DECAY * (~literal_forward_mask(layer.weight.detach()) * layer.weight.detach())


def literal_score(mask, order, objective):
    counts = torch.stack([part.sum(0) for part in mask.flatten(1)[order].split(M)])
    return int((counts <= N).sum() if objective == "blocks" else counts.clamp(max=N).sum())


def literal_choice(mask, seed, step, candidates, objective):
    """Draw the candidates of a step, and count what each leaves of every column block."""
    source = generator(seed, step)
    drawn = [torch.randperm(len(mask), generator=source) for _ in range(candidates)]
    scores = [literal_score(mask, order, objective) for order in drawn]
    return drawn[scores.index(max(scores))]


def literal_swaps(mask, order, seed, step, rounds, objective):
    """Pair the blocks of a step anew each round, and make of every pair's swaps the best, if it is worth anything."""
    source, order = generator(seed, step), order.tolist()
    slots = torch.arange(len(order)).split(M)
    for drawn in [torch.randperm(len(slots), generator=source).tolist() for _ in range(rounds)]:
        for first, second in zip(drawn[::2], drawn[1::2], strict=False):
            tried = []
            for i in slots[first].tolist():
                for j in slots[second].tolist():
                    swapped = [*order]
                    swapped[i], swapped[j] = order[j], order[i]
                    tried.append((literal_score(mask, swapped, objective), swapped))
            best = max(tried, key=lambda each: each[0])
            if best[0] > literal_score(mask, order, objective):
                order = best[1]
    return torch.tensor(order)


def one_layer(layer, axis=1, steps=1, pattern="2:4", **options):
    """Make a masked layer whose rows are permuted already."""
    recipe = Recipe(BiMask(**options), Pattern.parse(pattern), axis)
    sparsify(layer, "weight", "layer", recipe, Training())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    nmgraph.attach(layer, optimizer, total_steps=10)
    for _ in range(steps):
        optimizer.step()
    return layer


def attached(model, lr=RATE, total_steps=50, **options):
    model = nmgraph.convert(model, method="bimask", pattern="2:4", **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)
    nmgraph.attach(model, optimizer, total_steps=total_steps)
    return model, optimizer


def train(model, optimizer, steps):
    for step in steps:
        x, target = batch(step)
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()


@pytest.mark.parametrize("outputs", [8, 10])  # whole blocks of rows, and a short last one
def test_the_input_gradient_of_a_linear_layer_is_that_of_the_permuted_form(outputs):
    layer = one_layer(nn.Linear(12, outputs).double(), search="random")
    order = nm(layer).state.permutation
    assert not torch.equal(order, torch.arange(outputs))
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(5, outputs, dtype=torch.float64)
    layer(x).backward(dy)
    mask = literal_forward_mask(nm(layer).raw.detach())
    permuted = (mask * nm(layer).raw.detach())[order]
    kept = literal_backward_mask(permuted.abs(), mask[order])
    assert torch.allclose(x.grad, dy[:, order] @ (kept * permuted), rtol=1e-12, atol=1e-14)
    own_order = torch.zeros_like(mask)
    own_order[order] = kept
    assert torch.allclose(x.grad, dy @ (own_order * mask * nm(layer).raw.detach()), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(x.grad, dy @ (mask * nm(layer).raw.detach()))


@pytest.mark.parametrize("axis", [1, FLAT])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_input_gradient_of_a_convolution_is_that_of_its_unfolded_product(stride, axis):
    layer = one_layer(nn.Conv2d(4, 10, 3, stride=stride, padding=1, bias=False).double(), axis)
    order = nm(layer).state.permutation
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    weight = nm(layer).raw.detach()
    mask_OK = literal_forward_mask(weight if axis == 1 else weight.flatten(1)).flatten(1)
    permuted = (mask_OK * weight.flatten(1))[order]
    kept = literal_backward_mask(permuted.abs(), mask_OK[order])
    patches = dy.flatten(2)[:, order].transpose(1, 2) @ (kept * permuted)
    expected = F.fold(patches.transpose(1, 2), (5, 5), 3, padding=1, stride=stride)
    assert torch.allclose(x.grad, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:16"])
@pytest.mark.parametrize("criterion", ["weight", "gradient", "multinomial", "random"])
def test_the_backward_mask_lies_inside_the_forward_one_and_is_n_m_on_permuted_rows(pattern, criterion):
    layer = nn.Conv2d(16, 38, 3).double()
    layer.weight.grad = torch.randn_like(layer.weight)
    layer = one_layer(layer, pattern=pattern, criterion=criterion)
    operand, pattern = nm(layer).operand(), Pattern.parse(pattern)
    forward, backward = canonical(operand.forward.detach()), canonical(operand.backward)
    live = forward != 0
    assert torch.equal(live, magnitude_mask(canonical(nm(layer).raw.detach()), pattern))
    assert torch.equal(backward, forward * (backward != 0))
    order = nm(layer).state.permutation
    parts = zip((backward != 0)[order].split(pattern.m), live[order].split(pattern.m), strict=True)
    assert all(torch.equal(kept.sum(0), alive.sum(0).clamp(max=pattern.n)) for kept, alive in parts)


@pytest.mark.parametrize("search", ["random", "swap"])
@pytest.mark.parametrize("objective", ["blocks", "kept"])
def test_training_equals_the_literal_method_step_by_step(objective, search):
    interval, candidates = 2, 7
    options = {"interval": interval, "candidates": candidates, "objective": objective, "search": search}
    model, optimizer = attached(network(), decay=DECAY, seed=5, **options)
    dense = network()
    own = torch.optim.SGD(dense.parameters(), lr=RATE, momentum=MOMENTUM)
    literal, sparse = layers_of(dense), layers_of(model)
    seeds = [seed_of(canonical(layer.weight), 5) for layer in literal]
    permutations = [torch.arange(len(layer.weight)) for layer in literal]
    for step in range(5):
        x, target = batch(step)
        own.zero_grad()
        literal_loss(dense, permutations, x, target).backward()
        add_decay(literal)
        if step % interval == 0:
            masks = [literal_forward_mask(layer.weight.detach()) for layer in literal]
            permutations = [
                literal_choice(mask, seed, step, candidates, objective)
                if search == "random"
                else literal_swaps(mask, order, seed, step, candidates, objective)
                for mask, order, seed in zip(masks, permutations, seeds, strict=True)
            ]
        own.step()
        train(model, optimizer, [step])
        for layer, expected, order in zip(sparse, literal, permutations, strict=True):
            assert torch.allclose(nm(layer).raw.grad, expected.weight.grad, rtol=1e-9, atol=1e-12)
            assert torch.allclose(nm(layer).raw.detach(), expected.weight, rtol=1e-9, atol=1e-12)
            assert torch.equal(nm(layer).state.permutation, order)
    assert not all(torch.equal(order, torch.arange(len(order))) for order in permutations)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", [8, 64])
def test_the_weight_gets_its_dense_gradient_and_the_decay_once(micro_batches, scaled, size):
    model, optimizer = attached(network(), decay=DECAY)
    dense = network()
    literal = layers_of(dense)
    literal_loss(dense, [torch.arange(len(layer.weight)) for layer in literal], *batch(0)).backward()
    add_decay(literal)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10, enabled=scaled)
    x, target = batch(0, size)
    for part, wanted in zip(x.chunk(micro_batches), target.chunk(micro_batches), strict=True):
        scaler.scale(F.mse_loss(model(part), wanted) / micro_batches).backward()
    scaler.step(optimizer)
    for layer, expected in zip(layers_of(model), literal, strict=True):
        assert torch.allclose(nm(layer).raw.grad, expected.weight.grad, rtol=1e-9, atol=1e-12)
        assert (nm(layer).raw.grad[~nm(layer).mask()] != 0).all()


@pytest.mark.parametrize("objective", ["blocks", "kept"])
def test_a_permutation_is_chosen_every_interval_steps_and_at_no_other(objective):
    model, optimizer = attached(network(), interval=3, search="random", candidates=5, objective=objective)
    layers, changed = layers_of(model), []
    seeds = [seed_of(canonical(nm(layer).raw.detach()), 0) for layer in layers]
    assert all(torch.equal(nm(layer).state.permutation, torch.arange(len(nm(layer).raw))) for layer in layers)
    for step in range(8):
        before = [nm(layer).state.permutation.clone() for layer in layers]
        masks = [nm(layer).mask() for layer in layers]
        train(model, optimizer, [step])
        same = [torch.equal(nm(layer).state.permutation, old) for layer, old in zip(layers, before, strict=True)]
        if not any(same):
            changed.append(step)
            for layer, mask, seed in zip(layers, masks, seeds, strict=True):
                assert torch.equal(nm(layer).state.permutation, literal_choice(mask, seed, step, 5, objective))
        else:
            assert all(same)
    assert changed == [0, 3, 6]


@pytest.mark.parametrize("objective", ["blocks", "kept"])
def test_swaps_go_on_from_the_present_permutation_and_leave_more_than_random_ones(objective):
    score = {"blocks": eligible_blocks, "kept": kept_weights}[objective]
    pattern, weight = Pattern(2, 4), torch.randn(64, 1, 64)
    mask, left = magnitude_mask(weight, pattern), {}
    for search, candidates in (("swap", 3), ("random", 100)):
        method = BiMask(search=search, candidates=candidates, interval=1, objective=objective)
        state, left[search] = method.init(weight, pattern), []
        for step in range(8):
            state = method.update(weight, torch.zeros_like(weight), state, pattern, Clock(step, 10, 0.1)).state
            left[search].append(score(mask, state.permutation, pattern))
    assert left["swap"] == sorted(left["swap"])
    assert left["swap"][0] < left["swap"][3]
    assert left["swap"][3] > max(left["random"])
    assert left["random"] != sorted(left["random"])


@pytest.mark.parametrize("search", ["swap", "random"])
def test_each_objective_is_served_best_by_its_own_choice(search):
    pattern, left = Pattern(1, 4), {"blocks": [0, 0], "kept": [0, 0]}
    for _ in range(8):
        weight = torch.randn(16, 1, 32)
        mask = magnitude_mask(weight, pattern)
        for objective, sums in left.items():
            method = BiMask(objective=objective, search=search, candidates=50)
            state = method.init(weight, pattern)
            order = method.update(weight, weight, state, pattern, Clock(0, 10, 0.1)).state.permutation
            sums[0] += eligible_blocks(mask, order, pattern)
            sums[1] += kept_weights(mask, order, pattern)
    assert left["blocks"][0] > left["kept"][0]
    assert left["kept"][1] > left["blocks"][1]


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_gradient_criterion_ranks_by_the_whole_unscaled_gradient(micro_batches, scaled):
    model, optimizer = attached(network(), decay=DECAY, criterion="gradient", lr=0.0)
    layers, dense = layers_of(model), network()
    literal = layers_of(dense)
    literal_loss(dense, [torch.arange(len(layer.weight)) for layer in literal], *batch(0)).backward()
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10, enabled=scaled)
    x, target = batch(0)
    for part, wanted in zip(x.chunk(micro_batches), target.chunk(micro_batches), strict=True):
        scaler.scale(F.mse_loss(model(part), wanted) / micro_batches).backward()
    scaler.step(optimizer)
    for layer, expected in zip(layers, literal, strict=True):
        order, mask = nm(layer).state.permutation, nm(layer).mask().flatten(1)
        kept = torch.zeros_like(mask)
        kept[order] = literal_backward_mask(expected.weight.grad.abs().float().flatten(1)[order], mask[order])
        assert torch.equal(nm(layer).operand().backward.flatten(1) != 0, kept)


def test_a_gradient_that_is_not_finite_ranks_last():
    method, pattern = BiMask(criterion="gradient", permute=False), Pattern(1, 4)
    weight = torch.tensor([[4.0, 0.1, 0.1, 0.1]]).repeat(4, 1).unsqueeze(1)  # column 0 is live in all four rows
    for value in (torch.nan, torch.inf, -torch.inf):
        grad = torch.full_like(weight, value)
        grad[2] = 1e-3
        state = method.update(weight, grad, method.init(weight, pattern), pattern, Clock(0, 10, 0.1)).state
        assert method.operand(weight, state, pattern).backward[:, 0, 0].tolist() == [0.0, 0.0, 4.0, 0.0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("criterion", "chances"), [("multinomial", [0.1, 0.2, 0.3, 0.4]), ("random", [0.25, 0.25, 0.25, 0.25])]
)
def test_the_drawn_criteria_keep_weights_as_often_as_they_should(criterion, chances, sign):
    method, pattern = BiMask(criterion=criterion), Pattern(1, 4)
    weight = torch.full((4, 500, 4), 0.1)
    weight[:, :, 2] = sign * torch.tensor([1.0, 2.0, 3.0, 4.0]).unsqueeze(1)  # live in every row: one of four is kept
    state, counts = method.init(weight, pattern), torch.zeros(4)
    for step in range(40):
        state = method.update(weight, torch.ones_like(weight), state, pattern, Clock(step, 100, 0.1)).state
        kept = method.operand(weight, state, pattern).backward != 0
        assert (kept[:, :, 2].sum(0) == 1).all()
        counts += kept[:, :, 2].sum(1)
    assert (counts / 20_000 - torch.tensor(chances)).abs().max() < 0.012  # 3.5 standard deviations


def test_the_multinomial_criterion_samples_without_replacement():
    # Of magnitudes 1, 2, 3, 4, two drawn one after the other: row i is among them with these chances.
    w = [0.1, 0.2, 0.3, 0.4]
    chances = [w[i] + sum(w[j] * w[i] / (1 - w[j]) for j in range(4) if j != i) for i in range(4)]
    method, pattern = BiMask(criterion="multinomial", permute=False), Pattern(2, 4)
    weight = torch.full((4, 20_000, 4), 0.01)
    weight[:, :, 1:3] = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1)
    zero = torch.zeros_like(weight)
    state = method.update(weight, zero, method.init(weight, pattern), pattern, Clock(0, 10, 0.1)).state
    kept = method.operand(weight, state, pattern).backward[:, :, 1:3] != 0
    assert (kept.float().mean((1, 2)) - torch.tensor(chances)).abs().max() < 0.01


@pytest.mark.parametrize("criterion", ["multinomial", "random"])
def test_every_step_and_every_layer_draws_anew(criterion):
    method, pattern = BiMask(criterion=criterion), Pattern(2, 4)
    first, second = torch.randn(8, 2, 8), torch.randn(8, 2, 8)
    drawn = []
    for weight, step in [(first, 0), (first, 1), (second, 0)]:
        state = method.update(weight, weight, method.init(weight, pattern), pattern, Clock(step, 10, 0.1)).state
        drawn.append(state.salience / (weight.abs() if criterion == "multinomial" else 1.0))
    assert not torch.allclose(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2])


@pytest.mark.parametrize("criterion", ["gradient", "multinomial", "random"])
def test_before_the_first_step_every_criterion_ranks_by_magnitude(criterion):
    weight, pattern = torch.randn(10, 3, 8), Pattern(2, 4)
    operands = [m.operand(weight, m.init(weight, pattern), pattern) for m in (BiMask(criterion=criterion), BiMask())]
    assert torch.equal(operands[0].backward, operands[1].backward)
    assert not torch.equal(operands[0].backward, operands[0].forward)


def test_without_the_backward_mask_it_is_srste_to_the_last_bit():
    states = []
    for method, options in [("bimask", {"backward_mask": False}), ("srste", {})]:
        model = nmgraph.convert(network(), method=method, decay=DECAY, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
        nmgraph.attach(model, optimizer, total_steps=50)
        train(model, optimizer, range(6))
        states.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    model, optimizer = attached(network(), decay=DECAY)
    train(model, optimizer, range(6))
    assert not any(torch.equal(a, p) for a, p in zip(states[0], model.parameters(), strict=True))


def test_without_permuting_the_rows_stay_in_their_order():
    model, optimizer = attached(network(), interval=1, permute=False)
    dense = network()
    literal = layers_of(dense)
    literal_loss(dense, [torch.arange(len(layer.weight)) for layer in literal], *batch(0)).backward()
    train(model, optimizer, [0])
    for layer, expected in zip(layers_of(model), literal, strict=True):
        assert torch.equal(nm(layer).state.permutation, torch.arange(len(nm(layer).raw)))
        decayed = 2e-4 * (~literal_forward_mask(expected.weight.detach()) * expected.weight.detach())
        assert torch.allclose(nm(layer).raw.grad, expected.weight.grad + decayed, rtol=1e-9, atol=1e-12)
    train(model, optimizer, range(1, 4))
    assert all(torch.equal(nm(layer).state.permutation, torch.arange(len(nm(layer).raw))) for layer in layers_of(model))


@pytest.mark.parametrize("criterion", ["weight", "multinomial", "random"])
def test_a_seed_decides_the_run(criterion):
    runs = []
    for seed in (3, 3, 4):
        model, optimizer = attached(
            network(), interval=2, search="random", candidates=5, criterion=criterion, seed=seed
        )
        torch.manual_seed(len(runs))  # the global generator has no say
        train(model, optimizer, range(5))
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


@pytest.mark.parametrize("search", ["swap", "random"])
@pytest.mark.parametrize("criterion", ["weight", "gradient", "multinomial", "random"])
def test_a_copy_taken_in_the_middle_goes_on_as_the_original(criterion, search):
    options = {"interval": 3, "candidates": 5, "criterion": criterion, "search": search}
    model, optimizer = attached(network(), **options)
    train(model, optimizer, range(4))
    resumed, other = attached(network(), **options)
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(4, 8))
    train(resumed, other, range(4, 8))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
