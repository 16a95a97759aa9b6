"""The operands of both products, by torch and by a kernel: in Triton's interpreter to the bit the same."""

import importlib.util
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nmgraph.nm.both_ways import both_ways
from nmgraph.nm.grouping import canonical
from nmgraph.nm.masks import largest
from nmgraph.nm.pattern import Pattern

HALVES = [torch.float16, torch.bfloat16]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which has wheels for Linux: pip install triton"
)


def slow_backward(w, order, pattern):
    """Take in every column, of every M rows in order, the N largest that are not zero, and each NaN; then transpose."""
    out = torch.zeros(w.shape[::-1])
    for c in range(w.shape[1]):
        column = [w[row, c].item() for row in order]
        for start in range(0, len(column), pattern.m):
            places = range(start, min(start + pattern.m, len(column)))
            ranked = sorted(places, key=lambda place: (not math.isnan(column[place]), -abs(column[place])))
            for rank, place in enumerate(ranked):
                if rank < pattern.n or math.isnan(column[place]):
                    out[c, place] = column[place]
    return out


@settings(max_examples=80)
@given(st.data(), st.sampled_from(HALVES))
def test_operands_equal_those_made_weight_by_weight(data, dtype):
    rows, columns = data.draw(st.integers(1, 18)), data.draw(st.integers(1, 3))
    few = st.sampled_from([0.0, 0.0, 1.0, -1.0, 2.0, math.inf, math.nan])
    w = torch.from_numpy(data.draw(hnp.arrays("float32", (rows, columns), elements=few)))
    order = data.draw(st.permutations(range(rows)))
    pattern = data.draw(st.sampled_from([Pattern(1, 2), Pattern(2, 4), Pattern(3, 4), Pattern(2, 7), Pattern(1, 16)]))
    forward, backward = both_ways(w, dtype, torch.tensor(order), pattern)
    torch.testing.assert_close(forward, w.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(backward, slow_backward(w, order, pattern).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_columns_that_hold_their_pattern_are_permuted_and_transposed_alone():
    w, order = torch.randn(6, 4), torch.tensor([5, 0, 4, 1, 3, 2])
    assert torch.equal(both_ways(w, torch.bfloat16, order, None)[1], w[order].t().bfloat16())
    assert torch.equal(both_ways(w, torch.bfloat16, None, None)[1], w.t().bfloat16())


def test_without_an_order_neighbours_are_the_rows_as_they_are():
    w = torch.randn(8, 3)
    own = both_ways(w, torch.float16, torch.arange(8), Pattern(2, 4))
    assert all(map(torch.equal, both_ways(w, torch.float16, None, Pattern(2, 4)), own))


def test_weights_are_ranked_before_they_are_cast():
    w = torch.tensor([[1.0], [1.0 + 2**-20]])
    assert both_ways(w, torch.float16, None, Pattern(1, 2))[1].tolist() == [[0.0, 1.0]]


def test_operands_are_new_contiguous_and_without_a_gradient():
    w = torch.nn.Parameter(torch.randn(4, 4).half().t())
    before = w.detach().clone()
    for operand in both_ways(w, torch.float16, None, None):
        assert operand.is_contiguous()
        assert not operand.requires_grad
        operand.zero_()
    assert torch.equal(w, before)


def test_nothing_needs_triton_to_be_there():
    program = """
import sys
sys.modules["triton"] = None
import torch, nmgraph
from nmgraph.nm import both_ways
print(both_ways.both_ways(torch.ones(2, 1), torch.float16, None, nmgraph.Pattern(1, 2))[1].tolist())
"""
    assert python(program).stdout == "[[1.0, 0.0]]\n"


def python(program, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done


def weight(rows, columns, dtype=torch.float32, seed=0):
    """Make a weight of 2:4 along its rows with many equals, zeros of both signs, infinities and NaN."""
    w = (3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))).round() / 4
    w.view(-1)[:: max(3, w.numel() // 7)] = math.inf
    w.view(torch.int32).view(-1)[:: max(5, w.numel() // 11)] = 0x7FFFFFFF  # a NaN, of which there are many
    if columns % 4 == 0:
        w = largest(w.unsqueeze(1), Pattern(2, 4)).squeeze(1)
    return torch.where((w == 0) & (torch.arange(columns) % 5 == 0), -0.0, w).to(dtype)


def shuffled(rows):
    return torch.randperm(rows, generator=torch.Generator().manual_seed(1))


def cases():
    """Name what is computed twice: weight, dtype, order, pattern."""
    for text in (None, "1:2", "2:4", "1:4", "3:8", "4:16"):
        pattern = text and Pattern.parse(text)
        yield f"{text}, own order", (weight(70, 100), torch.float16, None, pattern)
        yield f"{text}, permuted", (weight(70, 100), torch.float16, shuffled(70), pattern)
    for stored in (torch.float32, *HALVES):
        for dtype in HALVES:
            yield f"{stored} as {dtype}", (weight(20, 24, stored), dtype, shuffled(20), Pattern(2, 4))
    for rows, columns in ((1, 1), (3, 5), (64, 64), (130, 8), (8, 130)):
        yield f"{rows} x {columns}", (weight(rows, columns), torch.float16, shuffled(rows), Pattern(2, 4))
    views = {
        "1x1 convolution": canonical(weight(36, 40).view(36, 40, 1, 1)).squeeze(1),
        "3x3 convolution, one position": canonical(weight(36, 360).view(36, 40, 3, 3))[:, 4],
        "stored transposed": weight(40, 36).t(),
        "every second column": weight(36, 80)[:, ::2],
    }
    for name, w in views.items():
        yield name, (w, torch.float16, shuffled(len(w)), Pattern(2, 4))
    yield (
        "every second of an order",
        (weight(8, 8), torch.float16, shuffled(8).repeat_interleave(2)[::2], Pattern(2, 4)),
    )
    # In float16 these overflow, round to even and fall below what is normal.
    spread = torch.randn(40, 40) * 10.0 ** torch.linspace(-8, 6, 40)
    yield "all magnitudes", (spread, torch.float16, shuffled(40), Pattern(2, 4))


CASES = dict(cases())
INTERPRETED = """
import sys, torch
from nmgraph.nm import both_ways, both_ways_triton
cases = torch.load(sys.argv[1], weights_only=False)
found = {name: both_ways.both_ways(*case, fused=True) for name, case in cases.items()}
both_ways_triton._FAR = 0
found["64-bit offsets"] = both_ways.both_ways(*cases["2:4, permuted"], fused=True)
torch.save(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Run the kernel on all cases in a process of its own, as Triton reads the switch when it is imported."""
    folder = tmp_path_factory.mktemp("interpreted")
    torch.save(CASES, folder / "cases.pt")
    python(INTERPRETED, folder / "cases.pt", folder / "found.pt", TRITON_INTERPRET="1")
    return torch.load(folder / "found.pt")


def bits(t):
    """Give the bits of half precision, and those of one NaN for each."""
    return torch.where(t.isnan(), math.nan, t).view(torch.int16)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_writes_the_bits_that_torch_does(interpreted, name):
    for found, expected in zip(interpreted[name], both_ways(*CASES[name]), strict=True):
        assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
        assert torch.equal(bits(found), bits(expected))


@needs_triton
def test_the_kernel_reaches_as_far_with_64_bits(interpreted):
    for found, expected in zip(interpreted["64-bit offsets"], interpreted["2:4, permuted"], strict=True):
        assert torch.equal(bits(found), bits(expected))


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nmgraph.nm.both_ways_triton import _TILE, _kernel

numbers = dict.fromkeys(("rows", "columns", "row_step"), "i32")
pointers = {"forward": "*bf16", "backward": "*bf16", "weight": "*fp32", "order": "*i64"}
known = {"column_step": 1, "N": 2, "M": 4, "TILE": _TILE, "LONG": False}
signature = {name: {**pointers, **numbers}.get(name, "constexpr") for name in _kernel.arg_names}
aligned = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind != "constexpr"}
source = ASTSource(_kernel, signature, {(_kernel.arg_names.index(name),): value for name, value in known.items()}, aligned)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


@needs_triton
def test_the_kernel_compiles_for_a_gpu_to_one_read_of_each_weight_and_wide_stores(tmp_path):
    ptx = python(COMPILED, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).stdout
    tile, threads, wide = 64 * 64, 128, 4
    assert f".reqntid {threads}" in ptx
    # Of 16 bytes; a thread has each float once, and each of the two halves.
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == tile // threads // wide
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == 2 * tile // threads // (2 * wide)
    assert "st.global.b16" not in ptx
    # The interpreter cuts bfloat16 off, so that its cases are exact there; a GPU rounds to nearest, of two equals the even one.
    assert "cvt.rn.bf16.f32" in ptx
