"""BAME: Yang et al., BAME: Block-Aware Mask Evolution for Efficient N:M Sparse Training (ICML 2025).

Three phases: the number of weights kept in a block falls from M to N; then, every ΔT steps, each block keeps those N
weights whose presence is worth most to the loss (LMA), except in blocks that oscillate or are large (OBF); then masks
rest. Only the steps of an adaption need a dense gradient. The paper leaves several readings open; the card says
which one is the default and which are options.
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
from nmgraph.methods.static import BAME_CIFAR
from nmgraph.nm.fused import top_n, top_n_staying
from nmgraph.nm.grouping import blocks
from nmgraph.nm.masks import prune_further
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.permutation import SEARCHES, column_sparse, find_permutation
from nmgraph.nm.randomness import generator, seed_of
from nmgraph.nm.straight_through import masked, straight_through


class BAMEState(NamedTuple):
    """State of one weight.

    Attributes:
        mask: bool ``[O, S, C]``.
        keep: int64 scalar, weights kept of every block at the moment.
        oscillation: float ``[O, S, G]``, moving average O of every block's mask changes.
        dense: bool scalar, whether the gradient of this step is the dense one.
        gradient: float ``[O, S, C]``, sum of the dense gradients since the last adaption; empty if one is enough.
        permutation: int64 ``[O]``, which rows are neighbours in the backward mask; empty if there is none.
        seed: int64 scalar of this layer's random draws.
    """

    mask: Tensor
    keep: Tensor
    oscillation: Tensor
    dense: Tensor
    gradient: Tensor
    permutation: Tensor
    seed: Tensor


@dataclass(frozen=True)
class BAME(Method[BAMEState]):
    """Block-aware mask evolution.

    Attributes:
        t_i: end of the gradual phase, as a fraction of all steps.
        t_f: end of mask adaption.
        interval: ΔT, steps between two prunings or adaptions.
        freeze_oscillating: β, share of blocks that may not change because their masks changed most.
        freeze_large: α, share of blocks that may not change because their weights are largest.
        combine: how the two freeze a block: ``or`` (either does) or ``and`` (Eq. 10 as printed).
        memory: γ, of the moving average of mask changes.
        changes: what counts as a change: the ``applied`` mask against the last one, or the ``candidate`` one. With
            the latter a block that wants to change is frozen because it wants to, unless more than β of all do.
        thaw: blocks whose moving average is not above this are never frozen as oscillating.
        gain: what growing a weight is expected to gain: ``sgd``, η G² (Eq. 5), or ``adam``, η |G|.
        score_steps: gradients that an adaption adds up, of the steps before it and its own; the paper's is 1.
        bidirectional: BAME†, the backward mask of Bi-Mask.
        search: how its rows are permuted every interval: ``swap``, rows between blocks of the present permutation, or
            ``random``, the best of some random permutations (Bi-Mask).
        candidates: rounds of swaps, or random permutations to choose from; 0 leaves the rows in their order.
        seed: of the random draws.

    Raises:
        MethodError: if a value lies outside its range.
    """

    name: ClassVar[str] = "bame"
    title: ClassVar[str] = "Block-aware mask evolution"
    paper: ClassVar[str] = "Yang et al., ICML 2025"
    gradient: ClassVar[str] = "masked; dense on the step of an adaption; N:M input gradient if bidirectional"
    state_cost: ClassVar[str] = "1 byte per weight, 4 per block"
    time_cost: ClassVar[str] = "elementwise; three sorts per adaption"
    unattached: ClassVar[str] = "nothing is pruned"
    state_type: ClassVar[type[tuple[Any, ...]]] = BAMEState
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "combine": ("or", "and"),
        "changes": ("applied", "candidate"),
        "gain": ("sgd", "adam"),
        "search": SEARCHES,
    }
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            {"interval": 100, "freeze_oscillating": 0.5, "freeze_large": 0.5, "search": "random"}, BAME_CIFAR
        ),
    }

    t_i: float = 1 / 3
    t_f: float = 2 / 3
    interval: int = 100
    freeze_oscillating: float = 0.5
    freeze_large: float = 0.5
    combine: str = "or"
    memory: float = 0.9
    changes: str = "applied"
    thaw: float = 0.0
    gain: str = "sgd"
    score_steps: int = 1
    bidirectional: bool = False
    search: str = "swap"
    candidates: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_phase(self.name, self.t_i, self.t_f)
        check_range(self.name, "interval", self.interval, 1, math.inf, "the paper's is 100")
        check_range(self.name, "freeze_oscillating", self.freeze_oscillating, 0.0, 1.0, "the paper's is 0.5")
        check_range(self.name, "freeze_large", self.freeze_large, 0.0, 1.0, "the paper's is 0.5")
        check_range(self.name, "memory", self.memory, 0.0, 1.0)
        check_range(self.name, "thaw", self.thaw, 0.0, math.inf)
        check_range(self.name, "score_steps", self.score_steps, 1, self.interval, "it is at most the interval")
        check_range(self.name, "candidates", self.candidates, 0, math.inf)

    @property
    def splits_backward(self) -> bool:
        """Only BAME† has a backward mask."""
        return self.bidirectional

    def kept(self, step: int, total_steps: int, pattern: Pattern) -> int:
        """Count the weights kept of a block once so many steps are done: linear, in steps of the interval."""
        return kept_after(step, total_steps, (0.0, self.t_i), self.interval, pattern, "linear")

    def adapts(self, step: int, total_steps: int) -> bool:
        """Tell whether masks are adapted on this step."""
        return step % self.interval == 0 and self.t_i * total_steps <= step < self.t_f * total_steps

    def scores(self, step: int, total_steps: int) -> bool:
        """Tell whether this step's dense gradient is wanted, by an adaption now or soon."""
        return self.adapts(step + -step % self.interval, total_steps) and -step % self.interval < self.score_steps

    def too_short(self, total_steps: int) -> str | None:
        if any(self.adapts(step, total_steps) for step in range(0, total_steps, self.interval)):
            return None
        return f"no mask adaption falls between t_i and t_f, as interval={self.interval}. Set a smaller interval"

    @property
    def backward_by_magnitude(self) -> bool:
        return self.bidirectional

    @property
    def operand_looks_across(self) -> bool:
        """The backward mask's blocks run over rows."""
        return self.bidirectional

    def update_looks_across(self, clock: Clock) -> bool:
        return self.adapts(clock.step, clock.total_steps) or self._permutes(clock)

    def init(self, w_OSC: Tensor, pattern: Pattern) -> BAMEState:
        rows, device = w_OSC.shape[0], w_OSC.device
        state = BAMEState(
            mask=torch.ones_like(w_OSC, dtype=torch.bool),
            keep=torch.tensor(pattern.m, device=device),
            oscillation=torch.zeros(blocks(w_OSC, pattern.m).shape[:-1], dtype=torch.float32, device=device),
            dense=torch.tensor(False, device=device),
            gradient=torch.zeros(w_OSC.shape if self.score_steps > 1 else 0, dtype=torch.float32, device=device),
            permutation=torch.arange(rows if self.bidirectional else 0, device=device),
            seed=seed_of(w_OSC, self.seed),
        )
        return self.conclude(w_OSC, state, pattern) if self.t_i == 0 else state

    def work(self, pattern: Pattern, clock: Clock) -> Work:
        density = self.kept(clock.step, clock.total_steps, pattern) / pattern.m
        return Work(density, density, 1.0 if self.scores(clock.step, clock.total_steps) else density)

    def gauges(self, w_OSC: Tensor, state: BAMEState, pattern: Pattern) -> dict[str, Tensor]:
        """Give the share of blocks that would keep their masks in the next adaption."""
        kept = masked(w_OSC, state.mask)
        return {"frozen": self._frozen(kept, state.oscillation, pattern).float().mean()}

    def mask(self, w_OSC: Tensor, state: BAMEState, pattern: Pattern) -> Tensor:
        return state.mask

    def forward_weight(self, w_OSC: Tensor, state: BAMEState, pattern: Pattern) -> Tensor:
        return straight_through(w_OSC, state.mask, passes=state.mask | state.dense)

    def backward_weight(self, forward_OSC: Tensor, state: BAMEState, pattern: Pattern) -> Tensor | None:
        return column_sparse(forward_OSC, state.permutation, pattern, state.keep) if self.bidirectional else None

    def row_order(self, state: BAMEState) -> Tensor | None:
        return state.permutation if self.bidirectional and self.candidates else None

    def update(self, w_OSC: Tensor, grad_OSC: Tensor, state: BAMEState, pattern: Pattern, clock: Clock) -> Update:
        before = state.mask
        keep = self.kept(clock.step + 1, clock.total_steps, pattern)
        if keep < self.kept(clock.step, clock.total_steps, pattern) or clock.fresh:
            state = self._prune(w_OSC, state, keep, pattern)
        # After a resume with another total the gradient may not be the dense one; the adaption then falls out.
        if self.scores(clock.step, clock.total_steps) and bool(state.dense):
            state = self._adapt(w_OSC, grad_OSC, state, pattern, clock)
        if self._permutes(clock):
            draws = generator(state.seed, clock.step)
            permutation = find_permutation(
                state.mask, state.permutation, pattern, self.search, self.candidates, "blocks", draws
            )
            state = state._replace(permutation=permutation)
        state = state._replace(dense=torch.full_like(state.dense, self.scores(clock.step + 1, clock.total_steps)))
        # Under the new mask: a grown weight starts from 0 and takes the step -ηG that Eq. 5 reckons with.
        restart = None if state.mask is before else state.mask ^ before
        return Update(state, masked(grad_OSC, state.mask), restart)

    def conclude(self, w_OSC: Tensor, state: BAMEState, pattern: Pattern) -> BAMEState:
        return self._prune(w_OSC, state, pattern.n, pattern)

    def _permutes(self, clock: Clock) -> bool:
        return self.bidirectional and bool(self.candidates) and clock.step % self.interval == 0

    def _prune(self, w_OSC: Tensor, state: BAMEState, keep: int, pattern: Pattern) -> BAMEState:
        """Keep the largest of those still kept: in the gradual phase nothing comes back."""
        mask = prune_further(w_OSC, state.mask, pattern, keep)
        return state._replace(mask=mask, keep=torch.full_like(state.keep, keep))

    def _adapt(self, w_OSC: Tensor, grad_OSC: Tensor, state: BAMEState, pattern: Pattern, clock: Clock) -> BAMEState:
        if self.score_steps > 1:
            gradient = state.gradient + grad_OSC / self.score_steps
            if not self.adapts(clock.step, clock.total_steps):
                return state._replace(gradient=gradient)
            state, grad_OSC = state._replace(gradient=torch.zeros_like(gradient)), gradient
        candidate = self._candidate(w_OSC, grad_OSC, state.mask, pattern, clock)
        memory = state.oscillation
        if self.changes == "candidate":
            memory = self._remember(memory, state.mask, candidate, pattern)
        frozen_OSG1 = self._frozen(masked(w_OSC, state.mask), memory, pattern).unsqueeze(-1)
        mask = torch.where(frozen_OSG1, blocks(state.mask, pattern.m), blocks(candidate, pattern.m)).flatten(-2)
        if self.changes == "applied":
            memory = self._remember(memory, state.mask, mask, pattern)
        return state._replace(mask=mask, oscillation=memory)

    def _candidate(self, w_OSC: Tensor, grad_OSC: Tensor, mask: Tensor, pattern: Pattern, clock: Clock) -> Tensor:
        """Keep what is worth most to the loss: Eq. 4 for weights that are there, Eq. 5 for those that are not."""
        g = grad_OSC.float().nan_to_num(0.0, 0.0, 0.0)
        loss_OSC = (g * w_OSC.float()).abs()
        gain_OSC = clock.learning_rate * (g.square() if self.gain == "sgd" else g.abs())
        worth_OSGM = blocks(torch.where(mask, loss_OSC, gain_OSC), pattern.m)
        # Dead channels have all zeros.
        return top_n_staying(worth_OSGM, pattern.n, blocks(mask, pattern.m)).flatten(-2)  # Eq. 6

    def _remember(self, memory_OSG: Tensor, before: Tensor, after: Tensor, pattern: Pattern) -> Tensor:
        divergence_OSG = blocks(before ^ after, pattern.m).sum(-1)  # Eq. 7
        return self.memory * memory_OSG + (1 - self.memory) * divergence_OSG  # Eq. 8

    def _frozen(self, w_OSC: Tensor, memory_OSG: Tensor, pattern: Pattern) -> Tensor:
        """Mark the blocks that keep their mask (Eq. 9 and 10); bool ``[O, S, G]``."""
        flat_K = memory_OSG.flatten()
        oscillating_K = top_n(flat_K, int(self.freeze_oscillating * flat_K.numel())) & (flat_K > self.thaw)
        norm_K = blocks(w_OSC.float(), pattern.m).norm(dim=-1).flatten()
        large_K = top_n(norm_K, int(self.freeze_large * norm_K.numel()))
        frozen_K = oscillating_K | large_K if self.combine == "or" else oscillating_K & large_K
        return frozen_K.reshape(memory_OSG.shape)
