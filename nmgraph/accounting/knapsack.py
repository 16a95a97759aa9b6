"""Choose one option of every class so that the harm is least and the costs stay within a limit.

The multiple-choice knapsack problem (Kellerer, Pferschy & Pisinger, Knapsack Problems, 2004, chapter 11). Per class, only
options on the lower convex hull of (cost, harm) matter to the relaxed problem, whose best is known for every limit at once:
take the steps of all hulls, the steepest first. That is a bound from below for any limit, and at its corners a choice.
Classes are then decided one by one; of the partial choices, those stay that no other beats in both cost and harm, and
whose bound does not exceed the harm of the best choice known. The result is the best there is, unless more of them stay than
:data:`STATES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
STATES = 20_000
"""Partial choices that are kept; beyond, those with the lowest bounds."""
_ROUNDING = 1e-9  # of sums in another order


class Choice(NamedTuple):
    """One option for each class.

    Attributes:
        options: the number of the option, class by class.
        harm: their sum.
        bound: no choice within the limit has less; equal to ``harm`` where the choice is known to be the best.
    """

    options: tuple[int, ...]
    harm: float
    bound: float


class Envelope(NamedTuple):
    """The least harm of several classes for any limit, where options may be mixed; convex, falling, piecewise linear."""

    cost: Floats
    harm: Floats

    @classmethod
    def of(cls, hulls: Sequence[Floats]) -> Envelope:
        """Put the steps of all hulls in a row, the steepest first, from where every class takes its cheapest option."""
        steps = np.concatenate([np.diff(hull, axis=0) for hull in hulls] or [np.zeros((0, 2))])
        steps = steps[np.argsort(steps[:, 1] / steps[:, 0], kind="stable")]
        corners = np.vstack([sum((hull[0] for hull in hulls), np.zeros(2)), steps]).cumsum(0)
        return cls(corners[:, 0], corners[:, 1])

    def bound(self, limits: Floats) -> Floats:
        """Give the least harm at each limit; infinite where nothing is that cheap."""
        reached = limits >= self.cost[0] * (1 - _ROUNDING)
        return np.where(reached, np.interp(limits, self.cost, self.harm), np.inf)

    def rounded(self, limits: Floats) -> Floats:
        """Give the harm of a choice without mixed options at each limit: that of the last corner within it."""
        corner = np.searchsorted(self.cost * (1 - _ROUNDING), limits, side="right") - 1
        return np.where(corner >= 0, self.harm[corner], np.inf)


def choose(costs: Sequence[Sequence[float]], harms: Sequence[Sequence[float]], limit: float) -> Choice:
    """Choose one option of every class: least harm, costs at most ``limit``.

    Args:
        costs: of each option, class by class, at least 0.
        harms: the same for the harm.
        limit: of the sum of costs, which may be exceeded by rounding only.

    Raises:
        ValueError: if the cheapest options together cost more.
    """
    classes = [(np.asarray(c, float), np.asarray(h, float)) for c, h in zip(costs, harms, strict=True)]
    order = sorted(
        range(len(classes)), key=lambda i: -np.ptp(classes[i][0])
    )  # what costs most first: bounds tighten soon
    limit *= 1 + _ROUNDING
    hulls = [_hull(*classes[i]) for i in order]
    whole = Envelope.of(hulls)
    if limit < whole.cost[0]:
        raise ValueError(f"the cheapest options cost {whole.cost[0]}, more than {limit}")
    bound, slack = float(whole.bound(np.array([limit]))[0]), abs(float(whole.harm[0])) * _ROUNDING

    cost, harm, exact = np.zeros(1), np.zeros(1), True
    trail: list[tuple[NDArray[Any], NDArray[Any]]] = []
    for place, i in enumerate(order):
        options = len(classes[i][0])
        cost, harm = (np.add.outer(of, more).ravel() for of, more in zip((cost, harm), classes[i], strict=True))
        rest = Envelope.of(hulls[place + 1 :])
        lowest, completed = harm + rest.bound(limit - cost), harm + rest.rounded(limit - cost)
        best = completed.min() + slack
        kept = np.flatnonzero(lowest <= best)
        kept = kept[np.lexsort((harm[kept], cost[kept]))]
        before = np.concatenate([[np.inf], np.minimum.accumulate(harm[kept])[:-1]])
        kept = kept[harm[kept] < before]
        if len(kept) > STATES:
            known = completed[kept] <= best  # choices that are known are not lost
            exact, kept = False, kept[np.argsort(np.where(known, -np.inf, lowest[kept]), kind="stable")[:STATES]]
        cost, harm = cost[kept], harm[kept]
        trail.append((kept // options, kept % options))

    state = int(harm.argmin())
    found, chosen = float(harm[state]), [0] * len(classes)
    for i, (parents, options_of) in zip(reversed(order), reversed(trail), strict=True):
        chosen[i], state = int(options_of[state]), int(parents[state])
    return Choice(tuple(chosen), found, found if exact else min(found, bound))


def _hull(costs: Floats, harms: Floats) -> Floats:
    """Give the lower convex hull of the options, ``[K, 2]``, as far as the harm falls."""
    hull: list[tuple[float, float]] = []
    for cost, harm in sorted(zip(costs.tolist(), harms.tolist(), strict=True)):
        if hull and harm >= hull[-1][1]:
            continue
        while len(hull) > 1 and _is_above(hull[-1], hull[-2], (cost, harm)):
            hull.pop()
        hull.append((cost, harm))
    return np.array(hull)


def _is_above(middle: tuple[float, float], left: tuple[float, float], right: tuple[float, float]) -> bool:
    (x, y), (x0, y0), (x1, y1) = middle, left, right
    return (y - y0) * (x1 - x0) >= (y1 - y0) * (x - x0)
