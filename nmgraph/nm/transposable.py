"""Transposable masks: N:M along rows and along columns at once (Hubara et al., NeurIPS 2021).

Every M x M tile of ``w_OC`` keeps exactly N weights of each row and of each column, with the largest sum of
magnitudes. Where there are few such masks (2:4 has 90) all of them are tried. Elsewhere the linear relaxation is
solved softly (Dykstra's projections, as TSENOR does, arXiv 2505.23949), rounded greedily, repaired, and improved by
exchanges of two rows and two columns until none helps.

Legend: T tiles, M rows and columns of a tile, R rows of the last one, P masks that exist.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations, product

import torch
from torch import Tensor

from nmgraph.nm.pattern import Pattern

_ENUMERATED_M = 4
_CHUNK_ELEMENTS = 1 << 22  # of the largest temporary, to bound its memory
_SHARPNESS = 100.0  # of the soft mask; as far as the largest magnitude of a tile outweighs none
_PROJECTIONS = 200
_MAX_EXCHANGES = 10_000  # never reached: every exchange raises the sum


def is_exact(pattern: Pattern) -> bool:
    """Tell whether the best transposable mask is found for certain."""
    return pattern.m <= _ENUMERATED_M


def transposable_mask(w_OSC: Tensor, pattern: Pattern) -> Tensor:
    """Keep N of M along C and, at every kernel position, at most N of M along O, with the most magnitude.

    Args:
        w_OSC: a weight; C must be a multiple of M. Where M does not divide O, the last tiles have fewer rows.
        pattern: N:M.

    Returns:
        bool ``[O, S, C]``: every block along C keeps exactly N, every M aligned rows of a column at most N.
    """
    whole = w_OSC.shape[0] // pattern.m * pattern.m
    parts = [w_OSC.detach().abs().float()[rows] for rows in (slice(whole), slice(whole, None))]
    return torch.cat([_mask_tiles(part, pattern, min(pattern.m, len(part))) for part in parts if len(part)])


def _mask_tiles(w_OSC: Tensor, pattern: Pattern, rows: int) -> Tensor:
    """Mask tiles of so many rows, R, and M columns."""
    outputs, positions, channels = w_OSC.shape
    tiles = w_OSC.reshape(-1, rows, positions, channels // pattern.m, pattern.m).permute(0, 2, 3, 1, 4)
    w_TRM = tiles.reshape(-1, rows, pattern.m)
    solve, width = (_enumerate, len(_all_masks(pattern, rows))) if is_exact(pattern) else (_approximate, pattern.m**3)
    mask = torch.cat([solve(chunk, pattern) for chunk in torch.split(w_TRM, max(1, _CHUNK_ELEMENTS // width))])
    return mask.reshape(tiles.shape).permute(0, 3, 1, 2, 4).reshape(outputs, positions, channels)


def _enumerate(w_TRM: Tensor, pattern: Pattern) -> Tensor:
    # In float64, where neither TF32 nor autocast rounds a ranking.
    masks_PRM = torch.tensor(_all_masks(pattern, w_TRM.shape[1]), dtype=torch.float64, device=w_TRM.device)
    scores_TP = w_TRM.flatten(1).double() @ masks_PRM.flatten(1).T
    return masks_PRM[scores_TP.argmax(-1)].bool()


@lru_cache(maxsize=16)
def _all_masks(pattern: Pattern, rows: int) -> list[tuple[tuple[int, ...], ...]]:
    """List every mask of so many rows with N in each row and at most N in each column."""
    choices = combinations(range(pattern.m), pattern.n)
    row_masks = [tuple(int(i in chosen) for i in range(pattern.m)) for chosen in choices]
    masks = product(row_masks, repeat=rows)
    return [mask for mask in masks if all(sum(column) <= pattern.n for column in zip(*mask, strict=True))]


def _approximate(w_TRM: Tensor, pattern: Pattern) -> Tensor:
    rows = w_TRM.shape[1]
    # A short tile becomes a whole one with rows of zeros. These take their part of each column, so that what is
    # left need not be the best of the short tile.
    w_TMM = torch.nn.functional.pad(w_TRM, (0, 0, 0, pattern.m - rows))
    mask_TMM = _greedy(_soft_mask(w_TMM, pattern), pattern)
    mask_TMM = _saturate(w_TMM, mask_TMM, pattern)
    return _exchange(w_TMM, mask_TMM)[:, :rows]


def _soft_mask(w_TMM: Tensor, pattern: Pattern) -> Tensor:
    """Project ``exp(sharpness |w|)`` onto row sums N, column sums N and entries <= 1, in log space."""
    log_n = torch.log(torch.tensor(float(pattern.n)))
    largest_T11 = w_TMM.amax((1, 2), keepdim=True).clamp(min=torch.finfo(w_TMM.dtype).tiny)
    s = _SHARPNESS * w_TMM / largest_T11
    q = torch.zeros_like(s)  # Dykstra's correction of the one projection that is not affine
    for _ in range(_PROJECTIONS):
        s = s - s.logsumexp(2, keepdim=True) + log_n
        s = s - s.logsumexp(1, keepdim=True) + log_n
        corrected = s + q
        s = corrected.clamp(max=0.0)
        q = corrected - s
    return s


def _greedy(scores_TMM: Tensor, pattern: Pattern) -> Tensor:
    """Take entries by descending score wherever their row and their column have room."""
    tiles, m, _ = scores_TMM.shape
    order = scores_TMM.flatten(1).argsort(dim=-1, descending=True, stable=True)
    every = torch.arange(tiles, device=scores_TMM.device)
    rows_TM = torch.full((tiles, m), pattern.n, device=scores_TMM.device)
    columns_TM = rows_TM.clone()
    mask_TMM = torch.zeros_like(scores_TMM, dtype=torch.bool)
    for entry_T in order.unbind(1):
        row_T, column_T = entry_T // m, entry_T % m
        takes_T = (rows_TM[every, row_T] > 0) & (columns_TM[every, column_T] > 0)
        mask_TMM[every, row_T, column_T] = takes_T
        rows_TM[every, row_T] -= takes_T.long()
        columns_TM[every, column_T] -= takes_T.long()
    return mask_TMM


def _saturate(w_TMM: Tensor, mask_TMM: Tensor, pattern: Pattern) -> Tensor:
    """Fill rows and columns that have room left, by rerouting one kept entry each time.

    A row i and a column j that lack an entry mostly hold (i, j) already, or it would have been taken. Where all such
    pairs do, some (a, b) is kept with (i, b) and (a, j) free; it gives way to these two.
    """
    mask_TMM = mask_TMM.clone()
    while True:
        lacking_T = (mask_TMM.sum((1, 2)) < pattern.n * pattern.m).nonzero().flatten()
        if not len(lacking_T):
            return mask_TMM
        w, kept = w_TMM[lacking_T], mask_TMM[lacking_T]
        every = torch.arange(len(w), device=w.device)
        lack = (kept.sum(2) < pattern.n).unsqueeze(2) & (kept.sum(1) < pattern.n).unsqueeze(1)
        pair = (lack.long() + (lack & ~kept)).flatten(1).argmax(1)  # a free one first
        i, j = pair // w.shape[1], pair % w.shape[1]
        gain = w[every, i].unsqueeze(1) + w[every, :, j].unsqueeze(2) - w
        possible = kept & ~kept[every, i].unsqueeze(1) & ~kept[every, :, j].unsqueeze(2)
        best = gain.masked_fill(~possible, -torch.inf).flatten(1).argmax(1)
        a, b = best // w.shape[1], best % w.shape[1]
        held = kept[every, i, j]
        mask_TMM[lacking_T[held], a[held], b[held]] = False
        mask_TMM[lacking_T[held], i[held], b[held]] = True
        mask_TMM[lacking_T[held], a[held], j[held]] = True
        mask_TMM[lacking_T, i, j] = True


def _exchange(w_TMM: Tensor, mask_TMM: Tensor) -> Tensor:
    """Swap (a, p), (b, q) for (a, q), (b, p) while that raises a tile's sum; best swap first."""
    mask_TMM = mask_TMM.clone()
    active_T = torch.arange(len(w_TMM), device=w_TMM.device)
    for _ in range(_MAX_EXCHANGES):
        w, kept = w_TMM[active_T], mask_TMM[active_T]
        # What column p gains if its entry moves from row a to row b; the two moves of a swap are independent.
        gain_TabM = (w.unsqueeze(1) - w.unsqueeze(2)).masked_fill(~(kept.unsqueeze(2) & ~kept.unsqueeze(1)), -torch.inf)
        gain_Tab, column_Tab = gain_TabM.max(-1)
        total_T, best_T = (gain_Tab + gain_Tab.transpose(1, 2)).flatten(1).max(1)
        every, m = torch.arange(len(w), device=w.device), w.shape[1]
        a, b = best_T // m, best_T % m
        p, q = column_Tab[every, a, b], column_Tab[every, b, a]
        # More than rounding, or two equal sums would swap for ever.
        better_T = total_T > 1e-6 * (w[every, a, q] + w[every, b, p])
        if not bool(better_T.any()):
            break
        active_T, a, b, p, q = (t[better_T] for t in (active_T, a, b, p, q))
        mask_TMM[active_T, a, p] = False
        mask_TMM[active_T, b, q] = False
        mask_TMM[active_T, b, p] = True
        mask_TMM[active_T, a, q] = True
    return mask_TMM
