"""Static: a random N:M mask, chosen once. The baseline of BAME's Table 4 that every method has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from nmgraph.methods.contract import Clock, Method, Preset, Update, Work
from nmgraph.nm.masks import random_mask
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.randomness import generator, seed_of
from nmgraph.nm.straight_through import masked

BAME_CIFAR = (
    "SGD, momentum 0.9, weight decay 1e-3 (printed: 0.005), learning rate 0.1 at batch 256, cosine to 0, 300 epochs "
    "(ResNet-32 on CIFAR-10)"
)


class StaticState(NamedTuple):
    """State of one weight.

    Attributes:
        mask: bool ``[O, S, C]``.
    """

    mask: Tensor


@dataclass(frozen=True)
class Static(Method[StaticState]):
    """Random mask, frozen.

    Attributes:
        seed: of the random masks; the same seed and weights give the same masks.
    """

    name: ClassVar[str] = "static"
    title: ClassVar[str] = "Static random mask"
    paper: ClassVar[str] = "baseline of Yang et al., ICML 2025"
    gradient: ClassVar[str] = "masked: only kept weights need one"
    state_cost: ClassVar[str] = "1 byte per weight"
    time_cost: ClassVar[str] = "elementwise"
    unattached: ClassVar[str] = "nothing"
    state_type: ClassVar[type[tuple[Any, ...]]] = StaticState
    presets: ClassVar[Mapping[str, Preset]] = {"paper": Preset({}, BAME_CIFAR)}

    seed: int = 0

    @property
    def needs_attach(self) -> bool:
        """The mask never moves, so no step needs a hook."""
        return False

    def init(self, w_OSC: Tensor, pattern: Pattern) -> StaticState:
        drawn = random_mask(tuple(w_OSC.shape), pattern, generator(seed_of(w_OSC, self.seed)))
        return StaticState(drawn.to(w_OSC.device))

    def work(self, pattern: Pattern, clock: Clock) -> Work:
        return Work(pattern.density, pattern.density, pattern.density)

    def mask(self, w_OSC: Tensor, state: StaticState, pattern: Pattern) -> Tensor:
        return state.mask

    def forward_weight(self, w_OSC: Tensor, state: StaticState, pattern: Pattern) -> Tensor:
        return masked(w_OSC, state.mask)

    def update(self, w_OSC: Tensor, grad_OSC: Tensor, state: StaticState, pattern: Pattern, clock: Clock) -> Update:
        return Update(state, grad_OSC)
