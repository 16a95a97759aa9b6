"""Choosing N of M, and checking that a weight keeps to it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nmgraph.nm.fused import top_n
from nmgraph.nm.grouping import blocks, canonical
from nmgraph.nm.masks import check_blocks, magnitude_mask, random_mask
from nmgraph.nm.pattern import Pattern

FEW_VALUES = st.integers(-3, 3).map(float)  # few, so that ties are the rule
PATTERNS = st.sampled_from([Pattern(1, 2), Pattern(1, 4), Pattern(2, 4), Pattern(3, 4), Pattern(2, 8), Pattern(5, 7)])


def slow_top_n(row, n):
    """Take the highest score that is left, the first of equals, n times."""
    taken = set()
    for _ in range(n):
        taken.add(max((i for i in range(len(row)) if i not in taken), key=lambda i: (row[i], -i)))
    return [i in taken for i in range(len(row))]


@st.composite
def scores_and_n(draw):
    rows, m = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    values = draw(hnp.arrays("float32", (rows, m), elements=FEW_VALUES))
    return torch.from_numpy(values), draw(st.integers(0, m))


@settings(deadline=None)
@given(scores_and_n())
def test_top_n_equals_taking_the_highest_one_by_one(case):
    scores, n = case
    chosen = top_n(scores, n)
    assert chosen.dtype == torch.bool
    assert chosen.tolist() == [slow_top_n(row, n) for row in scores.tolist()]


@settings(deadline=None)
@given(scores_and_n())
def test_top_n_marks_exactly_n(case):
    scores, n = case
    assert (top_n(scores, n).sum(-1) == n).all()


@settings(deadline=None)
@given(scores_and_n())
def test_a_count_in_a_tensor_is_a_count(case):
    scores, n = case
    for count in (torch.tensor(n), torch.full((1,), n, dtype=torch.int32), torch.full((len(scores), 1), n)):
        assert torch.equal(top_n(scores, count), top_n(scores, n))


def test_every_row_may_have_a_count_of_its_own():
    scores, counts = torch.randint(0, 4, (2, 6, 5)).float(), torch.arange(6).unsqueeze(-1)
    chosen = top_n(scores, counts)
    for row in range(6):
        assert torch.equal(chosen[:, row], top_n(scores[:, row], row))


def test_a_count_in_a_tensor_is_not_read_on_the_host():
    scores = torch.empty(3, 8, device="meta")  # reading a value there is an error
    assert top_n(scores, torch.empty((), dtype=torch.int64, device="meta")).shape == (3, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_of_equals_the_lowest_index_is_kept(dtype):
    equal = torch.ones(3, 64, dtype=dtype)
    assert torch.equal(top_n(equal, 5), (torch.arange(64) < 5).expand(3, 64))


def test_top_n_keeps_a_score_of_minus_infinity_only_when_nothing_else_is_left():
    scores = torch.tensor([-torch.inf, 0.0, -torch.inf, -5.0])
    assert top_n(scores, 2).tolist() == [False, True, False, True]
    assert top_n(scores, 3).tolist() == [True, True, False, True]


@settings(deadline=None)
@given(PATTERNS, st.integers(1, 3), st.integers(1, 3), st.data())
def test_magnitude_mask_keeps_the_largest_magnitudes_of_every_block(pattern, rows, groups, data):
    shape = (rows, 2, groups * pattern.m)
    w_OSC = torch.from_numpy(data.draw(hnp.arrays("float32", shape, elements=FEW_VALUES)))
    kept = blocks(magnitude_mask(w_OSC, pattern), pattern.m).flatten(0, 2)
    magnitudes = blocks(w_OSC, pattern.m).flatten(0, 2).abs()
    assert kept.tolist() == [slow_top_n(row, pattern.n) for row in magnitudes.tolist()]


def test_an_all_zero_block_keeps_its_first_n():
    assert magnitude_mask(torch.zeros(1, 1, 4), Pattern(2, 4)).tolist() == [[[True, True, False, False]]]


def test_the_sign_does_not_count():
    w = torch.tensor([[[-4.0, 1.0, 2.0, -3.0]]])
    assert magnitude_mask(w, Pattern(2, 4)).tolist() == [[[True, False, False, True]]]


@pytest.mark.parametrize("keep", [0, 1, 3, 4])
def test_magnitude_mask_keeps_another_number_than_n_if_told_to(keep):
    w_OSC = torch.randn(3, 2, 12)
    expected = (
        magnitude_mask(w_OSC, Pattern(keep, 4)) if 0 < keep < 4 else torch.full_like(w_OSC, keep, dtype=torch.bool)
    )
    assert torch.equal(magnitude_mask(w_OSC, Pattern(2, 4), keep), expected)
    assert torch.equal(magnitude_mask(w_OSC, Pattern(2, 4), torch.tensor(keep)), expected)


@settings(deadline=None)
@given(PATTERNS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_a_random_mask_keeps_exactly_n_of_every_block(pattern, rows, positions, groups, seed):
    shape = (rows, positions, groups * pattern.m)
    mask = random_mask(shape, pattern, torch.Generator().manual_seed(seed))
    assert mask.dtype == torch.bool
    assert mask.shape == shape
    assert (blocks(mask, pattern.m).sum(-1) == pattern.n).all()


def test_a_random_mask_prefers_no_combination():
    mask = random_mask((60, 10, 40), Pattern(2, 4), torch.Generator().manual_seed(0))
    found, counts = blocks(mask, 4).flatten(0, 2).unique(dim=0, return_counts=True)
    assert len(found) == 6
    assert ((counts / 6000 - 1 / 6).abs() < 0.02).all()


def test_a_random_mask_depends_on_its_generator_alone():
    first, again, other = (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    mask = random_mask((8, 1, 16), Pattern(2, 4), first)
    torch.rand(3)
    assert torch.equal(random_mask((8, 1, 16), Pattern(2, 4), again), mask)
    assert not torch.equal(random_mask((8, 1, 16), Pattern(2, 4), other), mask)
    assert not torch.equal(random_mask((8, 1, 16), Pattern(2, 4), first), mask)  # the next draw of the same one


@settings(deadline=None)
@given(PATTERNS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.data())
def test_check_blocks_counts_as_a_loop_over_all_blocks_does(pattern, rows, positions, groups, data):
    shape = (rows, positions, groups * pattern.m)
    flags = data.draw(hnp.arrays("bool", shape))
    counts = {
        (o, s, g): int(flags[o, s, g * pattern.m : (g + 1) * pattern.m].sum())
        for o in range(rows)
        for s in range(positions)
        for g in range(groups)
    }
    worst = max(counts, key=lambda at: counts[at])  # the first of equals
    found = check_blocks(torch.from_numpy(flags) * -0.5, pattern)
    assert found.blocks == len(counts)
    assert found.violations == sum(count > pattern.n for count in counts.values())
    assert found.worst == worst
    assert found.worst_count == counts[worst]
    assert found.density == pytest.approx(flags.mean())
    assert found.holds == all(count <= pattern.n for count in counts.values())


def test_check_blocks_names_the_place_of_the_worst_block():
    weight = torch.zeros(3, 8, 2, 2)
    weight[2, 4:, 1, 0] = 1.0
    weight[0, :3, 0, 1] = 1.0
    found = check_blocks(canonical(weight), Pattern(2, 4))
    assert (found.worst, found.worst_count, found.violations) == ((2, 2, 1), 4, 2)
    assert not found.holds


def test_a_nan_counts_as_a_non_zero_and_a_negative_zero_does_not():
    assert check_blocks(torch.tensor([[[torch.nan, 1.0, 1.0, 0.0]]]), Pattern(2, 4)).worst_count == 3
    assert check_blocks(torch.tensor([[[-0.0, 1.0, 1.0, 0.0]]]), Pattern(2, 4)).holds
