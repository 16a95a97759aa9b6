"""Decaying mask: Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers (CPAL 2025, arXiv 2402.04744).

Weights outside the mask are multiplied by a factor that falls from 1 to 0 (MDGF). So they leave the network, and
their gradient fades, little by little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nmgraph.methods.contract import Clock, Method, Preset, Update, Work
from nmgraph.methods.schedule import check_phase, check_range, ramp
from nmgraph.nm.masks import magnitude_mask
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.straight_through import masked, replaced


class DecayingMaskState(NamedTuple):
    """State of one weight.

    Attributes:
        factor: float32 scalar δ, what weights outside the mask are multiplied by.
    """

    factor: Tensor


@dataclass(frozen=True)
class DecayingMask(Method[DecayingMaskState]):
    """Progressive gradient flow.

    Attributes:
        t_i: end of the dense phase, as a fraction of all steps.
        t_f: when weights outside the mask are gone.
        curve: how δ falls: ``exponential``, e^(-rate x), or ``linear``, 1 - x.
        rate: of the exponential; what is left of it at t_f is cut off.
        gradient_flow: ``faded``, the gradient is multiplied by δ where the weight is, or ``dense`` (the
            official code), it passes straight through.

    Raises:
        MethodError: if a value lies outside its range.
    """

    name: ClassVar[str] = "decaying-mask"
    title: ClassVar[str] = "Progressive gradient flow"
    paper: ClassVar[str] = "Bambhaniya et al., CPAL 2025"
    gradient: ClassVar[str] = "dense at first; of masked weights it fades to 0"
    state_cost: ClassVar[str] = "none"
    time_cost: ClassVar[str] = "a mask by magnitude per forward"
    unattached: ClassVar[str] = "masked weights do not fade"
    state_type: ClassVar[type[tuple[Any, ...]]] = DecayingMaskState
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "curve": ("exponential", "linear"),
        "gradient_flow": ("faded", "dense"),
    }
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            {"curve": "exponential"},
            "as the dense network (ViT-Base on ImageNet: AdamW, 350 epochs): a dense phase, decay, fine-tuning under a binary mask",
        ),
        "code": Preset({"curve": "exponential", "gradient_flow": "dense"}, "as the paper's"),
    }

    t_i: float = 0.0
    t_f: float = 0.75
    curve: str = "exponential"
    rate: float = 7.0
    gradient_flow: str = "faded"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_phase(self.name, self.t_i, self.t_f)
        check_range(self.name, "rate", self.rate, 0.0, math.inf)

    def factor(self, progress: float) -> float:
        """Give δ at that time."""
        x = ramp(progress, self.t_i, self.t_f)
        if x >= 1:
            return 0.0
        return math.exp(-self.rate * x) if self.curve == "exponential" else 1.0 - x

    def init(self, w_OSC: Tensor, pattern: Pattern) -> DecayingMaskState:
        return DecayingMaskState(torch.tensor(self.factor(0.0), dtype=torch.float32, device=w_OSC.device))

    @property
    def straight_through(self) -> bool:
        return self.gradient_flow != "faded"

    def work(self, pattern: Pattern, clock: Clock) -> Work:
        density = 1.0 if self.factor(clock.progress_before) > 0 else pattern.density
        return Work(density, density, density if self.gradient_flow == "faded" else 1.0)

    def mask(self, w_OSC: Tensor, state: DecayingMaskState, pattern: Pattern) -> Tensor:
        return magnitude_mask(w_OSC.detach(), pattern) | (state.factor > 0)

    def forward_weight(self, w_OSC: Tensor, state: DecayingMaskState, pattern: Pattern) -> Tensor:
        mask, factor = magnitude_mask(w_OSC.detach(), pattern), state.factor.to(w_OSC.dtype)
        # Where δ has come to 0, zero is meant, whatever it is a multiple of.
        value = masked(torch.where(mask, w_OSC, factor * w_OSC), mask | (factor > 0))
        return value if self.gradient_flow == "faded" else replaced(w_OSC, value)

    def update(
        self, w_OSC: Tensor, grad_OSC: Tensor, state: DecayingMaskState, pattern: Pattern, clock: Clock
    ) -> Update:
        return Update(DecayingMaskState(torch.full_like(state.factor, self.factor(clock.progress))), grad_OSC)

    def conclude(self, w_OSC: Tensor, state: DecayingMaskState, pattern: Pattern) -> DecayingMaskState:
        return DecayingMaskState(torch.zeros_like(state.factor))
