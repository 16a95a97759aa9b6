"""Choose N of M, and check that a weight keeps to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nmgraph.nm.fused import Blockwise, top_n, zero_outside
from nmgraph.nm.grouping import blocks
from nmgraph.nm.pattern import Pattern

_by_magnitude = Blockwise(torch.abs)
_by_magnitude_within = Blockwise(lambda w, mask: torch.where(mask, w.abs(), -1.0))
LARGEST = Blockwise(torch.abs, zero_outside)


def magnitude_mask(w_OSC: Tensor, pattern: Pattern, keep: int | Tensor | None = None) -> Tensor:
    """Keep the N largest magnitudes of every block, or ``keep`` of them; bool ``[O, S, C]``."""
    return _by_magnitude(pattern.m, pattern.n if keep is None else keep, w_OSC)


def largest(w_OSC: Tensor, pattern: Pattern, keep: int | Tensor | None = None) -> Tensor:
    """Give the weight, and zero where :func:`magnitude_mask` drops it."""
    return LARGEST(pattern.m, pattern.n if keep is None else keep, w_OSC)


def prune_further(w_OSC: Tensor, mask_OSC: Tensor, pattern: Pattern, keep: int) -> Tensor:
    """Keep, of what every block keeps by now, the ``keep`` largest magnitudes; a kept zero counts before what is masked."""
    return _by_magnitude_within(pattern.m, keep, w_OSC, mask_OSC) & mask_OSC


def magnitude(weight: Tensor) -> float:
    """Add up the magnitudes of a weight, in float64."""
    return float(weight.abs().sum(dtype=torch.float64))


def random_mask(shape: tuple[int, ...], pattern: Pattern, generator: torch.Generator) -> Tensor:
    """Keep N weights of every block at random; bool of ``shape``, on the generator's device."""
    draws_OSGM = blocks(torch.rand(shape, generator=generator, dtype=torch.float32, device=generator.device), pattern.m)
    return top_n(draws_OSGM, pattern.n).flatten(-2)


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
