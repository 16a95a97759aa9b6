"""Order input channels so that an N:M mask keeps more magnitude (Pool & Yu, NeurIPS 2021).

Which M channels share a block is free where the layers before can write their channels in another order. The search
swaps channels between blocks. With ``t`` the N-th largest magnitude of a block's other channels and ``s`` the sum of
the larger ones, a row of a block that takes in a channel ``x`` keeps ``s + max(t, x)``, so what every swap would gain
is one table of slots by channels, and ``sum max(t, x)`` over rows is an L1 distance. Swaps that touch no common block
are made together until none gains; then a few bounded losses are taken on (the paper's escapes) and made good again.

Magnitudes are rounded to 12 bits for the search. Sums are then exact in whatever order they are taken, so every
machine, rank and number of threads decides alike. What is reported is computed from the weights themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmgraph.errors import PatternError
from nmgraph.nm.pattern import Pattern

_LEVELS = 4095  # with at most _ROWS rows, sums stay below 2^24, where float32 still counts in ones
_ROWS = 4096
_ROUND = 2**29  # slots x channels x rows that one whole round may compare; more rows are sampled
_CHANNELS = 2048  # that are searched together; more are searched in parts
ESCAPE_WORK = 2**29
"""Slots x channels x rows that the escapes of one search may compare, unless told otherwise: about a second."""


@dataclass(frozen=True)
class ChannelOrder:
    """What a search found.

    Attributes:
        permutation_C: int64 on the CPU; channel ``i`` of the permuted weight is channel ``permutation_C[i]``.
        before: magnitude kept in the given order.
        after: magnitude kept in the found order, never less.
        ideal: magnitude kept if each row kept its largest, whatever their blocks.
        total: magnitude of all weights.
    """

    permutation_C: Tensor
    before: float
    after: float
    ideal: float
    total: float

    @property
    def efficacy(self) -> float:
        """Share of the possible gain that was found, as the paper counts it."""
        possible = self.ideal - self.before
        return (self.after - self.before) / possible if possible > 0 else 0.0


def kept_magnitude(w_RC: Tensor, pattern: Pattern) -> float:
    """Sum what a magnitude mask keeps.

    >>> kept_magnitude(torch.tensor([[4.0, 3.0, -2.0, 1.0]]), Pattern(1, 2))
    6.0
    """
    blocks_RGM = w_RC.detach().abs().reshape(w_RC.shape[0], w_RC.shape[1] // pattern.m, pattern.m)
    return float(blocks_RGM.topk(pattern.n, dim=-1).values.sum(dtype=torch.float64))


def ideal_magnitude(w_RC: Tensor, pattern: Pattern) -> float:
    """Sum what each row would keep at the same density without blocks: no order of channels keeps more.

    >>> ideal_magnitude(torch.tensor([[4.0, 3.0, -2.0, 1.0]]), Pattern(1, 2))
    7.0
    """
    keep = w_RC.shape[1] * pattern.n // pattern.m
    return float(w_RC.detach().abs().topk(keep, dim=-1).values.sum(dtype=torch.float64))


def best_order(
    weights: Sequence[tuple[Tensor, Pattern]], *, escapes: int = 200, work: int = ESCAPE_WORK, seed: int = 0
) -> ChannelOrder:
    """Search one order of channels for weights that share their input, for the sum of what their masks keep.

    Args:
        weights: ``w_RC`` with its pattern, one per consumer; all have the same C, which every M divides. Finite.
        escapes: how often to accept a loss and search on.
        work: what the escapes may compare, counted in slots x channels x rows; large weights get fewer escapes.
        seed: of the generator that samples rows and draws escapes.

    Raises:
        PatternError: if an M does not divide the channels.

    >>> found = best_order([(torch.tensor([[4.0, 3.0, -2.0, 1.0]]), Pattern(1, 2))])
    >>> found.before, found.after
    (6.0, 7.0)
    """
    channels = weights[0][0].shape[1]
    for _, pattern in weights:
        if not pattern.divides(channels):
            raise PatternError(f"{pattern.misfit(channels)}, so there is no order of blocks of {pattern} to search.")
    rows = [(w.detach().abs().to("cpu", torch.float32), pattern) for w, pattern in weights]
    generator = torch.Generator().manual_seed(seed)
    stripe = math.lcm(*(pattern.m for _, pattern in rows))
    permutation = torch.arange(channels)
    part = max(_CHANNELS // stripe, 2) * stripe
    for start in range(0, channels, part):
        some = slice(start, min(start + part, channels))
        permutation[some] = start + _search([(w[:, some], p) for w, p in rows], stripe, escapes, work, generator)

    def kept(order_C: Tensor) -> float:
        return sum(kept_magnitude(w[:, order_C], p) for w, p in rows)

    before, after = kept(torch.arange(channels)), kept(permutation)
    if after <= before:  # rows were sampled and rounded: what gained there may not gain here
        permutation, after = torch.arange(channels), before
    ideal = sum(ideal_magnitude(w, p) for w, p in rows)
    total = sum(float(w.sum(dtype=torch.float64)) for w, _ in rows)
    return ChannelOrder(permutation, before, after, ideal, total)


def _search(
    weights: Sequence[tuple[Tensor, Pattern]], stripe: int, escapes: int, work: int, generator: torch.Generator
) -> Tensor:
    """Find an order of the columns of non-negative weights; int64 ``[C]``."""
    channels = weights[0][0].shape[1]
    order = _Order(_rounded(weights, generator), channels, stripe)
    if order.stripes < 2:
        return order.slots
    order.climb()
    best, spare = order.copy(), order.work + work
    for _ in range(escapes):
        if order.work > spare:
            break
        order.escape(generator)
        order.climb()
        if order.kept() >= best.kept():
            best = order.copy()
        else:
            order = best.copy(work=order.work)
    return best.slots


def _rounded(weights: Sequence[tuple[Tensor, Pattern]], generator: torch.Generator) -> list[tuple[Tensor, Pattern]]:
    """Stack weights of the same pattern, sample their rows and round them: float32 ``x_CR`` of whole numbers."""
    channels = weights[0][0].shape[1]
    total = sum(w.shape[0] for w, _ in weights)
    wanted = min(_ROWS, max(64, _ROUND // channels**2))
    largest = max(float(w.max()) if w.numel() else 0.0 for w, _ in weights) or 1.0
    stacked = []
    for pattern in dict.fromkeys(p for _, p in weights):
        w_RC = torch.cat([w for w, p in weights if p == pattern])
        share = max(1, w_RC.shape[0] * wanted // total) if total > wanted else w_RC.shape[0]
        if share < w_RC.shape[0]:
            w_RC = w_RC[torch.randperm(w_RC.shape[0], generator=generator)[:share].sort().values]
        stacked.append(((w_RC.T * (_LEVELS / largest)).round().contiguous(), pattern))
    return stacked


class _Order:
    """An order of channels, what its blocks keep, and what each slot would keep with each channel in it.

    A slot is a place in the order; a stripe is the fewest slots that hold whole blocks of every pattern.
    """

    def __init__(self, weights: list[tuple[Tensor, Pattern]], channels: int, stripe: int) -> None:
        self.weights, self.stripe, self.stripes = weights, stripe, channels // stripe
        self.slots = torch.arange(channels)
        self.with_SC = [torch.empty(channels, channels, dtype=torch.float64) for _ in weights]
        self.kept_G = [torch.empty(channels // p.m, dtype=torch.float64) for _, p in weights]
        self.work = 0
        self._renew(torch.arange(self.stripes))

    def copy(self, work: int = 0) -> _Order:
        other = _Order.__new__(_Order)
        other.__dict__.update(self.__dict__, slots=self.slots.clone(), work=work or self.work)
        other.with_SC, other.kept_G = [t.clone() for t in self.with_SC], [t.clone() for t in self.kept_G]
        return other

    def kept(self) -> float:
        return float(sum(kept.sum() for kept in self.kept_G))

    def climb(self) -> None:
        """Swap channels between stripes while that gains, of equal gains at the lowest slots first."""
        while True:
            gain_TT, swap_TT = self._gains().max(-1)
            pairs = _matched(gain_TT)
            if not pairs.numel():
                return
            self._swap(pairs, swap_TT[pairs[:, 0], pairs[:, 1]])

    def escape(self, generator: torch.Generator) -> None:
        """Make, between up to eight random pairs of stripes, one of the two swaps that lose least."""
        count = min(8, self.stripes // 2)
        pairs = torch.randperm(self.stripes, generator=generator)[: 2 * count].reshape(-1, 2)
        least = self._gains()[pairs[:, 0], pairs[:, 1]].sort(dim=-1, descending=True, stable=True).indices[:, :2]
        self._swap(pairs, least[torch.arange(count), torch.randint(least.shape[1], (count,), generator=generator)])

    def _gains(self) -> Tensor:
        """Give what each swap gains: ``[stripe, stripe, slot of the first x slot of the second]``."""
        t, m = self.stripes, self.stripe
        gain_SS = torch.zeros(t * m, t * m, dtype=torch.float64)
        for (_, pattern), with_SC, kept_G in zip(self.weights, self.with_SC, self.kept_G, strict=True):
            own_S = kept_G.repeat_interleave(pattern.m)
            placed_SS = with_SC[:, self.slots] - own_S[:, None]
            gain_SS += placed_SS + placed_SS.T
        self.work += 16 * gain_SS.numel()
        # Swaps within a stripe are left out; where its blocks are smaller, other stripes still reach all of it.
        return gain_SS.reshape(t, m, t, m).permute(0, 2, 1, 3).reshape(t, t, m * m)

    def _swap(self, pairs_P2: Tensor, swap_P: Tensor) -> None:
        first = pairs_P2[:, 0] * self.stripe + swap_P // self.stripe
        second = pairs_P2[:, 1] * self.stripe + swap_P % self.stripe
        self.slots[first], self.slots[second] = self.slots[second], self.slots[first]
        self._renew(pairs_P2.flatten())

    def _renew(self, stripes_T: Tensor) -> None:
        """Compute again what depends on the channels in these stripes."""
        slots = (stripes_T[:, None] * self.stripe + torch.arange(self.stripe)).flatten()
        for (x_CR, p), with_SC, kept_G in zip(self.weights, self.with_SC, self.kept_G, strict=True):
            x_GMR = x_CR[self.slots[slots]].reshape(slots.numel() // p.m, p.m, x_CR.shape[1])
            ranked_GMR = x_GMR.sort(dim=1, descending=True).values
            last, next_ = ranked_GMR[:, p.n - 1 : p.n], ranked_GMR[:, p.n : p.n + 1]
            top = ranked_GMR[:, : p.n].sum(1, keepdim=True)
            threshold_SR = torch.where(x_GMR >= last, next_, last).flatten(0, 1)
            larger_S = (top - torch.maximum(x_GMR, last)).sum(-1, dtype=torch.float64).flatten()
            distance_SC = torch.cdist(threshold_SR, x_CR, p=1.0).double()
            # max(t, x) = (t + x + |t - x|) / 2
            both_SC = threshold_SR.sum(-1, dtype=torch.float64)[:, None] + x_CR.sum(-1, dtype=torch.float64)
            with_SC[slots] = larger_S[:, None] + (both_SC + distance_SC) / 2
            kept_G[slots[:: p.m] // p.m] = top[:, 0].sum(-1, dtype=torch.float64)
            self.work += slots.numel() * x_CR.numel()


def _matched(gain_TT: Tensor) -> Tensor:
    """Pair stripes that gain most with each other, until no pair gains; int64 ``[P, 2]``, no stripe twice."""
    own = torch.arange(gain_TT.shape[0])
    gain_TT = gain_TT.clone().fill_diagonal_(0.0)
    pairs: list[Tensor] = []
    while True:
        gain_T, best_T = gain_TT.max(1)
        mutual = (best_T[best_T] == own) & (own < best_T) & (gain_T > 0)
        if not bool(mutual.any()):
            return torch.cat(pairs) if pairs else torch.empty(0, 2, dtype=torch.int64)
        pairs.append(torch.stack((own[mutual], best_T[mutual]), 1))
        taken = pairs[-1].flatten()
        gain_TT[taken] = 0.0
        gain_TT[:, taken] = 0.0
