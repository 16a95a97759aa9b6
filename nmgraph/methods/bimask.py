"""Bi-Mask: Zhang et al., Bi-directional Masks for Efficient N:M Sparse Training (ICML 2023, arXiv 2302.06058).

Two masks: the forward one of SR-STE along rows, and inside it a backward one along columns, so that the input
gradient multiplies by an N:M weight as well. The rows are permuted first, so that fewer weights fall out of the backward
mask: by the best of some random permutations in the paper, by swaps of rows here unless told otherwise. The weight's
gradient is dense, as SR-STE's.
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
from nmgraph.methods.srste import refined_by_magnitude
from nmgraph.nm.masks import magnitude_mask
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.permutation import OBJECTIVES, SEARCHES, column_sparse, find_permutation
from nmgraph.nm.randomness import generator, seed_of
from nmgraph.nm.straight_through import largest_straight_through


class BiMaskState(NamedTuple):
    """State of one weight.

    Attributes:
        permutation: int64 ``[O]``, which rows are neighbours in the backward mask.
        seed: int64 scalar of this layer's random draws.
        salience: float ``[O, S, C]``, what the backward mask ranks by; empty where that is the weight's magnitude.
    """

    permutation: Tensor
    seed: Tensor
    salience: Tensor


@dataclass(frozen=True)
class BiMask(Method[BiMaskState]):
    """Separate masks for the forward product and for the input gradient.

    Attributes:
        decay: SR-STE's λ, of weights outside the forward mask.
        interval: ΔT, steps between two choices of the permutation.
        search: how: ``swap``, rows between blocks of the present permutation, or ``random``, the best of some random
            permutations (the paper).
        candidates: K, random permutations to choose from, or rounds of swaps.
        objective: what a permutation is judged by: ``blocks``, the number of column blocks that lose nothing (the
            paper), or ``kept``, the number of weights left (the official code).
        criterion: what the backward mask ranks by (Table 8): ``weight``, ``gradient``, ``multinomial`` or ``random``.
        backward_mask: False leaves the input gradient as it is (Table 9, baseline).
        permute: False leaves the rows in their order (Table 9, "+ backward mask").
        seed: of the random draws.

    Raises:
        MethodError: if a value lies outside its range.
    """

    name: ClassVar[str] = "bimask"
    title: ClassVar[str] = "Bi-directional masks"
    paper: ClassVar[str] = "Zhang et al., ICML 2023"
    gradient: ClassVar[str] = "dense, straight through; masked weights decay; the input gradient is N:M"
    state_cost: ClassVar[str] = "8 bytes per output channel"
    time_cost: ClassVar[str] = "two passes over the weight per forward, one per step; a search of rows per refresh"
    unattached: ClassVar[str] = "masked weights do not decay, and rows are not permuted"
    state_type: ClassVar[type[tuple[Any, ...]]] = BiMaskState
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "search": SEARCHES,
        "objective": OBJECTIVES,
        "criterion": ("weight", "gradient", "multinomial", "random"),
    }
    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            {"decay": 2e-4, "interval": 100, "search": "random", "candidates": 100, "objective": "blocks"},
            "SGD, momentum 0.9, weight decay as SR-STE's (CIFAR: 1e-3), learning rate 0.1 at batch 256, 5 epochs of warm-up, "
            "cosine to 0, 120 epochs (CIFAR: 300)",
        ),
        "code": Preset(
            {"decay": 2e-4, "interval": 100, "search": "random", "candidates": 10, "objective": "kept"},
            "SGD, momentum 0.9, weight decay 1e-3 and none for batch norms, learning rate 0.1 at batch 256, no warm-up, "
            "cosine to 0, label smoothing 0.1, 300 epochs (ResNet-32 on CIFAR-10)",
            keep_dense=("head",),
            block_axis="flat",
        ),
    }

    decay: float = 2e-4
    interval: int = 100
    search: str = "swap"
    candidates: int = 100
    objective: str = "kept"
    criterion: str = "weight"
    backward_mask: bool = True
    permute: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.name, "decay", self.decay, 0.0, math.inf, "the paper's is 2e-4")
        check_range(self.name, "interval", self.interval, 1, math.inf, "the paper's is 100")
        check_range(self.name, "candidates", self.candidates, 1, math.inf, "the paper's is 100")

    @property
    def splits_backward(self) -> bool:
        """Its backward mask is a part of the forward one."""
        return self.backward_mask

    @property
    def backward_by_magnitude(self) -> bool:
        return self.backward_mask and self.criterion == "weight"

    @property
    def operand_looks_across(self) -> bool:
        """The backward mask's blocks run over rows."""
        return self.backward_mask

    def update_looks_across(self, clock: Clock) -> bool:
        return self._permutes(clock) or self.criterion in ("multinomial", "random")

    def init(self, w_OSC: Tensor, pattern: Pattern) -> BiMaskState:
        seed = seed_of(w_OSC, self.seed)
        identity = torch.arange(w_OSC.shape[0], device=w_OSC.device)
        # Until the first step there is no gradient, and nothing was drawn.
        salience = w_OSC.abs().float() if self.criterion != "weight" else w_OSC.new_empty(0, dtype=torch.float32)
        return BiMaskState(identity, seed, salience)

    @property
    def straight_through(self) -> bool:
        return True

    def work(self, pattern: Pattern, clock: Clock) -> Work:
        # Of the backward weight at most: a block of it may lie where the forward mask has left less than N.
        return Work(pattern.density, pattern.density, 1.0)

    def mask(self, w_OSC: Tensor, state: BiMaskState, pattern: Pattern) -> Tensor:
        return magnitude_mask(w_OSC.detach(), pattern)

    def forward_weight(self, w_OSC: Tensor, state: BiMaskState, pattern: Pattern) -> Tensor:
        return largest_straight_through(w_OSC, pattern)

    def backward_weight(self, forward_OSC: Tensor, state: BiMaskState, pattern: Pattern) -> Tensor | None:
        if not self.backward_mask:
            return None
        scores = None if self.criterion == "weight" else state.salience
        # Eq. 11, in the rows' own order
        return column_sparse(forward_OSC, state.permutation, pattern, scores_OSC=scores)

    def row_order(self, state: BiMaskState) -> Tensor | None:
        return state.permutation if self.permute else None

    def update(self, w_OSC: Tensor, grad_OSC: Tensor, state: BiMaskState, pattern: Pattern, clock: Clock) -> Update:
        if self._permutes(clock):
            mask, draws = self.mask(w_OSC, state, pattern), generator(state.seed, clock.step)
            permutation = find_permutation(
                mask, state.permutation, pattern, self.search, self.candidates, self.objective, draws
            )
            state = state._replace(permutation=permutation)
        if self.criterion != "weight":
            state = state._replace(salience=self._salience(w_OSC, grad_OSC, state, clock))
        return Update(state, refined_by_magnitude(grad_OSC, w_OSC, pattern, self.decay))

    def _permutes(self, clock: Clock) -> bool:
        return self.permute and self.backward_mask and clock.step % self.interval == 0

    def _salience(self, w_OSC: Tensor, grad_OSC: Tensor, state: BiMaskState, clock: Clock) -> Tensor:
        if self.criterion == "gradient":
            return grad_OSC.abs().nan_to_num(0.0, 0.0, 0.0).float()
        draws = (
            torch.empty(w_OSC.shape, dtype=torch.float32)
            .exponential_(generator=generator(state.seed, ~clock.step))
            .to(w_OSC.device)
        )
        # The N smallest of E / |w| are a sample without replacement of probabilities proportional to |w|.
        return w_OSC.abs().float() / draws if self.criterion == "multinomial" else draws
