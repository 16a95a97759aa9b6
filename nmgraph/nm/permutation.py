"""N:M along the rows of a weight, under a permutation of its rows: what an accelerated input gradient needs.

``dX = dY W`` sums over the rows (output channels) of W, and permuting rows of W along with columns of dY changes
nothing about it. So a backward mask may form its blocks of any M rows: those that are neighbours in ``W[P]``.
Where M does not divide the rows, the last block is shorter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmgraph.nm.masks import top_n
from nmgraph.nm.pattern import Pattern


def column_mask(
    scores_OSC: Tensor, live_OSC: Tensor, permutation_O: Tensor, pattern: Pattern, keep: int | Tensor | None = None
) -> Tensor:
    """Keep the N highest-scored live weights of every M rows that are neighbours under the permutation, per column.

    Args:
        scores_OSC: what to rank by, >= 0.
        live_OSC: bool, weights that may be kept at all.
        permutation_O: int64, row ``i`` of the permuted weight is row ``permutation_O[i]`` of the weight.
        pattern: N:M.
        keep: how many to keep of M, if not N.

    Returns:
        bool ``[O, S, C]`` in the weight's own row order, inside ``live_OSC``.

    >>> column_mask(torch.tensor([[[1.0]], [[2.0]], [[3.0]], [[4.0]]]), torch.ones(4, 1, 1, dtype=torch.bool),
    ...             torch.tensor([0, 3, 1, 2]), Pattern(1, 2)).flatten()
    tensor([False, False,  True,  True])
    """
    ranked = scores_OSC.masked_fill(~live_OSC, -1.0)[permutation_O]
    blocks_GSCM = _row_blocks(ranked, pattern.m, -1.0).movedim(1, -1)
    kept = top_n(blocks_GSCM, pattern.n if keep is None else keep).movedim(-1, 1)
    kept_permuted = kept.reshape(-1, *live_OSC.shape[1:])[: live_OSC.shape[0]]
    return torch.zeros_like(live_OSC).index_copy(0, permutation_O, kept_permuted) & live_OSC


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


def _row_blocks(t_OSC: Tensor, m: int, fill: float) -> Tensor:
    """Split rows into blocks, ``[O, S, C] -> [ceil(O / M), M, S, C]``; a short last one is filled up."""
    padded = torch.nn.functional.pad(t_OSC, (0, 0, 0, 0, 0, -t_OSC.shape[0] % m), value=fill)
    return padded.reshape(-1, m, *t_OSC.shape[1:])


def _row_counts(mask_OSC: Tensor, permutation_O: Tensor, pattern: Pattern) -> Tensor:
    return _row_blocks(mask_OSC.to(torch.uint8)[permutation_O], pattern.m, 0).sum(1, dtype=torch.uint8)
