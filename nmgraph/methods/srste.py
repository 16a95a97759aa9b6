"""SR-STE: Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch (ICLR 2021, arXiv 2102.04010).

The mask is the N largest magnitudes of every block, chosen anew in every forward. The gradient passes straight
through to all weights, and those that are masked at the moment are pulled towards zero. The number of weights kept
may fall gradually from M to N, as in Table 5 of LBC (Zhang et al., NeurIPS 2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nmgraph.methods.contract import Clock, Method, Preset, Update, Work
from nmgraph.methods.schedule import check_phase, check_range, kept_count, ramp
from nmgraph.nm.fused import Blockwise, zero_outside
from nmgraph.nm.masks import magnitude_mask
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.straight_through import largest_straight_through


def refined(grad_OSC: Tensor, w_OSC: Tensor, mask_OSC: Tensor, decay: float) -> Tensor:
    """Add SR-STE's decay of the masked weights to a gradient (Eq. 9): ``G + λ (1 - B) W``; rounded once."""
    wide = torch.promote_types(grad_OSC.dtype, torch.float32)
    return (grad_OSC.to(wide) + decay * zero_outside(~mask_OSC, w_OSC.to(wide))).to(grad_OSC.dtype)


def refined_by_magnitude(
    grad_OSC: Tensor, w_OSC: Tensor, pattern: Pattern, decay: float, keep: int | Tensor | None = None
) -> Tensor:
    """Do :func:`refined` under the mask of the N largest magnitudes, or of ``keep``, in one pass."""
    return _refining(decay)(pattern.m, pattern.n if keep is None else keep, grad_OSC, w_OSC)


@lru_cache(maxsize=16)
def _refining(decay: float) -> Blockwise:
    return Blockwise(lambda grad, w: w.abs(), lambda kept, grad, w: refined(grad, w, kept, decay))


class SRSTEState(NamedTuple):
    """State of one weight.

    Attributes:
        keep: int64 scalar, weights kept of every block at the moment.
    """

    keep: Tensor


@dataclass(frozen=True)
class SRSTE(Method[SRSTEState]):
    """Straight-through estimator with a decay of the masked weights.

    Attributes:
        decay: λ, added to the gradient as ``λ (1 - B) W``; the paper's 2e-4. 0 gives the plain STE.
        t_i: when the number of kept weights begins to fall from M, as a fraction of all steps.
        t_f: when it has come to N; 0 keeps N from the first step on, as the paper does.
        curve: how it falls: ``cubic`` or ``linear``.

    Raises:
        MethodError: if a value lies outside its range.
    """

    name: ClassVar[str] = "srste"
    title: ClassVar[str] = "Sparse-refined straight-through estimator"
    paper: ClassVar[str] = "Zhou et al., ICLR 2021"
    gradient: ClassVar[str] = "dense, straight through; masked weights decay"
    state_cost: ClassVar[str] = "none"
    time_cost: ClassVar[str] = "one pass over the weight per forward, one per step"
    unattached: ClassVar[str] = "its decay, and its gradual phase if it has one, do not run"
    state_type: ClassVar[type[tuple[Any, ...]]] = SRSTEState
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"curve": ("cubic", "linear")}
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            {"decay": 2e-4},
            "SGD, momentum 0.9, weight decay 5e-5, learning rate 0.1 at batch 256, 5 epochs of warm-up, "
            "cosine per step to 0, 120 epochs (ResNet on ImageNet)",
            keep_dense=("head",),
        ),
        "code": Preset(
            {"decay": 2e-4},
            "as the paper's; its published numbers were made so",
            keep_dense=("head",),
            block_axis="flat",
        ),
    }

    decay: float = 2e-4
    t_i: float = 0.0
    t_f: float = 0.0
    curve: str = "cubic"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.name, "decay", self.decay, 0.0, math.inf, "the paper's is 2e-4")
        check_phase(self.name, self.t_i, self.t_f)

    @property
    def needs_attach(self) -> bool:
        """Only the decay and the gradual phase need the step hook."""
        return self.decay > 0 or self.t_f > 0

    def kept(self, progress: float, pattern: Pattern) -> int:
        """Count the weights kept of a block by then."""
        return kept_count(ramp(progress, self.t_i, self.t_f), pattern, self.curve)

    def init(self, w_OSC: Tensor, pattern: Pattern) -> SRSTEState:
        return SRSTEState(torch.tensor(self.kept(0.0, pattern), device=w_OSC.device))

    @property
    def straight_through(self) -> bool:
        return True

    def work(self, pattern: Pattern, clock: Clock) -> Work:
        density = self.kept(clock.progress_before, pattern) / pattern.m
        return Work(density, density, 1.0)

    def mask(self, w_OSC: Tensor, state: SRSTEState, pattern: Pattern) -> Tensor:
        return magnitude_mask(w_OSC.detach(), pattern, state.keep)

    def forward_weight(self, w_OSC: Tensor, state: SRSTEState, pattern: Pattern) -> Tensor:
        return largest_straight_through(w_OSC, pattern, state.keep)  # Eq. 4 and 7

    def update(self, w_OSC: Tensor, grad_OSC: Tensor, state: SRSTEState, pattern: Pattern, clock: Clock) -> Update:
        # Here and not in backward, where gradient accumulation would multiply the decay and a loss scale divide it.
        if self.decay:
            grad_OSC = refined_by_magnitude(grad_OSC, w_OSC, pattern, self.decay, state.keep)
        return Update(SRSTEState(torch.full_like(state.keep, self.kept(clock.progress, pattern))), grad_OSC)

    def conclude(self, w_OSC: Tensor, state: SRSTEState, pattern: Pattern) -> SRSTEState:
        return SRSTEState(torch.full_like(state.keep, pattern.n))
