"""What a training run costs, beside the dense run: as planned by a method, and as the masks really were.

Three ways of counting are kept apart:

    needed      products that have a zero weight, and results that nothing reads, are not counted
    on 2:4      what sparse tensor cores can leave out: half of a product whose weight is 2:4 along its reduction axis,
                however much sparser it is; never anything of dW, and of dX only under a mask for the backward
    published   the closed forms of the papers (:mod:`nmgraph.accounting.published`)
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from nmgraph.accounting.macs import Macs, ModelMacs
from nmgraph.methods import make_method
from nmgraph.methods.contract import Clock, Method, Work
from nmgraph.nm.pattern import TENSOR_CORES, Pattern
from nmgraph.training.run_log import RunLog

DENSE = Work(1.0, 1.0, 1.0)
_MOST_STEPS = 100_003
"""Of a run whose work is added up one by one; of a longer one so many are looked at, a prime, as methods act every 40 or 100."""


class Share(NamedTuple):
    """Shares of a layer's dense MACs.

    Attributes:
        needed: that the method needs.
        on_24: that sparse tensor cores would do.
    """

    needed: Work
    on_24: Work


@dataclass(frozen=True)
class TrainingCost:
    """MACs of a run, over those of the dense run.

    Attributes:
        dense: MACs of one dense step.
        layers: mean share over the run, of each sparse site; the other layers are dense.
        needed: mean MACs of a step.
        on_24: mean MACs of a step on 2:4 sparse tensor cores.
        inference: share of a dense forward's MACs that the trained model needs.
        inference_on_24: the same on sparse tensor cores.
        steps: of the run.
    """

    dense: Macs
    layers: Mapping[str, Share]
    needed: tuple[float, float, float]
    on_24: tuple[float, float, float]
    inference: float
    inference_on_24: float
    steps: int

    @property
    def ratio(self) -> float:
        """Needed over dense MACs of the run."""
        return _over(sum(self.needed), sum(self.dense))

    @property
    def ratio_on_24(self) -> float:
        """MACs on sparse tensor cores over dense MACs of the run."""
        return _over(sum(self.on_24), sum(self.dense))


def plan_cost(
    macs: ModelMacs,
    sparse: Mapping[str, tuple[Method[Any], Pattern]],
    total_steps: int = 5_000,
    *,
    forward_only: Collection[str] = (),
) -> TrainingCost:
    """Say what a run will cost.

    Args:
        macs: of the dense model.
        sparse: method and pattern of each converted site.
        total_steps: of the run; phases that are counted in steps weigh less in a longer one.
        forward_only: sites whose input gradient uses the forward mask, though the method has one for the backward.
    """
    shares = {site: _planned(method, pattern, total_steps) for site, (method, pattern) in sparse.items()}
    shares |= {site: _one_way(shares[site]) for site in forward_only}
    return _cost(macs, shares, {site: pattern for site, (_, pattern) in sparse.items()}, total_steps)


def cost_of_run(macs: ModelMacs, log: RunLog) -> TrainingCost:
    """Say what a run has cost by its log, up to the last record: masks are those that really were.

    Args:
        macs: of the dense model.
        log: of the run.
    """
    shares, patterns = {}, {}
    last = log.records[-1].step if log.records else log.run.step
    for site, layer in log.run.layers.items():
        method, pattern = make_method(layer["method"], layer["options"]), Pattern.parse(layer["pattern"])
        kept = [(r.step, r.layers[site]["kept"]) for r in log.records if "kept" in r.layers.get(site, {})]
        share = _recorded(method, pattern, kept, log.run.total_steps)
        shares[site] = share if layer["splits_backward"] or not method.splits_backward else _one_way(share)
        patterns[site] = pattern
    return _cost(macs, shares, patterns, last)


def _cost(macs: ModelMacs, shares: Mapping[str, Share], patterns: Mapping[str, Pattern], steps: int) -> TrainingCost:
    dense = macs.total
    reached = {site: _at_end(pattern) for site, pattern in patterns.items()}
    return TrainingCost(
        dense,
        shares,
        _sum(macs, {site: share.needed for site, share in shares.items()}),
        _sum(macs, {site: share.on_24 for site, share in shares.items()}),
        _over(_sum(macs, {site: share.needed for site, share in reached.items()})[0], dense.forward),
        _over(_sum(macs, {site: share.on_24 for site, share in reached.items()})[0], dense.forward),
        steps,
    )


def _over(part: float, dense: float) -> float:
    return part / dense if dense else 1.0  # of an empty batch


def _sum(macs: ModelMacs, works: Mapping[str, Work]) -> tuple[float, float, float]:
    weighted = [
        [count * share for count, share in zip(layer, works.get(site, DENSE), strict=True)]
        for site, layer in macs.layers.items()
    ]
    forward, input_gradient, weight_gradient = (sum(column) for column in zip(*weighted, macs.elsewhere, strict=True))
    return forward, input_gradient, weight_gradient


def _one_way(share: Share) -> Share:
    return share._replace(on_24=share.on_24._replace(input_gradient=1.0))


def _at_end(pattern: Pattern) -> Share:
    d = pattern.density
    return Share(Work(d, d, d), Work(0.5 if pattern.implies(TENSOR_CORES) else 1.0, 1.0, 1.0))


def _on_24(method: Method[Any], pattern: Pattern, densities: Sequence[float]) -> list[Work]:
    """Say what sparse tensor cores do at moments when the forward mask has these densities."""
    sparse = Work(0.5, 0.5 if method.sparse_input_gradient else 1.0, 1.0)
    if not pattern.implies(TENSOR_CORES):
        return [DENSE] * len(densities)
    return [sparse if density <= pattern.density + 1e-6 else DENSE for density in densities]


@lru_cache(maxsize=256)
def _planned(method: Method[Any], pattern: Pattern, total_steps: int, first: int = 0, end: int | None = None) -> Share:
    """Take the mean over the steps of a run, or over those from ``first`` to before ``end``."""
    steps = (total_steps if end is None else end) - first
    looked_at = min(steps, _MOST_STEPS)
    clocks = (Clock(first + i * steps // looked_at, total_steps, 0.0) for i in range(looked_at))
    works = [method.work(pattern, clock) for clock in clocks]
    return Share(_mean(works), _mean(_on_24(method, pattern, [work.forward for work in works])))


def _recorded(method: Method[Any], pattern: Pattern, kept: Sequence[tuple[int, float]], total_steps: int) -> Share:
    if not kept:
        return Share(DENSE, DENSE)
    if kept[0][0] == kept[-1][0]:  # a run that goes on begins with the step at which it stopped
        kept = [kept[0], (kept[0][0] + 1, kept[0][1])]
    spans = [(after - before) for (before, _), (after, _) in itertools.pairwise(kept)]
    density = _weighted(((a + b) / 2 for (_, a), (_, b) in itertools.pairwise(kept)), spans)
    # What a gradient needs differs from what the forward needs by what the method does, not by what the masks are.
    end = min(kept[-1][0], total_steps)
    plan = _planned(method, pattern, total_steps, min(kept[0][0], end - 1), end).needed
    needed = Work(
        density,
        min(1.0, density + plan.input_gradient - plan.forward),
        min(1.0, density + plan.weight_gradient - plan.forward),
    )
    at = _on_24(method, pattern, [share for _, share in kept[:-1]])
    return Share(needed, Work(*(_weighted(column, spans) for column in zip(*at, strict=True))))


def _weighted(values: Iterable[float], weights: Sequence[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def _mean(works: Sequence[Work]) -> Work:
    return Work(*(sum(column) / len(works) for column in zip(*works, strict=True)))


def state_bytes(method: Method[Any], pattern: Pattern, shape_OSC: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Count the bytes that a method keeps beside one weight, its clock and recipe left away.

    States of small weights are made and extrapolated: a state grows by the weight, by its rows, or not at all.
    """
    one = (pattern.m, pattern.m)
    constant_row_weight = _growth(method, pattern, one, dtype)
    rows, weights = shape_OSC[0], shape_OSC[0] * shape_OSC[1] * shape_OSC[2]
    fixed, per_row, per_weight = constant_row_weight
    return round(fixed + per_row * rows + per_weight * weights)


@lru_cache(maxsize=256)
def _growth(
    method: Method[Any], pattern: Pattern, size: tuple[int, int], dtype: torch.dtype
) -> tuple[float, float, float]:
    def measure(rows: int, columns: int) -> int:
        state = method.init(torch.zeros(rows, 1, columns, dtype=dtype), pattern)
        return sum(t.numel() * t.element_size() for t in state)

    rows, columns = size
    base, wider, taller = measure(rows, columns), measure(rows, 2 * columns), measure(2 * rows, columns)
    per_weight = (wider - base) / (rows * columns)
    per_row = (taller - base) / rows - per_weight * columns
    return base - per_row * rows - per_weight * rows * columns, per_row, per_weight
