"""Backward masks along permuted rows, and the choice of the permutation."""

import warnings
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nmgraph.compilation import SWITCH
from nmgraph.nm.grouping import canonical
from nmgraph.nm.masks import random_mask
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.permutation import best_permutation, column_sparse, eligible_blocks, kept_weights, swap_rows

PATTERNS = st.sampled_from([Pattern(1, 2), Pattern(1, 4), Pattern(2, 4), Pattern(3, 4), Pattern(2, 7), Pattern(1, 16)])
FEW_VALUES = st.integers(0, 3).map(float)  # few, so that ties are the rule


def row_blocks(order, m):
    """Split a row order into blocks of neighbours; the last one may be short."""
    return [order[start : start + m] for start in range(0, len(order), m)]


def slow_column_mask(scores, live, order, n, m):
    """Take in every column of every block the n live rows with the highest scores, of equals the first in order."""
    kept = torch.zeros_like(live)
    _, positions, channels = live.shape
    for rows in row_blocks(order, m):
        for s in range(positions):
            for c in range(channels):
                alive = [row for row in rows if live[row, s, c]]
                for row in sorted(alive, key=lambda row: -scores[row, s, c].item())[:n]:
                    kept[row, s, c] = True
    return kept


def column_mask(scores, live, order, pattern, keep=None):
    """Say which weights of a column-sparse weight are kept, if all live ones are 1."""
    return column_sparse(live.to(scores.dtype), order, pattern, keep, scores) != 0


def slow_counts(mask, order, m):
    """Count the weights of every column of every block, one by one."""
    _, positions, channels = mask.shape
    return [
        sum(bool(mask[row, s, c]) for row in rows)
        for rows in row_blocks(order, m)
        for s in range(positions)
        for c in range(channels)
    ]


def slow_score(mask, order, pattern, objective):
    counts = slow_counts(mask, order, pattern.m)
    if objective == "blocks":
        return sum(count <= pattern.n for count in counts)
    return sum(min(count, pattern.n) for count in counts)


def slow_swaps(mask, order, pattern, rounds, objective, source):
    """Pair blocks at random, try every swap of each pair, and make the best one if it gains."""
    order = [*order]
    starts = range(0, len(order), pattern.m)
    for drawn in [torch.randperm(len(starts), generator=source).tolist() for _ in range(rounds)]:
        for first, second in zip(drawn[::2], drawn[1::2], strict=False):
            best, best_score = order, slow_score(mask, order, pattern, objective)
            for i in range(starts[first], min(starts[first] + pattern.m, len(order))):
                for j in range(starts[second], min(starts[second] + pattern.m, len(order))):
                    swapped = [*order]
                    swapped[i], swapped[j] = order[j], order[i]
                    score = slow_score(mask, swapped, pattern, objective)
                    if score > best_score:
                        best, best_score = swapped, score
            order = best
    return order


def plain_counts(mask, order, m):
    """Count the weights of every column of every block; M divides the rows."""
    return mask[order].flatten(1).unflatten(0, (-1, m)).sum(1)


def plain_score(mask, order, pattern, objective):
    counts = plain_counts(mask, order, pattern.m)
    return int((counts <= pattern.n).sum() if objective == "blocks" else counts.clamp(max=pattern.n).sum())


def generator(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def masks_and_orders(draw):
    shape = (draw(st.integers(1, 18)), draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    live = torch.from_numpy(draw(hnp.arrays("bool", shape)))
    return live, draw(st.permutations(range(shape[0])))


@settings(max_examples=80)
@given(masks_and_orders(), PATTERNS, st.data())
def test_a_column_mask_equals_one_made_weight_by_weight(case, pattern, data):
    live, order = case
    scores = torch.from_numpy(data.draw(hnp.arrays("float32", tuple(live.shape), elements=FEW_VALUES)))
    found = column_mask(scores, live, torch.tensor(order), pattern)
    assert torch.equal(found, slow_column_mask(scores, live, order, pattern.n, pattern.m))


@settings(max_examples=30)
@given(masks_and_orders(), PATTERNS, st.data())
def test_keep_takes_the_place_of_n_as_number_or_tensor(case, pattern, data):
    live, order = case
    keep = data.draw(st.integers(0, pattern.m))
    scores = torch.rand(live.shape)
    expected = slow_column_mask(scores, live, order, keep, pattern.m)
    assert torch.equal(column_mask(scores, live, torch.tensor(order), pattern, keep), expected)
    assert torch.equal(column_mask(scores, live, torch.tensor(order), pattern, torch.tensor(keep)), expected)


@pytest.mark.parametrize("rows", [16, 18])  # whole blocks, and a short last one
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8"])
def test_a_column_mask_lies_inside_the_live_one_and_is_n_m_on_permuted_rows(pattern, rows):
    pattern = Pattern.parse(pattern)
    live, order = torch.rand(rows, 3, 40) < 0.7, torch.randperm(rows)
    found = column_mask(torch.rand(rows, 3, 40), live, order, pattern)
    assert not (found & ~live).any()
    counts = [part.sum(0) for part in found[order].split(pattern.m)]
    wanted = [part.sum(0).clamp(max=pattern.n) for part in live[order].split(pattern.m)]
    assert all(map(torch.equal, counts, wanted))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rows", [16, 18])
def test_columns_keep_their_largest_weights_in_place_and_in_memory_order(rows, axis):
    shape = (rows, 8, 3, 3) if axis == 1 else (8, rows, 3, 3)
    w_OSC = canonical(torch.randn(shape) * (torch.rand(shape) < 0.7), axis)
    order = torch.randperm(rows)
    found = column_sparse(w_OSC, order, Pattern(2, 4))
    kept = slow_column_mask(w_OSC.abs(), w_OSC != 0, order.tolist(), 2, 4)
    assert torch.equal(found, w_OSC * kept)
    assert found.stride() == w_OSC.stride()


def test_the_permutation_decides_which_rows_compete():
    scores, live = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1), torch.ones(4, 1, 1, dtype=torch.bool)
    in_order = column_mask(scores, live, torch.tensor([0, 1, 2, 3]), Pattern(1, 2))
    reordered = column_mask(scores, live, torch.tensor([1, 0, 3, 2]), Pattern(1, 2))
    paired_anew = column_mask(scores, live, torch.tensor([0, 3, 1, 2]), Pattern(1, 2))
    assert in_order.flatten().tolist() == [False, True, False, True]
    assert torch.equal(reordered, in_order)
    assert paired_anew.flatten().tolist() == [False, False, True, True]


def test_a_dead_weight_never_takes_the_place_of_a_live_one_however_high_its_score():
    scores, live = (
        torch.tensor([[[9.0]], [[8.0]], [[0.0]], [[0.0]]]),
        torch.tensor([[[False]], [[False]], [[True]], [[True]]]),
    )
    assert column_mask(scores, live, torch.arange(4), Pattern(2, 4)).flatten().tolist() == [False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_scores_of_any_dtype_are_ranked(dtype):
    scores, live, order = torch.rand(12, 2, 8).to(dtype), torch.rand(12, 2, 8) < 0.8, torch.randperm(12)
    expected = slow_column_mask(scores, live, order.tolist(), 2, 4)
    assert torch.equal(column_mask(scores, live, order, Pattern(2, 4)), expected)


@settings(max_examples=60)
@given(masks_and_orders(), PATTERNS)
def test_eligible_blocks_and_kept_weights_equal_slow_counts(case, pattern):
    mask, order = case
    assert eligible_blocks(mask, torch.tensor(order), pattern) == slow_score(mask, order, pattern, "blocks")
    assert kept_weights(mask, torch.tensor(order), pattern) == slow_score(mask, order, pattern, "kept")


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("objective", ["blocks", "kept"])
def test_a_compiled_search_draws_and_chooses_the_same(pattern, objective, monkeypatch):
    pattern, found = Pattern.parse(pattern), []
    masks = [
        random_mask((rows, 1, columns), pattern, generator(1)) for rows, columns in ((64, 256), (18, 64), (32, 640))
    ]
    for mode in ("never", "always"):
        monkeypatch.setenv(SWITCH, mode)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="masks are made without compiled code")
            found.append([best_permutation(mask, pattern, 20, objective, generator(2)) for mask in masks])
            found[-1] += [torch.tensor(eligible_blocks(masks[0], torch.arange(64), pattern))]
    assert all(map(torch.equal, *found))


def test_counts_do_not_overflow_a_byte():
    full = torch.ones(64, 4, 100, dtype=torch.bool)
    assert kept_weights(full, torch.arange(64), Pattern(31, 32)) == 2 * 31 * 400
    assert eligible_blocks(~full, torch.arange(64), Pattern(31, 32)) == 2 * 400
    assert eligible_blocks(full, torch.arange(64), Pattern(31, 32)) == 0


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.8125), ("1:4", 0.6836), ("4:8", 0.8633), ("1:16", 0.6439)])
def test_of_a_random_mask_survives_what_chance_allows(pattern, share):
    # The mean of min(N, k) / N, where k of M rows hold a column: binomial with probability N / M.
    pattern = Pattern.parse(pattern)
    mask = random_mask((2048, 1, 256), pattern, generator(3))
    identity = torch.arange(2048)
    assert kept_weights(mask, identity, pattern) / int(mask.sum()) == pytest.approx(share, abs=0.005)
    found = column_mask(torch.rand(mask.shape), mask, identity, pattern)
    assert int(found.sum()) == kept_weights(mask, identity, pattern)


@pytest.mark.parametrize("objective", ["blocks", "kept"])
@pytest.mark.parametrize("rows", [16, 14])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_the_drawn_permutations_is_taken(objective, rows, seed):
    pattern = Pattern(1, 4)
    mask = random_mask((rows, 1, 24), pattern, generator(100 + seed))
    source = generator(seed)
    drawn = [torch.randperm(rows, generator=source) for _ in range(12)]
    scores = [slow_score(mask, order.tolist(), pattern, objective) for order in drawn]
    assert min(scores) < max(scores)
    best = best_permutation(mask, pattern, 12, objective, generator(seed))
    assert torch.equal(best, drawn[scores.index(max(scores))])
    assert torch.equal(best.sort().values, torch.arange(rows))


def test_the_two_objectives_prefer_different_permutations():
    pattern = Pattern(1, 4)
    mask = random_mask((16, 1, 24), pattern, generator(3))
    chosen = {name: best_permutation(mask, pattern, 50, name, generator(0)) for name in ("blocks", "kept")}
    assert not torch.equal(chosen["blocks"], chosen["kept"])
    assert eligible_blocks(mask, chosen["blocks"], pattern) > eligible_blocks(mask, chosen["kept"], pattern)
    assert kept_weights(mask, chosen["kept"], pattern) > kept_weights(mask, chosen["blocks"], pattern)


def test_of_equal_permutations_the_first_drawn_is_taken():
    full = torch.ones(8, 1, 4, dtype=torch.bool)
    for objective in ("blocks", "kept"):
        found = best_permutation(full, Pattern(2, 4), 10, objective, generator(7))
        assert torch.equal(found, torch.randperm(8, generator=generator(7)))


@pytest.mark.parametrize("objective", ["blocks", "kept"])
@pytest.mark.parametrize("pattern", ["2:4", "1:16", "5:7", "16:32"])
def test_on_a_large_layer_too_the_best_permutation_is_taken(pattern, objective):
    pattern = Pattern.parse(pattern)
    mask = torch.rand(224 * 8, 3, 50, generator=generator(0)) < pattern.n / pattern.m  # columns that fill no word
    source = generator(1)
    drawn = [torch.randperm(len(mask), generator=source) for _ in range(60)]
    scores = [plain_score(mask, order, pattern, objective) for order in drawn]
    found = best_permutation(mask, pattern, 60, objective, generator(1))
    assert torch.equal(found, drawn[scores.index(max(scores))])


@settings(max_examples=60, deadline=None)
@given(masks_and_orders(), PATTERNS, st.sampled_from(["blocks", "kept"]), st.integers(1, 3), st.integers(0, 9))
def test_rows_are_swapped_as_when_every_swap_is_tried(case, pattern, objective, rounds, seed):
    mask, order = case
    found = swap_rows(mask, torch.tensor(order), pattern, rounds, objective, generator(seed))
    assert found.tolist() == slow_swaps(mask, order, pattern, rounds, objective, generator(seed))


@pytest.mark.parametrize("objective", ["blocks", "kept"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "2:8"])
@pytest.mark.parametrize("rows", [48, 46])
def test_no_round_of_swaps_does_worse_and_many_end_where_no_swap_gains(rows, pattern, objective):
    pattern = Pattern.parse(pattern)
    mask = random_mask((rows, 3, 40), pattern, generator(2))
    score = {"blocks": eligible_blocks, "kept": kept_weights}[objective]
    order = torch.randperm(rows, generator=generator(0))
    scores = [score(mask, order, pattern)]
    for step in range(500):
        order = swap_rows(mask, order, pattern, 1, objective, generator(step))
        scores.append(score(mask, order, pattern))
    assert torch.equal(order.sort().values, torch.arange(rows))
    assert scores == sorted(scores)
    assert len(set(scores)) > 3
    for i, j in combinations(range(rows), 2):
        swapped = order.clone()
        swapped[i], swapped[j] = order[j], order[i]
        assert score(mask, swapped, pattern) <= scores[-1]


@pytest.mark.parametrize("objective", ["blocks", "kept"])
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "3:4"])
def test_swaps_of_eight_rows_come_near_the_best_of_all_orders(pattern, objective):
    pattern, gains = Pattern.parse(pattern), [0, 0]
    for seed in range(30):
        mask = random_mask((8, 1, 24), pattern, generator(seed))
        every = [
            [0, *three, *(row for row in range(1, 8) if row not in three)] for three in combinations(range(1, 8), 3)
        ]
        most = max(plain_score(mask, order, pattern, objective) for order in every)
        before = plain_score(mask, list(range(8)), pattern, objective)
        found = swap_rows(mask, torch.arange(8), pattern, 4, objective, generator(0))
        found = plain_score(mask, found, pattern, objective)
        assert before <= found <= most
        gains = [gains[0] + found - before, gains[1] + most - before]
    assert 0.8 * gains[1] < gains[0]


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.828), ("1:4", 0.714), ("1:16", 0.698)])
def test_a_hundred_rounds_of_swaps_keep_more_than_the_best_of_a_hundred_permutations(pattern, share):
    pattern = Pattern.parse(pattern)
    mask = random_mask((128, 1, 1152), pattern, generator(0))
    drawn = best_permutation(mask, pattern, 100, "kept", generator(0))
    swapped = swap_rows(mask, torch.arange(128), pattern, 100, "kept", generator(0))
    assert kept_weights(mask, swapped, pattern) > share * int(mask.sum()) > kept_weights(mask, drawn, pattern)


def test_a_single_block_has_nothing_to_swap_with():
    mask = torch.rand(4, 1, 8) < 0.5
    assert swap_rows(mask, torch.tensor([2, 0, 1, 3]), Pattern(2, 4), 5, "kept", generator(0)).tolist() == [2, 0, 1, 3]


def test_swapping_leaves_the_permutation_given_as_it_was():
    mask, order = random_mask((64, 1, 64), Pattern(2, 4), generator(0)), torch.arange(64)
    found = swap_rows(mask, order, Pattern(2, 4), 5, "kept", generator(0))
    assert torch.equal(order, torch.arange(64))
    assert not torch.equal(found, order)


def test_more_candidates_never_do_worse():
    mask = random_mask((32, 1, 64), Pattern(2, 4), generator(1))
    kept = [
        kept_weights(mask, best_permutation(mask, Pattern(2, 4), k, "kept", generator(5)), Pattern(2, 4))
        for k in (1, 4, 16, 64)
    ]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]
