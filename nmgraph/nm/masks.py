"""Choose N of M, and check that a weight keeps to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nmgraph.nm.grouping import blocks
from nmgraph.nm.pattern import Pattern


def top_n(scores: Tensor, n: int) -> Tensor:
    """Mark the ``n`` highest scores of the last axis: exactly n, of equals the ones with the lowest index.

    Args:
        scores: ``[..., M]``, any real dtype, finite.
        n: how many to mark, ``0 <= n <= M``.

    Returns:
        bool ``[..., M]``.

    >>> top_n(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), 2)
    tensor([[False,  True,  True, False]])
    """
    # A plain topk keeps an arbitrary one of equals, and another one on another device or rank.
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)


def magnitude_mask(w_OSC: Tensor, pattern: Pattern) -> Tensor:
    """Keep the N largest magnitudes of every block; bool ``[O, S, C]``."""
    return top_n(blocks(w_OSC.abs(), pattern.m), pattern.n).flatten(-2)


@dataclass(frozen=True)
class BlockCheck:
    """What a check of all blocks found.

    Attributes:
        blocks: how many blocks there are.
        violations: how many keep more than N.
        worst: (output channel, kernel position, block) of the first block with the most non-zeros.
        worst_count: its number of non-zeros.
        density: share of non-zero weights.
    """

    blocks: int
    violations: int
    worst: tuple[int, int, int]
    worst_count: int
    density: float

    @property
    def holds(self) -> bool:
        """Tell whether no block keeps more than N."""
        return self.violations == 0


def check_blocks(w_OSC: Tensor, pattern: Pattern) -> BlockCheck:
    """Count the non-zeros of every block; NaN counts as a non-zero.

    Args:
        w_OSC: a weight or a mask; its last axis must be a multiple of M.
        pattern: what every block has to keep to.
    """
    counts_OSG = blocks(w_OSC != 0, pattern.m).sum(-1)
    flat = int(counts_OSG.argmax())
    _, positions, groups = counts_OSG.shape
    return BlockCheck(
        blocks=counts_OSG.numel(),
        violations=int((counts_OSG > pattern.n).sum()),
        worst=(flat // (positions * groups), flat // groups % positions, flat % groups),
        worst_count=int(counts_OSG.max()),
        density=float(counts_OSG.sum()) / w_OSC.numel(),
    )
