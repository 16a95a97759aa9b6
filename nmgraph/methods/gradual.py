"""Gradual pruning: Zhu and Gupta, To prune, or not to prune (arXiv 1710.01878), with the keep count of a block as its budget.

The number of weights kept of every block falls from M to N along a curve. What stands under that schedule is one of
two methods: ASP's magnitude mask, where a pruned weight never comes back, or SR-STE, where it may.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nmgraph.methods.contract import Clock, Method, Preset, Update, Work
from nmgraph.methods.schedule import check_phase, check_range, kept_after
from nmgraph.methods.srste import refined_by_magnitude
from nmgraph.nm.masks import magnitude_mask, prune_further
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.straight_through import largest_straight_through, masked


class GradualState(NamedTuple):
    """State of one weight.

    Attributes:
        keep: int64 scalar, weights kept of every block at the moment.
        mask: bool ``[O, S, C]``; with SR-STE beneath, which chooses anew in every forward, it is all True.
    """

    keep: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Gradual(Method[GradualState]):
    """Keep count of every block on a curve from M to N.

    Attributes:
        base: what chooses the weights: ``asp`` (largest magnitudes of those still kept) or ``srste`` (of all).
        curve: ``cubic`` or ``linear``.
        t_i: when pruning begins, as a fraction of all steps.
        t_f: when N of M are kept.
        interval: steps between two prunings.
        decay: SR-STE's λ, with that base.

    Raises:
        MethodError: if a value lies outside its range.
    """

    name: ClassVar[str] = "gradual"
    title: ClassVar[str] = "Gradual magnitude pruning"
    paper: ClassVar[str] = "Zhu & Gupta, 2017"
    gradient: ClassVar[str] = "as its base: masked (asp), or dense and straight through (srste)"
    state_cost: ClassVar[str] = "1 byte per weight"
    time_cost: ClassVar[str] = "a mask by magnitude per pruning (asp), or per forward (srste)"
    unattached: ClassVar[str] = "nothing is pruned"
    state_type: ClassVar[type[tuple[Any, ...]]] = GradualState
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"base": ("asp", "srste"), "curve": ("cubic", "linear")}
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            {"base": "asp", "curve": "cubic", "interval": 100},
            "as the dense network; pruning begins once it is trained for a while, and ends well before the "
            "learning rate is small",
            keep_dense=(),
        ),
    }

    base: str = "asp"
    curve: str = "cubic"
    t_i: float = 0.0
    t_f: float = 0.5
    interval: int = 100
    decay: float = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_phase(self.name, self.t_i, self.t_f)
        check_range(self.name, "interval", self.interval, 1, math.inf)
        check_range(self.name, "decay", self.decay, 0.0, math.inf)

    def kept(self, step: int, total_steps: int, pattern: Pattern) -> int:
        """Count the weights kept of a block once so many steps are done."""
        return kept_after(step, total_steps, (self.t_i, self.t_f), self.interval, pattern, self.curve)

    def init(self, w_OSC: Tensor, pattern: Pattern) -> GradualState:
        everything = torch.ones_like(w_OSC, dtype=torch.bool)
        state = GradualState(torch.tensor(pattern.m, device=w_OSC.device), everything)
        return self.conclude(w_OSC, state, pattern) if self.t_f == 0 else state

    @property
    def straight_through(self) -> bool:
        return self.base == "srste"

    def work(self, pattern: Pattern, clock: Clock) -> Work:
        density = self.kept(clock.step, clock.total_steps, pattern) / pattern.m
        return Work(density, density, density if self.base == "asp" else 1.0)

    def mask(self, w_OSC: Tensor, state: GradualState, pattern: Pattern) -> Tensor:
        return state.mask if self.base == "asp" else magnitude_mask(w_OSC.detach(), pattern, state.keep)

    def forward_weight(self, w_OSC: Tensor, state: GradualState, pattern: Pattern) -> Tensor:
        if self.base == "srste":
            return largest_straight_through(w_OSC, pattern, state.keep)
        return masked(w_OSC, state.mask)

    def update(self, w_OSC: Tensor, grad_OSC: Tensor, state: GradualState, pattern: Pattern, clock: Clock) -> Update:
        if self.base == "srste" and self.decay:
            grad_OSC = refined_by_magnitude(grad_OSC, w_OSC, pattern, self.decay, state.keep)
        keep = self.kept(clock.step + 1, clock.total_steps, pattern)
        if keep < self.kept(clock.step, clock.total_steps, pattern) or clock.fresh:
            state = self._prune(w_OSC, state, pattern, keep)
        return Update(state, grad_OSC)

    def conclude(self, w_OSC: Tensor, state: GradualState, pattern: Pattern) -> GradualState:
        return self._prune(w_OSC, state, pattern, pattern.n)

    def _prune(self, w_OSC: Tensor, state: GradualState, pattern: Pattern, keep: int) -> GradualState:
        mask = prune_further(w_OSC, state.mask, pattern, keep) if self.base == "asp" else state.mask
        return GradualState(torch.full_like(state.keep, keep), mask)
