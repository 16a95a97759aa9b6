"""N:M along the rows of a weight, under a permutation of its rows: what an accelerated input gradient needs.

``dX = dY W`` sums over the rows (output channels) of W, and permuting rows of W along with columns of dY changes
nothing about it. So a backward mask may form its blocks of any M rows: those that are neighbours in ``W[P]``.
Where M does not divide the rows, the last block is shorter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmgraph.nm.fused import Blockwise
from nmgraph.nm.grouping import in_memory_order, memory_order
from nmgraph.nm.masks import LARGEST
from nmgraph.nm.pattern import Pattern

_best = Blockwise(
    lambda w, scores: torch.where(w != 0, scores, -1.0).to(scores.dtype),
    lambda kept, w, scores: torch.where(kept, w, 0.0),
)


def column_sparse(
    w_OSC: Tensor,
    permutation_O: Tensor,
    pattern: Pattern,
    keep: int | Tensor | None = None,
    scores_OSC: Tensor | None = None,
) -> Tensor:
    """Zero, per column, all but the N best weights of every M rows that are neighbours under the permutation.

    Args:
        w_OSC: a weight, zero where the forward mask is: these places are never among the best.
        permutation_O: int64, row ``i`` of the permuted weight is row ``permutation_O[i]`` of the weight.
        pattern: N:M.
        keep: how many to keep of M, if not N.
        scores_OSC: what to rank by, >= 0; by default the magnitude.

    Returns:
        ``[O, S, C]`` in the weight's own row and memory order.

    >>> column_sparse(torch.tensor([[[1.0]], [[2.0]], [[3.0]], [[4.0]]]), torch.tensor([0, 3, 1, 2]), Pattern(1, 2)).flatten()
    tensor([0., 0., 3., 4.])
    """
    order = memory_order(w_OSC)
    rows = order.index(0)
    given = [in_memory_order(t, order) for t in (w_OSC.detach(), scores_OSC) if t is not None]
    permuted = [_filled_up(t.index_select(rows, permutation_O), rows, pattern.m) for t in given]
    kept = (LARGEST if scores_OSC is None else _best)(
        pattern.m, pattern.n if keep is None else keep, *permuted, dim=rows
    )
    found = kept.index_select(rows, permutation_O.argsort())
    return found.permute([order.index(axis) for axis in range(3)])


def eligible_blocks(mask_OSC: Tensor, permutation_O: Tensor, pattern: Pattern) -> int:
    """Count the blocks of M permuted rows with at most N weights, which a backward mask leaves whole."""
    return int((_row_counts(mask_OSC, permutation_O, pattern) <= pattern.n).sum())


def kept_weights(mask_OSC: Tensor, permutation_O: Tensor, pattern: Pattern) -> int:
    """Count the weights that a backward mask of the permuted rows leaves."""
    return int(_row_counts(mask_OSC, permutation_O, pattern).clamp(max=pattern.n).sum())


OBJECTIVES = {"blocks": eligible_blocks, "kept": kept_weights}


def best_permutation(
    mask_OSC: Tensor, pattern: Pattern, candidates: int, objective: str, generator: torch.Generator
) -> Tensor:
    """Draw row permutations and take the best, of equals the first; int64 ``[O]`` on the mask's device.

    Args:
        mask_OSC: bool, the forward mask.
        pattern: N:M.
        candidates: how many to draw.
        objective: ``"blocks"``, most :func:`eligible_blocks`; ``"kept"``, most :func:`kept_weights`.
        generator: on the CPU.
    """
    rows = mask_OSC.shape[0]
    drawn = (torch.randperm(rows, generator=generator).to(mask_OSC.device) for _ in range(candidates))
    return max(drawn, key=lambda permutation: OBJECTIVES[objective](mask_OSC, permutation, pattern))


def _filled_up(t: Tensor, axis: int, m: int) -> Tensor:
    """Fill the last block along an axis up with zeros."""
    missing = -t.shape[axis] % m
    shape = [missing if place == axis else size for place, size in enumerate(t.shape)]
    return torch.cat([t, t.new_zeros(shape)], axis) if missing else t


def _row_blocks(t_OSC: Tensor, m: int, fill: float) -> Tensor:
    """Split rows into blocks, ``[O, S, C] -> [ceil(O / M), M, S, C]``; a short last one is filled up."""
    padded = torch.nn.functional.pad(t_OSC, (0, 0, 0, 0, 0, -t_OSC.shape[0] % m), value=fill)
    return padded.reshape(-1, m, *t_OSC.shape[1:])


def _row_counts(mask_OSC: Tensor, permutation_O: Tensor, pattern: Pattern) -> Tensor:
    return _row_blocks(mask_OSC.to(torch.uint8)[permutation_O], pattern.m, 0).sum(1, dtype=torch.uint8)
