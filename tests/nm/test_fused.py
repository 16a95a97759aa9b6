"""Functions of blocks, computed by sorting and by compiled comparisons: the same to the bit."""

import math
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nmgraph import compilation
from nmgraph.compilation import SWITCH, Compiled
from nmgraph.errors import NMGraphError
from nmgraph.methods.srste import refined, refined_by_magnitude
from nmgraph.nm import fused
from nmgraph.nm.fused import Blockwise, zero_outside
from nmgraph.nm.grouping import canonical
from nmgraph.nm.masks import largest, magnitude_mask, prune_further
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.permutation import column_sparse
from nmgraph.nm.straight_through import largest_straight_through

SHAPES = {
    "linear": ((96, 160), 1),
    "conv 1x1": ((96, 160, 1, 1), 1),
    "conv 3x3": ((64, 48, 3, 3), 1),
    "conv 7x7": ((16, 32, 7, 7), 1),
    "stored transposed": ((80, 384), 0),
    "stored transposed, wide": ((48, 1000), 0),
    "transposed conv": ((48, 40, 3, 3), 0),
    "experts": ((3, 64, 80), -1),
}


def weight(kind, dtype, seed=0):
    """Make a weight with many equals, zeros and infinities, and with a NaN if the seed is 0."""
    shape, axis = SHAPES[kind]
    w = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).round() / 3
    w.view(-1)[7], w.view(-1)[w.numel() // 2] = math.inf, -math.inf
    if seed == 0:
        w.view(-1)[-2] = math.nan
    return canonical(w.to(dtype), axis)


def all_ways(monkeypatch, function):
    """Compute something by sorting, by comparing, and compiled; fail if the compiler gave up."""
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("error", message="masks are made")
        patch.setenv(SWITCH, "never")
        patch.setattr(fused, "_SMALL", 1 << 40)
        by_sorting = function()
        patch.setattr(fused, "_SMALL", 0)
        by_comparing = function()
        patch.setenv(SWITCH, "always")
        return by_sorting, by_comparing, function()


def equal(first, *others):
    return all(
        t.dtype == first.dtype
        and t.stride() == first.stride()
        and torch.equal(t.nan_to_num(9.0), first.nan_to_num(9.0))
        for t in others
    )


SLOW = [
    ("2:4", torch.bfloat16),
    ("4:8", torch.float32),
    ("1:16", torch.float32),
    ("2:4", torch.float16),
    ("2:4", torch.float64),
]


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [
        ("2:4", torch.float32),
        ("1:4", torch.float32),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_compiled_masks_weights_and_gradients_are_the_sorted_ones_to_the_bit(pattern, dtype, monkeypatch):
    pattern = Pattern.parse(pattern)
    for kind in SHAPES:
        for seed in (0, 1):  # with a NaN, and without
            w_OSC, grad_OSC = weight(kind, dtype, seed), weight(kind, dtype, seed=2)
            if w_OSC.shape[-1] % pattern.m == 0:
                for what, function in functions(w_OSC, grad_OSC, pattern).items():
                    assert equal(*all_ways(monkeypatch, function)), (kind, what, seed)


def functions(w_OSC, grad_OSC, pattern):
    """Name everything that is computed blockwise."""
    mask, order = magnitude_mask(w_OSC, pattern), torch.randperm(len(w_OSC))
    return {
        "mask": lambda: magnitude_mask(w_OSC, pattern).byte(),
        "mask of one": lambda: magnitude_mask(w_OSC, pattern, 1).byte(),
        "mask of all": lambda: magnitude_mask(w_OSC, pattern, pattern.m).byte(),
        "mask of a tensor": lambda: magnitude_mask(w_OSC, pattern, torch.tensor(pattern.n)).byte(),
        "mask within a mask": lambda: prune_further(w_OSC, mask, pattern, 1).byte(),
        "weight": lambda: largest(w_OSC, pattern),
        "gradient": lambda: refined_by_magnitude(grad_OSC, w_OSC, pattern, 2e-4),
        "columns": lambda: column_sparse(w_OSC, order, pattern),
        "columns by scores": lambda: column_sparse(w_OSC, order, pattern, scores_OSC=grad_OSC.float().abs()),
    }


def test_the_mask_of_the_compiled_way_is_the_slow_one(monkeypatch):
    monkeypatch.setenv(SWITCH, "always")
    w = torch.randn(64, 1, 256)
    kept = torch.zeros_like(w, dtype=torch.bool).view(-1, 4)
    for row, block in enumerate(w.view(-1, 4).abs().tolist()):
        kept[row, sorted(range(4), key=lambda i: -block[i])[:2]] = True
    assert torch.equal(magnitude_mask(w, Pattern(2, 4)), kept.view_as(w))
    assert torch.equal(largest(w, Pattern(2, 4)), w * kept.view_as(w))


@pytest.mark.parametrize("first", [(128, 1, 128), (16, 1, 1024), (12, 1, 1000), (4, 9, 1024), (1024, 1, 16)])
def test_sizes_that_are_equal_in_the_first_call_may_differ_in_the_next(first, monkeypatch):
    function = Blockwise(torch.abs, zero_outside)
    for shape in (first, (128, 1, 256), (300, 1, 400), (60, 9, 32), (2000, 1, 200)):
        w_OSC = torch.randn(shape)
        assert equal(*all_ways(monkeypatch, lambda w_OSC=w_OSC: function(4, 2, w_OSC))), shape
        other = canonical(torch.randn(shape[::-1]), 0)
        if other.shape[-1] % 4 == 0:
            assert equal(*all_ways(monkeypatch, lambda other=other: function(4, 2, other))), shape


@pytest.mark.parametrize("outputs", [1, 4, 30])
def test_a_weight_may_be_shorter_than_a_row_of_its_kernel(outputs, monkeypatch):
    w_OSC = canonical(torch.randn(outputs, 3, 15, 15))  # blocks of 675, of which whole vectors are 10,800
    assert equal(*all_ways(monkeypatch, lambda: Blockwise(torch.abs, zero_outside)(3, 1, w_OSC)))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_result_lies_in_memory_as_its_weight_does(axis, monkeypatch):
    monkeypatch.setenv(SWITCH, "never")
    raw = torch.randn(16, 16, 3, 3)
    for w in (raw, raw.to(memory_format=torch.channels_last)):
        found = largest(canonical(w, axis), Pattern(2, 4))
        assert found.stride() == canonical(w, axis).stride()
        assert torch.equal(found, canonical(raw, axis) * magnitude_mask(canonical(raw, axis), Pattern(2, 4)))


def test_a_refined_gradient_is_the_gradient_and_the_decay_of_what_is_dropped():
    w, grad = torch.randn(8, 3, 16), torch.randn(8, 3, 16)
    mask = magnitude_mask(w, Pattern(2, 4))
    expected = refined(grad, w, mask, 0.5)
    assert torch.allclose(expected, grad + 0.5 * ~mask * w)
    assert torch.equal(refined_by_magnitude(grad, w, Pattern(2, 4), 0.5), expected)


def test_a_nan_shows_and_leaves_its_block_no_more_than_n_others():
    w = torch.tensor([[[1.0, math.nan, 3.0, 2.0], [4.0, 3.0, 2.0, 1.0]]])
    assert magnitude_mask(w, Pattern(2, 4)).tolist() == [[[False, True, True, False], [True, True, False, False]]]


def test_sorting_in_chunks_is_sorting_at_once(monkeypatch):
    w = torch.randn(40, 3, 32)
    at_once = magnitude_mask(w, Pattern(2, 4))
    monkeypatch.setattr(fused, "_MANY", 64)
    assert torch.equal(magnitude_mask(w, Pattern(2, 4)), at_once)


def test_only_what_has_sorted_much_is_compiled(monkeypatch):
    monkeypatch.setattr(fused, "_PAYS", 40_000)
    monkeypatch.delenv(SWITCH, raising=False)
    function, w = Blockwise(torch.abs), torch.randn(128, 1, 128)
    compiled = []
    monkeypatch.setattr(Compiled, "_compile", lambda self, *_: compiled.append(self) or self._function)
    found = [function(4, 2, w) for _ in range(3)]
    assert len(compiled) == 1
    assert torch.equal(found[0], found[2])
    small = Blockwise(torch.abs)
    for _ in range(40):
        small(4, 2, torch.randn(4, 1, 1000))
    assert len(compiled) == 1


@pytest.mark.filterwarnings("ignore:masks are made without compiled code")
def test_without_a_compiler_sorting_goes_on_and_one_warning_says_so(monkeypatch):
    def fails(kernel, *_):
        raise RuntimeError("no C++ compiler\nand a long trace")

    monkeypatch.setenv(SWITCH, "always")
    monkeypatch.setattr(Compiled, "_compile", fails)
    monkeypatch.setattr(compilation, "_given_up", set())
    function, w = Blockwise(torch.abs), torch.randn(128, 1, 128)
    with pytest.warns(UserWarning, match="torch.compile failed on cpu: no C\\+\\+ compiler. NMGRAPH_COMPILE=never"):
        found = function(4, 2, w)
    assert torch.equal(found, magnitude_mask(w, Pattern(2, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(function(4, 2, w), found)


def test_an_unknown_mode_is_refused_by_name(monkeypatch):
    monkeypatch.setenv(SWITCH, "off")
    with pytest.raises(NMGraphError, match="NMGRAPH_COMPILE=off is none of auto, always, never"):
        magnitude_mask(torch.randn(64, 1, 256), Pattern(2, 4))


def test_tracers_and_transforms_see_the_sorting_way(monkeypatch):
    monkeypatch.setenv(SWITCH, "always")
    monkeypatch.setattr(Compiled, "_compile", lambda *_: pytest.fail("compiled under a transform"))
    w = torch.randn(3, 64, 1, 256)
    batched = torch.func.vmap(lambda one: largest(one, Pattern(2, 4)))(w)
    assert torch.equal(
        batched,
        torch.stack([torch.func.vmap(lambda one: largest(one, Pattern(2, 4)))(w[i : i + 1])[0] for i in range(3)]),
    )
    assert largest(torch.empty(64, 1, 256, device="meta"), Pattern(2, 4)).shape == (64, 1, 256)
    with torch.inference_mode():
        assert torch.equal(largest(w[0], Pattern(2, 4)), batched[0])


def test_the_gradient_passes_straight_through_the_largest():
    w = torch.randn(64, 1, 256, requires_grad=True)
    out = largest_straight_through(w, Pattern(2, 4))
    assert torch.equal(out, w.detach() * magnitude_mask(w, Pattern(2, 4)))
    out.backward(grad := torch.randn(w.shape))
    assert torch.equal(w.grad, grad)


class Slow(list):
    """Lets other threads run once its length is known."""

    def __len__(self):
        found = super().__len__()
        time.sleep(0.01)
        return found


def test_functions_made_in_several_threads_are_each_found_by_their_own_number(monkeypatch):
    monkeypatch.setattr(fused, "_functions", Slow())
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: Blockwise(torch.abs), range(8)))
    assert [function for function in made if fused._functions[function._number] is not function] == []
