"""T-Mask: Hubara et al., Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks (NeurIPS 2021).

One mask that is N:M along rows and along columns, so that both ``Y = X Wᵀ`` and ``dX = dY W`` multiply by an N:M
weight. It is searched anew every 40 steps; between, and through it, the gradient goes straight to all weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from nmgraph.methods.contract import Clock, Method, Preset, Update, Work
from nmgraph.methods.schedule import check_range
from nmgraph.methods.srste import refined
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.straight_through import straight_through
from nmgraph.nm.transposable import transposable_mask


class TMaskState(NamedTuple):
    """State of one weight.

    Attributes:
        mask: bool ``[O, S, C]``, transposable.
    """

    mask: Tensor


@dataclass(frozen=True)
class TMask(Method[TMaskState]):
    """Transposable masks.

    Attributes:
        interval: steps between two searches; the paper's 40.
        decay: of masked weights as in SR-STE, ``λ (1 - B) W`` on the gradient; 0, as the paper, is the plain STE.

    Raises:
        MethodError: if a value lies outside its range.
    """

    name: ClassVar[str] = "tmask"
    title: ClassVar[str] = "Transposable masks"
    paper: ClassVar[str] = "Hubara et al., NeurIPS 2021"
    gradient: ClassVar[str] = "dense, straight through; the input gradient is N:M"
    state_cost: ClassVar[str] = "1 byte per weight"
    time_cost: ClassVar[str] = "elementwise; a search of every tile per refresh"
    unattached: ClassVar[str] = "its mask stays the first one"
    state_type: ClassVar[type[tuple[Any, ...]]] = TMaskState
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            {"interval": 40, "decay": 0.0},
            "SGD, momentum 0.9, weight decay 5e-5, learning rate 0.2 at batch 512, 5 epochs of warm-up, cosine to 0, "
            "120 epochs (ResNet-50 on ImageNet, official code)",
            keep_dense=("head",),
        ),
    }

    interval: int = 40
    decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.name, "interval", self.interval, 1, math.inf, "the paper's is 40")
        check_range(self.name, "decay", self.decay, 0.0, math.inf)

    def update_looks_across(self, clock: Clock) -> bool:
        return self._searches(clock)

    def init(self, w_OSC: Tensor, pattern: Pattern) -> TMaskState:
        return TMaskState(transposable_mask(w_OSC, pattern))

    @property
    def sparse_input_gradient(self) -> bool:
        """One mask serves both ways."""
        return True

    @property
    def straight_through(self) -> bool:
        return True

    def work(self, pattern: Pattern, clock: Clock) -> Work:
        return Work(pattern.density, pattern.density, 1.0)

    def mask(self, w_OSC: Tensor, state: TMaskState, pattern: Pattern) -> Tensor:
        return state.mask

    def forward_weight(self, w_OSC: Tensor, state: TMaskState, pattern: Pattern) -> Tensor:
        return straight_through(w_OSC, state.mask)

    def update(self, w_OSC: Tensor, grad_OSC: Tensor, state: TMaskState, pattern: Pattern, clock: Clock) -> Update:
        if self.decay:
            grad_OSC = refined(grad_OSC, w_OSC, state.mask, self.decay)
        if self._searches(clock):
            state = TMaskState(transposable_mask(w_OSC, pattern))
        return Update(state, grad_OSC)

    def _searches(self, clock: Clock) -> bool:
        return clock.step > 0 and clock.step % self.interval == 0
