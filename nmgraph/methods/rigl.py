"""RigL: Evci et al., Rigging the Lottery (ICML 2020, arXiv 1911.11134), with the budget of every block fixed.

Every so often the smallest weights of a layer are dropped, and as many with the largest gradients are grown - in the
same block each, since a block keeps N whatever happens. The baseline of BAME's Table 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nmgraph.methods.contract import Clock, Method, Preset, Update, Work
from nmgraph.methods.schedule import check_range
from nmgraph.methods.static import BAME_CIFAR, Static
from nmgraph.nm.fused import top_n, top_n_staying
from nmgraph.nm.grouping import blocks
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.straight_through import masked, straight_through


class RigLState(NamedTuple):
    """State of one weight.

    Attributes:
        mask: bool ``[O, S, C]``.
        dense: bool scalar, whether the gradient of this step is the dense one.
    """

    mask: Tensor
    dense: Tensor


@dataclass(frozen=True)
class RigL(Method[RigLState]):
    """Drop by magnitude, grow by gradient, within every block.

    Attributes:
        interval: steps between two changes of the mask.
        drop: share of the kept weights that the first change drops, α; it falls to 0 on a cosine.
        t_f: when the mask stops changing, as a fraction of all steps.
        seed: of the random first mask.

    Raises:
        MethodError: if a value lies outside its range.
    """

    name: ClassVar[str] = "rigl"
    title: ClassVar[str] = "RigL within N:M blocks"
    paper: ClassVar[str] = "Evci et al., ICML 2020"
    gradient: ClassVar[str] = "masked; dense on the step of a change"
    state_cost: ClassVar[str] = "1 byte per weight"
    time_cost: ClassVar[str] = "elementwise; three sorts per change"
    unattached: ClassVar[str] = "its mask does not change"
    state_type: ClassVar[type[tuple[Any, ...]]] = RigLState
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset({"interval": 100, "drop": 0.3, "t_f": 0.75}, BAME_CIFAR),
    }

    interval: int = 100
    drop: float = 0.3
    t_f: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.name, "interval", self.interval, 1, math.inf)
        check_range(self.name, "drop", self.drop, 0.0, 1.0, "the paper's is 0.3")
        check_range(self.name, "t_f", self.t_f, 0.0, 1.0, "the paper's is 0.75")

    def changes(self, clock: Clock) -> bool:
        """Tell whether this step changes the mask."""
        return clock.step > 0 and clock.step % self.interval == 0 and clock.progress_before < self.t_f

    def too_short(self, total_steps: int) -> str | None:
        if self.interval < self.t_f * total_steps:
            return None
        return f"the mask never changes before t_f, as interval={self.interval}. Set a smaller interval"

    def update_looks_across(self, clock: Clock) -> bool:
        return self.changes(clock)

    def init(self, w_OSC: Tensor, pattern: Pattern) -> RigLState:
        drawn = Static(seed=self.seed).init(w_OSC, pattern).mask
        return RigLState(drawn, torch.tensor(False, device=w_OSC.device))

    def work(self, pattern: Pattern, clock: Clock) -> Work:
        return Work(pattern.density, pattern.density, 1.0 if self.changes(clock) else pattern.density)

    def mask(self, w_OSC: Tensor, state: RigLState, pattern: Pattern) -> Tensor:
        return state.mask

    def forward_weight(self, w_OSC: Tensor, state: RigLState, pattern: Pattern) -> Tensor:
        return straight_through(w_OSC, state.mask, passes=state.mask | state.dense)

    def update(self, w_OSC: Tensor, grad_OSC: Tensor, state: RigLState, pattern: Pattern, clock: Clock) -> Update:
        mask, restart = state.mask, None
        # After a resume with another total the gradient may not be the dense one; the change then falls out.
        if self.changes(clock) and bool(state.dense):
            mask = self._changed(w_OSC, grad_OSC, mask, pattern, clock)
            restart = mask & ~state.mask
        dense = torch.full_like(state.dense, self.changes(clock.next))
        return Update(RigLState(mask, dense), masked(grad_OSC, mask), restart)

    def _changed(self, w_OSC: Tensor, grad_OSC: Tensor, mask_OSC: Tensor, pattern: Pattern, clock: Clock) -> Tensor:
        share = self.drop / 2 * (1 + math.cos(math.pi * clock.progress_before / self.t_f))
        magnitude_OSC = w_OSC.abs().masked_fill(~mask_OSC, torch.inf)
        # Over the whole layer: which of the kept weights are the smallest.
        dropped_OSC = top_n(-magnitude_OSC.flatten(), int(share * int(mask_OSC.sum()))).reshape(mask_OSC.shape)
        survives_OSGM = blocks(mask_OSC & ~dropped_OSC, pattern.m)
        # Those just dropped stand for growth, too; so a block with a large gradient on them changes nothing.
        growth_OSGM = blocks(grad_OSC.abs().nan_to_num(0.0, 0.0, 0.0), pattern.m).masked_fill(survives_OSGM, -1.0)
        missing_OSG1 = pattern.n - survives_OSGM.sum(-1, keepdim=True)
        # Without a gradient all are equal.
        grown_OSGM = top_n_staying(growth_OSGM, missing_OSG1, blocks(mask_OSC, pattern.m))
        return (survives_OSGM | grown_OSGM).flatten(-2)
