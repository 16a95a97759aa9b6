"""LBC: Zhang et al., Learning Best Combination for Efficient N:M Sparsity (NeurIPS 2022).

Every block starts with all C(M, N) ways of keeping N of M. Each combination has a score, trained beside the
weights; the lowest-scored ones are removed step by step until one is left. A weight is masked once no living
combination holds it.

The scores are additive. All start equal, and SGD with momentum and weight decay is linear in the gradient, which
for a combination is a sum over its members (Eq. 10). So ``S_j = c + sum of a_i over the members i of j``: one
accumulator per weight stands for all scores of its block, and ``c``, common to all, never decides a ranking and
is not kept. What has to be kept is which combinations live: a bit each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nmgraph.errors import MethodError
from nmgraph.methods.contract import Clock, Method, Preset, Update, Work
from nmgraph.methods.schedule import check_phase, check_range, cubic, ramp
from nmgraph.nm.fused import top_n
from nmgraph.nm.grouping import blocks
from nmgraph.nm.packing import pack_bits, unpack_bits
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.straight_through import masked

MAX_BYTES_PER_WEIGHT = 16  # of living-combination bits; 8:16 would take 100
_CHUNK_ELEMENTS = 1 << 18  # of the scores that are there at a time, to bound their memory
_FEW = 8  # combinations looked for one by one


class LBCState(NamedTuple):
    """State of one weight.

    Attributes:
        alive: uint8 ``[O, S, G, B]``, a bit per combination, in lexicographic order.
        accumulator: float ``[O, S, C]``, the ``a_i``; with the criterion ``gradient`` the last gradient's magnitudes.
        velocity: float ``[O, S, C]``, its momentum.
        mask: bool ``[O, S, C]``, weights held by at least one living combination.
    """

    alive: Tensor
    accumulator: Tensor
    velocity: Tensor
    mask: Tensor


@dataclass(frozen=True)
class LBC(Method[LBCState]):
    """Learn the best combination of every block.

    Attributes:
        t_i: when removal begins, as a fraction of all steps.
        t_f: when exactly one combination is left; the paper's half of training.
        momentum: of the scores' SGD.
        score_decay: weight decay of the scores.
        criterion: what a combination is ranked by (Table 6): its trained ``score``, the ``inverse`` of it, or the sum
            of its members' ``magnitude`` or ``gradient`` magnitude at the time.

    Raises:
        MethodError: if a value lies outside its range.
    """

    name: ClassVar[str] = "lbc"
    title: ClassVar[str] = "Learning best combination"
    paper: ClassVar[str] = "Zhang et al., NeurIPS 2022"
    gradient: ClassVar[str] = "masked: only kept weights need one"
    state_cost: ClassVar[str] = "9 bytes per weight, a bit per combination"
    time_cost: ClassVar[str] = "elementwise per step; all scores of all blocks are added up per removal"
    unattached: ClassVar[str] = "its masks do not move"
    state_type: ClassVar[type[tuple[Any, ...]]] = LBCState
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"criterion": ("score", "inverse", "magnitude", "gradient")}
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            {"t_i": 0.0, "t_f": 0.5, "momentum": 0.9, "score_decay": 5e-4},
            "SGD, momentum 0.9, weight decay 5e-4, learning rate 0.1 at batch 256, 5 epochs of warm-up, cosine to 0, "
            "120 epochs (ResNet on ImageNet; DeiT-small: AdamW, 300 epochs)",
        ),
        "code": Preset(
            {"t_i": 0.0, "t_f": 0.5, "momentum": 0.9, "score_decay": 1e-4},
            "as the paper's, with weight decay 1e-4, none for batch norms, and label smoothing 0.1",
        ),
    }

    t_i: float = 0.0
    t_f: float = 0.5
    momentum: float = 0.9
    score_decay: float = 5e-4
    criterion: str = "score"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_phase(self.name, self.t_i, self.t_f)
        if not 0.0 <= self.momentum < 1.0:
            raise MethodError(f"lbc: momentum={self.momentum} must lie in [0, 1); the paper's is 0.9.")
        check_range(self.name, "score_decay", self.score_decay, 0.0, math.inf, "the paper's is 5e-4")

    def refusal(self, pattern: Pattern) -> str | None:
        limit = MAX_BYTES_PER_WEIGHT * 8 * pattern.m
        if pattern.combinations <= limit:
            return None
        fitting = [p for n in range(1, pattern.m) if (p := Pattern(n, pattern.m)).combinations <= limit]
        nearest = min(fitting, key=lambda p: abs(p.n - pattern.n))
        return (
            f"lbc keeps track of every combination, and {pattern} has {pattern.combinations:,} of them "
            f"({pattern.combinations / 8 / pattern.m:,.0f} bytes per weight). Choose {nearest}, or the method srste."
        )

    def removed(self, progress: float, pattern: Pattern) -> int:
        """Count the combinations of a block that are gone by then (Eq. 6, read as cumulative and floored)."""
        x = ramp(progress, self.t_i, self.t_f)
        return math.floor((pattern.combinations - 1) * cubic(x))

    def init(self, w_OSC: Tensor, pattern: Pattern) -> LBCState:
        everyone_B = pack_bits(torch.ones(pattern.combinations, dtype=torch.bool, device=w_OSC.device))
        alive_OSGB = everyone_B.repeat(*blocks(w_OSC, pattern.m).shape[:-1], 1)
        zeros = torch.zeros_like(w_OSC, dtype=torch.promote_types(w_OSC.dtype, torch.float32))
        return LBCState(alive_OSGB, zeros, zeros.clone(), torch.ones_like(zeros, dtype=torch.bool))

    def work(self, pattern: Pattern, clock: Clock) -> Work:
        left = pattern.combinations - self.removed(clock.progress_before, pattern)
        density = expected_union(left, pattern)
        return Work(density, density, density)

    def gauges(self, w_OSC: Tensor, state: LBCState, pattern: Pattern) -> dict[str, Tensor]:
        """Give how many combinations of a block still live: the same number in all of them."""
        first_1B = state.alive.flatten(0, -2)[:1]
        return {"live_combinations": unpack_bits(first_1B, pattern.combinations).sum(dtype=torch.float32)}

    def mask(self, w_OSC: Tensor, state: LBCState, pattern: Pattern) -> Tensor:
        return state.mask

    def forward_weight(self, w_OSC: Tensor, state: LBCState, pattern: Pattern) -> Tensor:
        return masked(w_OSC, state.mask)  # Eq. 7

    def update(self, w_OSC: Tensor, grad_OSC: Tensor, state: LBCState, pattern: Pattern, clock: Clock) -> Update:
        alive_left = pattern.combinations - self.removed(clock.progress, pattern)
        alive_before = pattern.combinations - self.removed(clock.progress_before, pattern)
        if alive_before > 1:  # else the phase is static
            state = self._train_scores(w_OSC, grad_OSC, state, clock)
        if alive_left < alive_before or clock.fresh:
            state = self._remove(w_OSC, state, alive_left, pattern)
        return Update(state, grad_OSC)

    def conclude(self, w_OSC: Tensor, state: LBCState, pattern: Pattern) -> LBCState:
        return self._remove(w_OSC, state, 1, pattern)

    def _train_scores(self, w_OSC: Tensor, grad_OSC: Tensor, state: LBCState, clock: Clock) -> LBCState:
        if self.criterion == "magnitude":
            return state
        if self.criterion == "gradient":
            return state._replace(accumulator=grad_OSC.abs().nan_to_num(0.0, 0.0, 0.0).to(state.accumulator.dtype))
        a, v = state.accumulator, state.velocity
        # Eq. 10: dL/dS_j is the sum of W_i dL/dW_i over the members of j. One overflowing micro-batch must not
        # stay in the scores for good.
        salience = torch.nan_to_num(w_OSC.to(a.dtype) * grad_OSC.to(a.dtype), nan=0.0, posinf=0.0, neginf=0.0)
        v = self.momentum * v + salience + self.score_decay * a
        return state._replace(accumulator=a - clock.learning_rate * v, velocity=v)

    def _remove(self, w_OSC: Tensor, state: LBCState, keep: int, pattern: Pattern) -> LBCState:
        """Leave the ``keep`` best of the living combinations of every block (Eq. 5)."""
        members_CN, read_XC = _members(pattern, state.alive.device)
        alive_RB = state.alive.flatten(0, 2)
        living = int(_unpacked(alive_RB[:1], pattern.combinations).sum())  # the same in all blocks
        if keep >= living:
            return state
        a_RM = blocks(state.accumulator, pattern.m).flatten(0, 2)
        magnitude_RM = blocks(w_OSC.abs().to(a_RM.dtype), pattern.m).flatten(0, 2)
        rows = max(1, _CHUNK_ELEMENTS // len(members_CN))
        kept_bits, masks = [], []
        chunks = (torch.split(t, rows) for t in (alive_RB, a_RM, magnitude_RM))
        for bits_RB, own_RM, size_RM in zip(*chunks, strict=True):
            # A block whose scores never moved (a dead channel, a model that was not trained) knows only its weights.
            untrained_R1 = (own_RM == 0).all(-1, keepdim=True)
            a_MR = torch.where(untrained_R1, size_RM, -own_RM if self.criterion == "inverse" else own_RM).T.contiguous()
            alive_CR = _unpacked(bits_RB, pattern.combinations).to(a_MR.dtype)
            # Sums one by one, not a matrix product: TF32 and autocast must not round a ranking.
            scores_CR = a_MR.index_select(0, members_CN[:, 0])
            for place in range(1, pattern.n):
                scores_CR += a_MR.index_select(0, members_CN[:, place])
            alive_CR = _leave_best(scores_CR, alive_CR, keep, living)
            # Small whole numbers, which no product rounds: how many hold each weight (Eq. 8), and bytes of eight bits.
            held_MR, bytes_BR = torch.split(read_XC.to(alive_CR.dtype) @ alive_CR, [pattern.m, bits_RB.shape[1]])
            masks.append((held_MR > 0).T)
            kept_bits.append(bytes_BR.to(torch.uint8).T)
        return state._replace(
            alive=torch.cat(kept_bits).reshape_as(state.alive), mask=torch.cat(masks).reshape_as(state.mask)
        )


def expected_union(left: int, pattern: Pattern) -> float:
    """Give the share of weights that some of ``left`` combinations keep, if those were drawn by lot.

    A weight is in C(M-1, N-1) of the C(M, N) combinations. How far the union really is above depends on the scores: what
    is left shares weights more often than a lot does.

    >>> [round(expected_union(left, Pattern(2, 4)), 2) for left in (6, 3, 2, 1)]
    [1.0, 0.95, 0.8, 0.5]
    """
    others = pattern.combinations - math.comb(pattern.m - 1, pattern.n - 1)
    # Hypergeometric: that all combinations that are left are among those without the weight.
    return 1.0 - math.comb(others, left) / math.comb(pattern.combinations, left)


def _leave_best(scores_CR: Tensor, alive_CR: Tensor, keep: int, living: int) -> Tensor:
    """Mark the ``keep`` highest of the living scores of every column, of equals the first ones; 0 or 1 in the scores' dtype.

    Mostly very few go, and at last but one stays: those are looked for one by one, which no sort can beat.
    """
    places_C1 = torch.arange(len(scores_CR), dtype=scores_CR.dtype, device=scores_CR.device).unsqueeze(1)
    if living - keep <= _FEW:
        for place_1R in _lowest(scores_CR, alive_CR, living - keep, places_C1):
            alive_CR.scatter_(0, place_1R, 0.0)
        return alive_CR
    best_CR = torch.zeros_like(alive_CR)
    if keep <= _FEW:
        for place_1R in _lowest(-scores_CR, alive_CR, keep, len(scores_CR) - 1 - places_C1):
            best_CR.scatter_(0, len(scores_CR) - 1 - place_1R, 1.0)
        return best_CR
    return best_CR + top_n(torch.where(alive_CR > 0, scores_CR, -torch.inf), keep, dim=0)


def _lowest(scores_CR: Tensor, alive_CR: Tensor, count: int, places_C1: Tensor) -> Iterator[Tensor]:
    """Find the place of the lowest living score of every column, then of the next, of equals the highest place first."""
    # Arithmetic alone: choosing by a condition is many times slower on the CPU. An infinity stands where not to look.
    scores_CR = torch.maximum(scores_CR, (0.5 - alive_CR).mul_(torch.inf))
    for _ in range(count):
        equal_CR = scores_CR.clone().eq_(scores_CR.amin(0))
        place_1R = equal_CR.mul_(places_C1).amax(0, keepdim=True).long()
        yield place_1R
        scores_CR.scatter_(0, place_1R, torch.inf)


def _unpacked(bits_RB: Tensor, length: int) -> Tensor:
    """Give a bit of each combination, uint8 ``[length, R]`` of 0 and 1, as :func:`nmgraph.nm.packing.unpack_bits` does."""
    values_81 = (2 ** torch.arange(8, device=bits_RB.device)).to(torch.uint8).unsqueeze(1)
    return (bits_RB.T.contiguous().unsqueeze(1) & values_81).ne_(0).flatten(0, 1)[:length]


@lru_cache(maxsize=64)
def _members(pattern: Pattern, device: torch.device) -> tuple[Tensor, Tensor]:
    """List all combinations.

    Returns:
        member indices int64 ``[C, N]``, and what to multiply living combinations with, float32 ``[M + B, C]``: to count
        those that hold a weight, and to pack eight of them into a byte.
    """
    members_CN = torch.tensor(list(combinations(range(pattern.m), pattern.n)), device=device)
    held_MC = torch.zeros(pattern.m, pattern.combinations, device=device).scatter_(0, members_CN.T, 1.0)
    place_C = torch.arange(pattern.combinations, device=device)
    bytes_BC = torch.zeros(-(-pattern.combinations // 8), pattern.combinations, device=device)
    bytes_BC[place_C // 8, place_C] = (2.0 ** (place_C % 8)).float()
    return members_CN, torch.cat((held_MC, bytes_BC))
