"""Transposable masks: N:M along rows and along columns at once (Hubara et al., NeurIPS 2021).

Every M x M tile of ``w_OC`` keeps exactly N weights of each row and of each column, with the largest sum of
magnitudes. Up to M = 4 dynamic programming over the rows finds the best mask for certain. Above, the dual of the linear
programme is descended: rows and columns have prices, and a weight worth more than both is kept. Where this keeps N of
each row and of each column, no mask keeps more, by complementary slackness; nearly all tiles end so. (This holds for
the weights that were searched, which differ by a jitter from those given, so that none are equal.)

Everything is planar: all tiles are solved at once by plain arithmetic between planes, one plane being one place in all
tiles, so that memory is read in order, and no product is rounded by TF32 or autocast.

Legend: R rows of a tile (M, or fewer in the last ones), M columns, T tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce
from itertools import combinations, product
from typing import TypeAlias

import torch
from torch import Tensor

from nmgraph.nm.pattern import Pattern

_EXACT_M = 4
_TILES_ON_CPU, _TILES_ELSEWHERE = 1 << 13, 1 << 15  # solved at once: planes that fit caches; planes that fill a GPU
_RESOLUTION = 2.0**33  # steps of a magnitude; twelve of them and 16 bits beside fill the 53 bits of a float64
_JITTER = 3e-3  # as a share of a tile's typical magnitude; it costs less than 1e-6 of the sum
_STEPS = 4  # of descent between two looks at what is solved
_LOOKS = 25

_Columns: TypeAlias = tuple[int, ...]


def is_exact(pattern: Pattern) -> bool:
    """Tell whether the best transposable mask is found for certain."""
    return pattern.m <= _EXACT_M


def transposable_mask(w_OSC: Tensor, pattern: Pattern) -> Tensor:
    """Keep N of M along C and, at every kernel position, at most N of M along O, with the most magnitude.

    Args:
        w_OSC: a weight, any floating dtype; C must be a multiple of M. Where M does not divide O, the last tiles have
            fewer rows. NaN counts as 0.
        pattern: N:M.

    Returns:
        bool ``[O, S, C]``: every block along C keeps exactly N, every M aligned rows of a column at most N. Up to
        M = 4 no mask keeps more, to the rounding of float32. What else is in memory at a time is of some thousand tiles,
        or of M output channels.
    """
    outputs, positions, channels = w_OSC.shape
    mask_OSC = torch.empty(w_OSC.shape, dtype=torch.bool, device=w_OSC.device)
    tiles = _TILES_ON_CPU if w_OSC.device.type == "cpu" else _TILES_ELSEWHERE
    step = max(1, tiles * pattern.m // (positions * channels)) * pattern.m
    whole = outputs // pattern.m * pattern.m
    starts = [*range(0, whole, step), *([whole] if whole < outputs else [])]
    for start, stop in zip(starts, [*starts[1:], outputs], strict=True):
        _mask_tiles(w_OSC.detach()[start:stop], mask_OSC[start:stop], pattern)
    return mask_OSC


def _mask_tiles(w_OSC: Tensor, mask_OSC: Tensor, pattern: Pattern) -> None:
    """Fill in the mask of whole tiles, or of short ones alone."""
    tiles = _planes(w_OSC, pattern.m)
    w_RMT = tiles.to(torch.float32, copy=True, memory_format=torch.contiguous_format).flatten(2)
    w_RMT = w_RMT.abs_().nan_to_num_()
    w_RMT /= w_RMT.amax((0, 1)).clamp(min=torch.finfo(torch.float32).tiny)
    kept_RMT = (_best if is_exact(pattern) else _approximate)(w_RMT, pattern)
    _planes(mask_OSC, pattern.m).copy_(kept_RMT.view(tiles.shape))


def _planes(t_OSC: Tensor, m: int) -> Tensor:
    """See a tensor as planes, ``[R, M, ...]``; the kernel positions last, where a convolution has them in memory."""
    outputs, positions, channels = t_OSC.shape
    rows = min(m, outputs)
    return t_OSC.view(outputs // rows, rows, positions, channels // m, m).permute(1, 4, 0, 3, 2)


def _best(w_RMT: Tensor, pattern: Pattern) -> Tensor:
    """Find the best mask row by row: of all ways to have used the columns equally, the best one is enough.

    A magnitude is a whole number of 2^16, and its place is one bit below. So a sum says which places it is of, and
    the larger of two sums brings its mask along.
    """
    rows, m, _ = w_RMT.shape
    place_RM1 = 2 ** torch.arange(rows * m, dtype=torch.int32, device=w_RMT.device).view(rows, m, 1)
    w_RMT = torch.add(place_RM1.double(), w_RMT.mul_(_RESOLUTION).round_().double(), alpha=2.0**16)
    best = {(0,) * m: torch.zeros((), dtype=torch.float64, device=w_RMT.device)}
    for w_MT, transitions in zip(w_RMT.unbind(), _transitions(rows, pattern), strict=True):
        w_of = w_MT.unbind()
        sums = {choice: reduce(torch.add, [w_of[c] for c in choice]) for choice in combinations(range(m), pattern.n)}
        reached: dict[_Columns, Tensor] = {}
        for used, choice, now in transitions:
            total = best[used] + sums[choice]
            reached[now] = torch.maximum(reached[now], total, out=total) if now in reached else total
        best = reached
    places_T = (reduce(torch.maximum, best.values()).long() & 0xFFFF).int()
    return (places_T & place_RM1).bool()


@lru_cache(maxsize=16)
def _transitions(rows: int, pattern: Pattern) -> list[list[tuple[_Columns, _Columns, _Columns]]]:
    """List, for each row, (how often each column is used before it, columns it may choose, how often after it)."""
    steps, reached = [], {(0,) * pattern.m}
    for left in reversed(range(rows)):
        every = product(sorted(reached), combinations(range(pattern.m), pattern.n))
        step = [(used, choice, tuple(n + (c in choice) for c, n in enumerate(used))) for used, choice in every]
        # All columns of a whole tile end at N, so that none may fall behind.
        least = pattern.n - left if rows == pattern.m else 0
        steps.append([(used, choice, now) for used, choice, now in step if max(now) <= pattern.n and min(now) >= least])
        reached = {now for _, _, now in steps[-1]}
    return steps


def _approximate(w_RMT: Tensor, pattern: Pattern) -> Tensor:
    """Descend the dual, one side's prices at a time; round what has not converged, which is mostly ties.

    Given the columns' prices, the best price of a row lies anywhere between its N-th and its next largest remainder:
    at the ends descent stalls, in the middle it does not.
    """
    rows, m, tiles = w_RMT.shape
    w_RMT += _jitter(w_RMT)
    mask_RMT = torch.empty(w_RMT.shape, dtype=torch.bool, device=w_RMT.device)
    open_T = torch.arange(tiles, device=w_RMT.device)
    price_1MT = torch.zeros_like(w_RMT[:1])
    for _ in range(_LOOKS):
        for _ in range(_STEPS):
            worth_RMT = w_RMT - _price((w_RMT - price_1MT).unbind(1), pattern.n).unsqueeze(1)
            if rows > pattern.n:
                price_1MT = _price(worth_RMT.unbind(0), pattern.n).unsqueeze(0)
            if rows < m:  # columns may keep fewer than N, so that room in them is free
                price_1MT = price_1MT.clamp(min=0)
        worth_RMT -= price_1MT
        kept_RMT = worth_RMT > 0
        mask_RMT.index_copy_(2, open_T, kept_RMT)
        # No column keeps more than N at its price; so where all rows keep N, whole columns do as well.
        still_T = (kept_RMT.sum(1, dtype=torch.int32) != pattern.n).any(0).nonzero().squeeze(1)
        open_T = open_T[still_T]
        if not len(open_T):
            return mask_RMT
        w_RMT, price_1MT = w_RMT.index_select(2, still_T), price_1MT.index_select(2, still_T)
    return mask_RMT.index_copy_(2, open_T, _greedy(worth_RMT.index_select(2, still_T), pattern))


def _jitter(w_RMT: Tensor) -> Tensor:
    """Tell equal weights apart, for prices alone cannot; alike in every tile, at every scale and on every device."""
    generator = torch.Generator().manual_seed(0)
    draws_RM1 = torch.rand(*w_RMT.shape[:2], 1, generator=generator, dtype=torch.float32).to(w_RMT.device)
    typical_T = w_RMT.sqrt().mean((0, 1)).square()  # one outlier hardly counts
    return _JITTER * typical_T * draws_RM1


def _price(planes: Sequence[Tensor], n: int) -> Tensor:
    """Give the middle between the n-th and the next largest of all planes, elementwise."""
    planes = list(planes)
    for i, j, lower, upper in _comparators(len(planes), n):
        x, y = planes[i], planes[j]
        if lower:
            planes[i] = torch.minimum(x, y)
        if upper:
            planes[j] = torch.maximum(x, y)
    return (planes[-n - 1] + planes[-n]) / 2


@lru_cache(maxsize=64)
def _comparators(count: int, n: int) -> list[tuple[int, int, bool, bool]]:
    """List what has to be compared for the n-th and the next largest: of two sorting networks, what these depend on.

    Returns:
        (i, j, whether the smaller goes to i and is needed, whether the larger goes to j and is needed).
    """
    bubble_sort = [(i, i + 1) for last in range(count - 1, 0, -1) for i in range(last)]  # the shorter one at n = 1
    networks = []
    for network in (bubble_sort, _odd_even_merge_sort(count)):
        needed, comparators = {count - n - 1, count - n}, []
        for i, j in reversed(network):
            if i in needed or j in needed:
                comparators.append((i, j, i in needed, j in needed))
                needed |= {i, j}
        networks.append(comparators[::-1])
    return min(networks, key=lambda comparators: sum(lower + upper for _, _, lower, upper in comparators))


def _odd_even_merge_sort(count: int) -> list[tuple[int, int]]:
    """List the comparators of Batcher's sorting network (1968), for any count."""
    network = []
    p = 1
    while p < count:
        k = p
        while k:
            for start in range(k % p, count - k, 2 * k):
                pairs = ((i, i + k) for i in range(start, min(start + k, count - k)))
                network += [(i, j) for i, j in pairs if i // (2 * p) == j // (2 * p)]
            k //= 2
        p *= 2
    return network


def _greedy(worth_RMT: Tensor, pattern: Pattern) -> Tensor:
    """Let each row in turn take the N best columns that have room.

    A column that has as much room as there are rows left, of a whole tile, comes first: then the rest can always be
    completed.
    """
    rows, m, tiles = worth_RMT.shape
    room_MT = torch.full((m, tiles), pattern.n, device=worth_RMT.device)
    mask_RMT = torch.zeros_like(worth_RMT, dtype=torch.bool)
    for row in range(rows):
        rank_MT = (room_MT > 0).int() + (room_MT >= m - row).int()
        by_worth = worth_RMT[row].argsort(dim=0, descending=True, stable=True)
        by_rank = rank_MT.gather(0, by_worth).argsort(dim=0, descending=True, stable=True)
        mask_RMT[row].scatter_(0, by_worth.gather(0, by_rank)[: pattern.n], True)
        room_MT -= mask_RMT[row].long()
    return mask_RMT
