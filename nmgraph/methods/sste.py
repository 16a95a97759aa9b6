"""S-STE: Hu et al., S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training (NeurIPS 2024, arXiv 2409.09099).

What survives in a block is moved towards zero by the largest magnitude that does not. So the weight multiplied by is
a continuous function of the weight trained, and no mask flips with a jump; a fixed factor makes up for the
shrinking. The gradient passes straight through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nmgraph.methods.contract import Clock, Method, Preset, Update, Work
from nmgraph.nm.grouping import blocks
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.straight_through import replaced


class SSTEState(NamedTuple):
    """State of one weight.

    Attributes:
        scale: float32 scalar β, computed at conversion.
    """

    scale: Tensor


@dataclass(frozen=True)
class SSTE(Method[SSTEState]):
    """Soft threshold with a frozen scale. It has no options."""

    name: ClassVar[str] = "sste"
    title: ClassVar[str] = "Continuous pruning function"
    paper: ClassVar[str] = "Hu et al., NeurIPS 2024"
    gradient: ClassVar[str] = "dense, straight through"
    state_cost: ClassVar[str] = "none"
    time_cost: ClassVar[str] = "one sort of every block per forward"
    unattached: ClassVar[str] = "nothing"
    state_type: ClassVar[type[tuple[Any, ...]]] = SSTEState
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset({}, "as the dense network; in the paper only feed-forward layers of transformers at 2:4"),
    }

    @property
    def needs_attach(self) -> bool:
        """Nothing happens in a step."""
        return False

    def init(self, w_OSC: Tensor, pattern: Pattern) -> SSTEState:
        w_OSC = w_OSC.double().contiguous()  # so that a sum does not depend on the memory format
        s_OSC = soft_threshold(w_OSC, pattern)
        scale = (w_OSC * s_OSC).sum() / s_OSC.square().sum()  # least squares of W by β S(W)
        return SSTEState(torch.where(torch.isfinite(scale), scale, torch.ones_like(scale)).float())

    @property
    def straight_through(self) -> bool:
        return True

    def work(self, pattern: Pattern, clock: Clock) -> Work:
        return Work(pattern.density, pattern.density, 1.0)

    def mask(self, w_OSC: Tensor, state: SSTEState, pattern: Pattern) -> Tensor:
        return soft_threshold(w_OSC.detach(), pattern) != 0

    def forward_weight(self, w_OSC: Tensor, state: SSTEState, pattern: Pattern) -> Tensor:
        return replaced(w_OSC, state.scale * soft_threshold(w_OSC.detach(), pattern))

    def update(self, w_OSC: Tensor, grad_OSC: Tensor, state: SSTEState, pattern: Pattern, clock: Clock) -> Update:
        return Update(state, grad_OSC)


def soft_threshold(w_OSC: Tensor, pattern: Pattern) -> Tensor:
    """Shrink every block by its (M-N)-th smallest magnitude: at most N stay, fewer where magnitudes are equal.

    >>> soft_threshold(torch.tensor([[[3.0, -5.0, 1.0, 2.0]]]), Pattern(2, 4))
    tensor([[[ 1., -3.,  0.,  0.]]])
    """
    w_OSGM = blocks(w_OSC, pattern.m)
    threshold_OSG1 = w_OSGM.abs().kthvalue(pattern.m - pattern.n, dim=-1, keepdim=True).values
    shrunk_OSGM = (w_OSGM.abs() - threshold_OSG1).clamp(min=0.0)
    return torch.where(shrunk_OSGM > 0, shrunk_OSGM.copysign(w_OSGM), 0.0).flatten(-2)
