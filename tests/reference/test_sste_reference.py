"""S-STE against loops: the continuous pruning function, its frozen scale and its gradient (Hu et al., NeurIPS 2024)."""

import copy

import pytest
import torch
from handles import nm
from torch import nn
from torch.nn import functional as F

import nmgraph
from nmgraph.methods.srste import SRSTE
from nmgraph.methods.sste import SSTE, soft_threshold
from nmgraph.nm.pattern import Pattern

PATTERNS = ["2:4", "1:4", "3:4", "4:8", "5:8", "1:16", "1:2"]


def literal_threshold(weight, pattern):
    """Shrink every block of a flat list by the (M-N)-th smallest of its magnitudes."""
    shrunk = []
    for start in range(0, len(weight), pattern.m):
        block = weight[start : start + pattern.m]
        threshold = sorted(abs(w) for w in block)[pattern.m - pattern.n - 1]
        for w in block:
            shrunk.append(0.0 if abs(w) <= threshold else w - threshold if w > 0 else w + threshold)
    return shrunk


def literal_scale(weight, pattern):
    shrunk = literal_threshold(weight, pattern)
    return sum(w * s for w, s in zip(weight, shrunk, strict=True)) / sum(s * s for s in shrunk)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 4)).double()


def batch():
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(8, 8, 4, 4, generator=generator).double(),
        torch.randn(8, 4, generator=generator).double(),
    )


def train(model, steps, lr=0.2):
    x, target = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    nmgraph.attach(model, optimizer, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()


@pytest.mark.parametrize("text", PATTERNS)
def test_the_layer_multiplies_by_the_scaled_soft_threshold(text):
    pattern, weight = Pattern.parse(text), torch.randn(3, 2, 16, dtype=torch.float64)
    method, flat = SSTE(), weight.flatten().tolist()
    state = method.init(weight, pattern)
    assert float(state.scale) == pytest.approx(literal_scale(flat, pattern), rel=1e-5)
    assert soft_threshold(weight, pattern).flatten().tolist() == pytest.approx(literal_threshold(flat, pattern))
    expected = [float(state.scale) * s for s in literal_threshold(flat, pattern)]
    assert method.operand(weight, state, pattern).forward.flatten().tolist() == pytest.approx(expected)


def test_the_soft_threshold_by_hand():
    weight = torch.tensor([[[3.0, -5.0, 1.0, 2.0, -0.5, 0.25, 4.0, -1.0]]])
    assert soft_threshold(weight, Pattern(2, 4)).flatten().tolist() == [1.0, -3.0, 0.0, 0.0, 0.0, 0.0, 3.5, -0.5]
    assert soft_threshold(weight, Pattern(1, 4)).flatten().tolist() == [0.0, -2.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0]
    # <w, s> = 3 + 15 + 14 + 0.5, <s, s> = 1 + 9 + 12.25 + 0.25
    assert float(SSTE().init(weight, Pattern(2, 4)).scale) == pytest.approx(32.5 / 22.5)


@pytest.mark.parametrize("text", PATTERNS)
def test_a_block_keeps_n_and_fewer_where_magnitudes_are_equal(text):
    pattern = Pattern.parse(text)
    method, weight = SSTE(), torch.randn(3, 2, 16)
    state = method.init(weight, pattern)
    assert (method.mask(weight, state, pattern).reshape(-1, pattern.m).sum(1) == pattern.n).all()
    equal = torch.where(torch.rand(3, 2, 16) < 0.5, 0.7, -0.7)
    assert not method.mask(equal, state, pattern).any()
    assert not method.operand(equal, state, pattern).forward.any()
    assert method.unfinished(equal, state, pattern) is None


def test_of_two_equals_at_the_threshold_neither_stays():
    weight = torch.tensor([[[3.0, -2.0, 2.0, 1.0]]])
    shrunk = soft_threshold(weight, Pattern(2, 4))
    assert shrunk.flatten().tolist() == [1.0, 0.0, 0.0, 0.0]
    assert not torch.signbit(shrunk).any()


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.3])
def test_a_small_change_of_the_weights_changes_the_output_by_at_most_twice_that(text, size):
    pattern, generator = Pattern.parse(text), torch.Generator().manual_seed(4)
    # Rounded, so that there are many equals, where a mask would flip.
    weight = (2 * torch.randn(64, 1, 16, generator=generator, dtype=torch.float64)).round()
    change = size * (2 * torch.rand(64, 1, 16, generator=generator, dtype=torch.float64) - 1)
    moved = soft_threshold(weight + change, pattern) - soft_threshold(weight, pattern)
    assert moved.abs().max() <= 2 * size
    assert moved.abs().max() > 0


def test_a_flip_is_a_jump_for_sr_ste_and_none_here():
    pattern = Pattern(2, 4)
    before, after = torch.tensor([[[3.0, 2.0, 1.999, 0.1]]]), torch.tensor([[[3.0, 1.999, 2.0, 0.1]]])
    jumps = {}
    for method in (SRSTE(), SSTE()):
        state = method.init(before, pattern)
        here, there = (method.operand(w, state, pattern).forward for w in (before, after))
        jumps[method.name] = float((here - there).abs().max())
    assert jumps["srste"] == 2.0
    assert 0 < jumps["sste"] < 0.01


def test_the_scale_is_the_least_squares_one():
    pattern, weight = Pattern(1, 4), torch.randn(4, 1, 16, dtype=torch.float64)
    scale = float(SSTE().init(weight, pattern).scale)
    error = lambda b: float((weight - b * soft_threshold(weight, pattern)).square().sum())  # noqa: E731
    assert error(scale) < min(error(scale * 0.99), error(scale * 1.01))
    assert scale > 1


def test_the_scale_stays_as_it_was_at_conversion_in_training_and_through_a_file(tmp_path):
    model = nmgraph.convert(network(), method="sste")
    scales = [layer.nm_scale.clone() for layer in (model[0], model[3])]
    first = nm(model[0]).raw.detach().clone()
    train(model, 10)
    pattern = Pattern(2, 4)
    anew = literal_scale(nm(model[0]).raw.detach().movedim(1, -1).flatten().tolist(), pattern)
    assert not torch.equal(nm(model[0]).raw, first)
    assert abs(anew - float(scales[0])) > 1e-4  # or a scale that is computed anew could not be told from it
    assert [layer.nm_scale for layer in (model[0], model[3])] == scales

    nmgraph.save(model, tmp_path / "model.nm.pt")
    loaded = nmgraph.load(tmp_path / "model.nm.pt")
    assert [layer.nm_scale for layer in (loaded[0], loaded[3])] == scales
    assert torch.equal(loaded(batch()[0]), model(batch()[0]))

    other = nmgraph.convert(network(), method="sste")
    with torch.no_grad():
        nm(other[0]).raw.mul_(2.0)
    other.load_state_dict(model.state_dict())
    assert [layer.nm_scale for layer in (other[0], other[3])] == scales
    finished = nmgraph.finalize(loaded)
    assert torch.equal(finished[0].weight, model[0].weight)


def test_the_gradient_passes_straight_through():
    model, dense = nmgraph.convert(network(), method="sste"), copy.deepcopy(network())
    x, target = batch()
    layers, plain = (model[0], model[3]), (dense[0], dense[3])
    for ours, theirs in zip(layers, plain, strict=True):
        theirs.weight.data = ours.weight.detach().clone()
    for m in (model, dense):
        F.mse_loss(m(x), target).backward()
    for ours, theirs in zip(layers, plain, strict=True):
        # Neither the scale nor the mask is on it.
        assert torch.allclose(nm(ours).raw.grad, theirs.weight.grad, rtol=1e-12, atol=0.0)
        assert (nm(ours).raw.grad[~nm(ours).mask()] != 0).all()
    before = [nm(layer).raw.grad.clone() for layer in layers]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nmgraph.attach(model, optimizer, total_steps=5)
    optimizer.step()
    assert all(torch.equal(b, nm(layer).raw.grad) for b, layer in zip(before, layers, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_weight_of_zeros_gives_zeros_and_still_gets_its_gradient(dtype):
    layer = nn.Linear(8, 4, bias=False).to(dtype)
    nn.init.zeros_(layer.weight)
    model = nmgraph.convert(nn.Sequential(layer), method="sste")
    assert float(model[0].nm_scale) == 1.0
    out = model(torch.ones(2, 8, dtype=dtype))
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 4, dtype=dtype))
    assert torch.equal(nm(model[0]).raw.grad, torch.full((4, 8), 2.0, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ["2:4", "1:16"])
def test_a_half_precision_weight_keeps_its_dtype_and_the_pattern(dtype, text):
    pattern = Pattern.parse(text)
    model = nmgraph.convert(nn.Sequential(nn.Linear(32, 16)), method="sste", pattern=text)
    scale = float(model[0].nm_scale)
    model.to(dtype)
    assert model[0].nm_scale.dtype == torch.float32
    assert float(model[0].nm_scale) == scale
    weight = model[0].weight
    assert weight.dtype == dtype
    assert ((weight != 0).reshape(-1, pattern.m).sum(1) <= pattern.n).all()
    rounded = nm(model[0]).raw.detach().float().flatten().tolist()
    expected = [scale * s for s in literal_threshold(rounded, pattern)]
    assert weight.float().flatten().tolist() == pytest.approx(expected, rel=0.01)
    x = torch.randn(4, 32, dtype=dtype)
    model(x).float().square().sum().backward()
    assert nm(model[0]).raw.grad.dtype == dtype
    made_in_half = nmgraph.convert(nn.Sequential(nn.Linear(32, 16).to(dtype)), method="sste", pattern=text)
    raw = nm(made_in_half[0]).raw.detach().float().flatten().tolist()
    assert float(made_in_half[0].nm_scale) == pytest.approx(literal_scale(raw, pattern), rel=1e-4)
