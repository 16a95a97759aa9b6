"""SR-STE: Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch (ICLR 2021, arXiv 2102.04010).

The mask is the N largest magnitudes of every block, chosen anew in every forward. The gradient passes straight
through to all weights, and those that are masked at the moment are pulled towards zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from nmgraph.errors import MethodError
from nmgraph.methods.contract import Clock, Method, Operand, Update
from nmgraph.nm.masks import magnitude_mask
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.straight_through import straight_through


class SRSTEState(NamedTuple):
    """Nothing: the mask follows from the weights."""


@dataclass(frozen=True)
class SRSTE(Method[SRSTEState]):
    """Straight-through estimator with a decay of the masked weights.

    Attributes:
        decay: λ, added to the gradient as ``λ (1 - B) W``; the paper's 2e-4. 0 gives the plain STE.

    Raises:
        MethodError: if ``decay`` is negative or not finite.
    """

    name: ClassVar[str] = "srste"
    title: ClassVar[str] = "Sparse-refined straight-through estimator"
    paper: ClassVar[str] = "Zhou et al., ICLR 2021"
    gradient: ClassVar[str] = "dense, straight through; masked weights decay"
    state_cost: ClassVar[str] = "none"
    time_cost: ClassVar[str] = "one sort of every block per forward"
    unattached: ClassVar[str] = "masked weights do not decay"
    state_type: ClassVar[type[tuple[Any, ...]]] = SRSTEState

    decay: float = 2e-4

    def __post_init__(self) -> None:
        if not (math.isfinite(self.decay) and self.decay >= 0):
            raise MethodError(f"srste: decay={self.decay} must be 0 or a positive number; the paper's is 2e-4.")

    @property
    def needs_attach(self) -> bool:
        """Only the decay needs the step hook."""
        return self.decay > 0

    def init(self, w_OSC: Tensor, pattern: Pattern) -> SRSTEState:
        return SRSTEState()

    def mask(self, w_OSC: Tensor, state: SRSTEState, pattern: Pattern) -> Tensor:
        return magnitude_mask(w_OSC.detach(), pattern)

    def operand(self, w_OSC: Tensor, state: SRSTEState, pattern: Pattern) -> Operand:
        return Operand(straight_through(w_OSC, self.mask(w_OSC, state, pattern)))  # Eq. 4 and 7

    def update(self, w_OSC: Tensor, grad_OSC: Tensor, state: SRSTEState, pattern: Pattern, clock: Clock) -> Update:
        # Eq. 9: G + λ (1 - B) W. Here and not in backward, where gradient accumulation would multiply the decay
        # and a loss scale divide it.
        decayed = w_OSC.masked_fill(self.mask(w_OSC, state, pattern), 0.0)
        return Update(state, grad_OSC + self.decay * decayed)
