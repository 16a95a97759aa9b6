"""ASP: Mishra et al., Accelerating Sparse Deep Neural Networks (arXiv 2104.08378).

Take a trained dense network, keep the N largest magnitudes of every block, and repeat the training with that mask
frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from nmgraph.methods.contract import Clock, Method, Preset, Update, Work
from nmgraph.methods.schedule import check_range
from nmgraph.nm.masks import magnitude_mask
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.straight_through import masked


class ASPState(NamedTuple):
    """State of one weight.

    Attributes:
        mask: bool ``[O, S, C]``.
    """

    mask: Tensor


@dataclass(frozen=True)
class ASP(Method[ASPState]):
    """One-shot magnitude mask, frozen.

    Attributes:
        recompute_at: when to choose the mask once more, as a fraction of all steps; 0 leaves it as it was made at
            conversion. Pruned weights compete with the values they had when they were pruned.

    Raises:
        MethodError: unless ``0 <= recompute_at <= 1``.
    """

    name: ClassVar[str] = "asp"
    title: ClassVar[str] = "Automatic sparsity: one-shot magnitude mask"
    paper: ClassVar[str] = "Mishra et al., 2021"
    gradient: ClassVar[str] = "masked: only kept weights need one"
    state_cost: ClassVar[str] = "1 byte per weight"
    time_cost: ClassVar[str] = "elementwise"
    unattached: ClassVar[str] = "its mask is not computed again"
    state_type: ClassVar[type[tuple[Any, ...]]] = ASPState
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            {"recompute_at": 0.0},
            "start from the trained dense network and repeat its training: same schedule, epochs and optimizer, with a "
            "fresh optimizer state",
            keep_dense=(),
        ),
    }

    recompute_at: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.name, "recompute_at", self.recompute_at, 0.0, 1.0, "it is a fraction of all steps")

    @property
    def needs_attach(self) -> bool:
        """Only the second choice needs the step hook."""
        return self.recompute_at > 0

    def init(self, w_OSC: Tensor, pattern: Pattern) -> ASPState:
        return ASPState(magnitude_mask(w_OSC, pattern))

    def work(self, pattern: Pattern, clock: Clock) -> Work:
        return Work(pattern.density, pattern.density, pattern.density)

    def mask(self, w_OSC: Tensor, state: ASPState, pattern: Pattern) -> Tensor:
        return state.mask

    def forward_weight(self, w_OSC: Tensor, state: ASPState, pattern: Pattern) -> Tensor:
        return masked(w_OSC, state.mask)

    def update(self, w_OSC: Tensor, grad_OSC: Tensor, state: ASPState, pattern: Pattern, clock: Clock) -> Update:
        if clock.progress_before < self.recompute_at <= clock.progress:
            state = ASPState(magnitude_mask(w_OSC, pattern))
        return Update(state, grad_OSC)
