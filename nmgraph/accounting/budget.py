"""Suggest a pattern for each layer, so that the measured harm is least within a budget of operations or bytes.

Layer-wise N:M in the spirit of DominoSearch (Sun et al., NeurIPS 2021), which finds the patterns while it trains; here the
harms of single layers, as ``passes/sensitivity.py`` measures them, are taken to add up.
"""

from __future__ import annotations

import glob
import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from nmgraph.accounting.knapsack import choose
from nmgraph.errors import ConversionError
from nmgraph.nm.packing import packed_bytes
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.recipe_file import RecipeFile
from nmgraph.passes.sensitivity import Sensitivity, SiteHarm

DENSE = "dense"
_TIE = 1e-6  # of the largest change: what decides between choices of equal harm
KINDS = {"flops": "operations with weights", "size": "bytes of weights"}


@dataclass(frozen=True)
class Budget:
    """How much of the dense model may be left.

    Attributes:
        kind: ``flops``, multiply-accumulate operations with weights; or ``size``, bytes of all parameters, of pruned ones
            the kept values and their positions, as an export with ``safetensors`` stores them.
        share: at most, above 0 and below 1.

    Raises:
        ConversionError: for any other.
    """

    kind: str
    share: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConversionError(f"there is no budget of {self.kind!r}. Use flops or size, for example flops=0.5.")
        if not 0 < self.share < 1:
            raise ConversionError(
                f"a budget of {self.share} is no share of the dense model. Use for example {self.kind}=0.5."
            )

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``flops=0.5`` or ``size=0.5``.

        Raises:
            ConversionError: if the text has another form.
        """
        kind, _, share = text.partition("=")
        try:
            return cls(kind, float(share))
        except ValueError as error:
            raise ConversionError(
                f"{text!r} is no budget. Write flops=SHARE or size=SHARE, for example flops=0.5."
            ) from error

    def __str__(self) -> str:
        return f"{self.kind}={self.share:g}"


@dataclass(frozen=True)
class Suggestion:
    """One pattern for each measured site, or none.

    Attributes:
        budget: what it was made for.
        reached: share of the dense model's operations or bytes that it leaves.
        harm: sum of the measured changes; those below 0 count as 0.
        bound: no other choice within the budget has less, to a millionth of the largest change.
        patterns: by site, in the model's order; ``dense`` for those to leave as they are.
        included: sites to prune that are only converted if they are included.
    """

    budget: Budget
    reached: float
    harm: float
    bound: float
    patterns: dict[str, str]
    included: tuple[str, ...]

    def recipe(self, **others: Any) -> RecipeFile:
        """Give the recipe that converts to exactly these patterns; ``others`` are its other entries, such as the method."""
        return RecipeFile(
            layers={glob.escape(name): pattern for name, pattern in self.patterns.items() if pattern != DENSE},
            skip=[glob.escape(name) for name, pattern in self.patterns.items() if pattern == DENSE],
            include=[glob.escape(name) for name in self.included],
            **others,
        )

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)

    def __str__(self) -> str:
        least = "" if self.bound == self.harm else f" (no other choice has less than {self.bound:.4g})"
        return f"suggested for {self.budget}: {self.reached:.1%} of the {KINDS[self.budget.kind]}, summed harm {self.harm:.4g}{least}"

    def __rich__(self) -> Group:
        table = Table(header_style="bold")
        table.add_column("site", overflow="fold")
        table.add_column("pattern")
        for name, pattern in self.patterns.items():
            table.add_row(escape(name) or "(root)", f"[yellow]{DENSE}" if pattern == DENSE else pattern)
        return Group(str(self), table)


def suggest(measured: Sensitivity, budget: Budget) -> Suggestion:
    """Choose a pattern for every measured site, or to leave it dense.

    Of choices that do equal harm, as all do where nothing was seen to get worse, the one is taken that prunes most evenly: a
    small harm grows with the square of what is pruned.

    Raises:
        ConversionError: if the budget can't be kept, with the least that can.
    """
    dense_cost = measured.macs if budget.kind == "flops" else measured.bytes
    if not dense_cost:
        raise ConversionError(
            f"it is not known how many operations the model takes, so {budget} says nothing. Use size=..."
        )
    options = [(DENSE, *site.changes) for site in measured.sites]
    costs = [[_cost(site, p, budget.kind) for p in ps] for site, ps in zip(measured.sites, options, strict=True)]
    harms = [[0.0, *(max(0.0, change) for change in site.changes.values())] for site in measured.sites]
    fixed = dense_cost - sum(own[0] for own in costs)
    least = (fixed + sum(map(min, costs))) / dense_cost
    if least > budget.share * (1 + 1e-9):
        raise ConversionError(
            f"{budget} can't be kept: with the sparsest of the patterns tried everywhere, {least:.1%} of the {KINDS[budget.kind]} "
            f"are left. Allow at least {budget.kind}={math.ceil(least * 1000) / 1000:g}, or try sparser patterns."
        )
    tie = _TIE * (max(map(max, harms)) or 1.0) / dense_cost
    uneven = [[tie * (own[0] - cost) ** 2 / (own[0] or 1) for cost in own] for own in costs]
    weighed = [[h + u for h, u in zip(*pair, strict=True)] for pair in zip(harms, uneven, strict=True)]
    found = choose(costs, weighed, budget.share * dense_cost - fixed)
    harm = sum(own[i] for own, i in zip(harms, found.options, strict=True))
    bound = harm if found.bound == found.harm else min(harm, found.bound)
    patterns = {site.name: own[i] for site, own, i in zip(measured.sites, options, found.options, strict=True)}
    spent = fixed + sum(own[i] for own, i in zip(costs, found.options, strict=True))
    included = tuple(s.name for s in measured.sites if s.on_request and patterns[s.name] != DENSE)
    return Suggestion(budget, spent / dense_cost, harm, bound, patterns, included)


def _cost(site: SiteHarm, pattern: str, kind: str) -> float:
    """Give the operations or bytes of a site that is pruned to a pattern; or left dense."""
    if pattern == DENSE:
        return site.macs if kind == "flops" else site.bytes
    told = Pattern.parse(pattern)
    if kind == "flops":
        return site.macs * told.n / told.m
    kept = site.weights * told.n // told.m
    return site.bytes * told.n / told.m + packed_bytes(kept, told.m)
