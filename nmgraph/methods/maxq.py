"""MaxQ: Xiang et al., MaxQ: Multi-Axis Query for N:M Sparsity Network (CVPR 2024, arXiv 2312.07061).

The N:M mask by magnitude is multiplied by a soft query, which gives weights that are large within their filter, or
within their kernel position, more say. Blocks become sparse one after the other, those with the largest norm first.
The mask is folded into the weights at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nmgraph.compilation import is_plain
from nmgraph.methods.contract import Clock, Method, Preset, Update, Work
from nmgraph.methods.schedule import CURVES, check_phase, check_range, ramp
from nmgraph.methods.srste import refined
from nmgraph.nm.fused import zero_outside
from nmgraph.nm.grouping import blocks
from nmgraph.nm.masks import magnitude_mask
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.straight_through import replaced


class MaxQState(NamedTuple):
    """State of one weight.

    Attributes:
        dense_share: float32 scalar r, share of the blocks that are dense still.
    """

    dense_share: Tensor


@dataclass(frozen=True)
class MaxQ(Method[MaxQState]):
    """Multi-axis query.

    Attributes:
        t_i: when blocks begin to become sparse, as a fraction of all steps.
        t_f: when all are.
        curve: how their share grows: ``cosine``, ``cubic`` or ``linear``.
        decay: λ, of masked weights, as SR-STE's.
        temperature: τ of the soft query.

    Raises:
        MethodError: if a value lies outside its range.
    """

    name: ClassVar[str] = "maxq"
    title: ClassVar[str] = "Multi-axis query"
    paper: ClassVar[str] = "Xiang et al., CVPR 2024"
    gradient: ClassVar[str] = "dense, straight through; masked weights decay"
    state_cost: ClassVar[str] = "none"
    time_cost: ClassVar[str] = (
        "a selection in every filter and kernel position per forward, and one of blocks per forward and step"
    )
    unattached: ClassVar[str] = "all blocks stay dense"
    state_type: ClassVar[type[tuple[Any, ...]]] = MaxQState
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"curve": ("cosine", "cubic", "linear")}
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            {"t_i": 0.0, "t_f": 0.75, "decay": 2e-4, "temperature": 0.01},
            "SGD, momentum 0.9, weight decay 1e-4 and none for one-dimensional parameters, learning rate 0.1 at "
            "batch 256, cosine to 0 without warm-up, label smoothing 0.1, 120 epochs (ResNet on ImageNet)",
        ),
        "code": Preset(
            {"t_i": 0.0, "t_f": 0.25, "curve": "linear", "decay": 2e-4, "temperature": 0.01},
            "as the paper's; blocks become sparse over epochs 0 to 30 of 120 (the first public scripts)",
        ),
    }

    t_i: float = 0.0
    t_f: float = 0.75
    curve: str = "cosine"
    decay: float = 2e-4
    temperature: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_phase(self.name, self.t_i, self.t_f)
        check_range(self.name, "decay", self.decay, 0.0, math.inf, "the published one is 2e-4")
        check_range(self.name, "temperature", self.temperature, 1e-6, math.inf, "the published one is 0.01")

    def dense_share(self, progress: float) -> float:
        """Give r, the share of the blocks that are dense by then."""
        return 1.0 - CURVES[self.curve](ramp(progress, self.t_i, self.t_f))

    @property
    def operand_looks_across(self) -> bool:
        """Blocks become sparse in an order over the layer."""
        return True

    def update_looks_across(self, clock: Clock) -> bool:
        return self.decay > 0

    def init(self, w_OSC: Tensor, pattern: Pattern) -> MaxQState:
        return MaxQState(torch.tensor(self.dense_share(0.0), dtype=torch.float32, device=w_OSC.device))

    @property
    def straight_through(self) -> bool:
        return True

    def work(self, pattern: Pattern, clock: Clock) -> Work:
        dense = self.dense_share(clock.progress_before)
        density = dense + (1.0 - dense) * pattern.density
        return Work(density, density, 1.0)

    def mask(self, w_OSC: Tensor, state: MaxQState, pattern: Pattern) -> Tensor:
        w_OSC = w_OSC.detach()
        norm_K = blocks(w_OSC.abs().float(), pattern.m).sum(-1).flatten()
        # The smallest blocks are dense the longest.
        dense_K = _smallest(norm_K, torch.floor(state.dense_share * norm_K.numel()))
        dense_OSG1 = dense_K.reshape(*w_OSC.shape[:2], -1, 1)
        return (blocks(magnitude_mask(w_OSC, pattern), pattern.m) | dense_OSG1).flatten(-2)

    def forward_weight(self, w_OSC: Tensor, state: MaxQState, pattern: Pattern) -> Tensor:
        w = w_OSC.detach()
        query = 1.0 + self._query(w.flatten(1).abs().float(), pattern).reshape(w.shape)  # within each filter
        if w.shape[1] > 1:  # within each kernel position, where there are several
            across = w.transpose(0, 1)
            query = query + self._query(across.flatten(1).abs().float(), pattern).reshape(across.shape).transpose(0, 1)
        value = zero_outside(self.mask(w, state, pattern), w * query.to(w.dtype))
        return replaced(w_OSC, value)

    def update(self, w_OSC: Tensor, grad_OSC: Tensor, state: MaxQState, pattern: Pattern, clock: Clock) -> Update:
        if self.decay:
            grad_OSC = refined(grad_OSC, w_OSC, self.mask(w_OSC, state, pattern), self.decay)
        return Update(MaxQState(torch.full_like(state.dense_share, self.dense_share(clock.progress))), grad_OSC)

    def conclude(self, w_OSC: Tensor, state: MaxQState, pattern: Pattern) -> MaxQState:
        return MaxQState(torch.zeros_like(state.dense_share))

    def _query(self, magnitude_RL: Tensor, pattern: Pattern) -> Tensor:
        """Weigh every entry of a row against the row's (M-N)/M quantile: 0 below it, 0.5 to 1 from there on.

        Of entries that equal the quantile all count as being there.
        """
        q = (pattern.m - pattern.n) * magnitude_RL.shape[1] // pattern.m
        below_R1 = magnitude_RL.kthvalue(q, dim=1, keepdim=True).values
        larger_RL = magnitude_RL > below_R1
        next_R1 = torch.where(larger_RL, magnitude_RL, torch.inf).amin(1, keepdim=True)
        # The next one in order has the same magnitude if more than q are no larger.
        equal_R1 = larger_RL.sum(1, keepdim=True) < magnitude_RL.shape[1] - q
        above_R1 = torch.where(equal_R1, below_R1, next_R1)
        soft_RL = torch.sigmoid((magnitude_RL - (below_R1 + above_R1) / 2) / self.temperature)
        return zero_outside(magnitude_RL >= above_R1, soft_RL)


def _smallest(values_K: Tensor, count: Tensor) -> Tensor:
    """Mark so many of the smallest values, of equals the first ones; bool ``[K]``."""
    if values_K.device.type != "cpu" or not is_plain(values_K, count):
        places_K = torch.arange(len(values_K), device=values_K.device)
        return torch.zeros_like(places_K, dtype=torch.bool).scatter(0, values_K.argsort(stable=True), places_K < count)
    # Looking at the count costs nothing here, and saves the sort.
    wanted = int(count)
    if wanted == 0:
        return torch.zeros_like(values_K, dtype=torch.bool)
    last = values_K.kthvalue(wanted).values
    smaller_K, equal_K = values_K < last, values_K == last
    return smaller_K | (equal_K & (equal_K.cumsum(0) <= wanted - smaller_K.sum()))
