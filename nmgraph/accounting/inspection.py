"""What a conversion would do, gain and cost, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from nmgraph.accounting.cost import TrainingCost, plan_cost, state_bytes
from nmgraph.accounting.macs import ModelMacs
from nmgraph.accounting.published import published_ratio
from nmgraph.methods import METHODS, make_method
from nmgraph.methods.contract import Method
from nmgraph.nm.grouping import FLAT, canonical
from nmgraph.nm.masks import largest, magnitude
from nmgraph.nm.pattern import TENSOR_CORES, Pattern
from nmgraph.passes.manifest import Entry, Manifest
from nmgraph.passes.rewrite import Decision, Plan
from nmgraph.passes.verification import PAYS_FROM

TOTAL_STEPS = 5_000
"""Of the run that methods are compared for; only phases that are counted in steps depend on it."""


@dataclass(frozen=True)
class MethodTotal:
    """What one method would make of the same sites.

    Attributes:
        name: of the method.
        training: MACs of the run over the dense ones, zeros and unread results left away; None if no inputs were run.
        training_on_24: the same with what 2:4 sparse tensor cores can leave out.
        published: the papers' closed form for sparse layers alone, where there is one.
        state: bytes that it keeps beside the weights.
        refusal: why it takes no part, for at least one of the sites; the rest is None then.
    """

    name: str
    training: float | None = None
    training_on_24: float | None = None
    published: float | None = None
    state: int | None = None
    refusal: str = ""


@dataclass(frozen=True)
class Inspection:
    """What ``convert`` would do.

    Attributes:
        manifest: every site, converted or skipped.
        kept: by site, the share of the magnitude that a mask by magnitude keeps; converted ones whose values are there.
        likely: by converted site, whether TensorRT will probably choose a sparse kernel, by rules of thumb.
        inference: share of the dense forward's MACs that the finished model needs; None if no inputs were run.
        inference_on_24: the same on 2:4 sparse tensor cores.
        methods: totals for each method.
        inputs: what the model was run on, in words.
    """

    manifest: Manifest
    kept: Mapping[str, float]
    likely: Mapping[str, str]
    inference: float | None
    inference_on_24: float | None
    methods: tuple[MethodTotal, ...]
    inputs: str

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return {
            **self.manifest.to_dict(),
            "coverage": self.manifest.coverage,
            "macs_coverage": self.manifest.macs_coverage,
            "kept": dict(self.kept),
            "likely": dict(self.likely),
            "inference": self.inference,
            "inference_on_24": self.inference_on_24,
            "totals": [asdict(total) for total in self.methods],
            "run_on": self.inputs,
        }

    def __str__(self) -> str:
        return str(self.manifest)

    def __rich__(self) -> Group:
        return Group(self._sites(), "", self._totals(), "", self._words())

    def _sites(self) -> Table:
        entries = self.manifest.entries
        all_macs = sum(e.macs or 0 for e in entries)
        table = Table(title=f"{self.manifest.method}: {self.manifest}", title_justify="left", header_style="bold")
        columns: dict[str, Callable[[Entry], str]] = {"site": lambda e: escape(e.name) or "(root)"}
        columns["shape"] = lambda e: "x".join(map(str, e.shape))
        if all_macs:
            columns["MACs"] = lambda e: f"{(e.macs or 0) / all_macs:.1%}"
        columns["kept"] = lambda e: f"{self.kept[e.name]:.1%}" if e.name in self.kept else "-"
        columns["TensorRT"] = lambda e: self.likely.get(e.name, "-")
        columns["decision"] = _decision
        for column in columns:
            justify: Any = "right" if column in ("MACs", "kept") else "left"
            table.add_column(column, overflow="fold", no_wrap=column in ("shape", "MACs", "kept"), justify=justify)
        for entry in entries:
            table.add_row(*(cell(entry) for cell in columns.values()))
        table.caption, table.caption_justify = self.manifest.not_followed, "left"
        return table

    def _totals(self) -> Table:
        title = f"What the methods cost, over dense training ({TOTAL_STEPS:,} steps)"
        table = Table(title=title, title_justify="left", header_style="bold")
        table.add_column("method", no_wrap=True)
        for column in ("training MACs", "on 2:4 cores", "as published", "state"):
            table.add_column(column, justify="right")
        for total in self.methods:
            if total.refusal:
                table.add_row(total.name, f"[yellow]{escape(total.refusal)}", "", "", "")
                continue
            shares = (total.training, total.training_on_24, total.published)
            name = f"[bold]{total.name}[/]" if total.name == self.manifest.method else total.name
            table.add_row(name, *("-" if s is None else f"{s:.2f}" for s in shares), _bytes(total.state or 0))
        return table

    def _words(self) -> str:
        lines = []
        if self.inference is not None:
            lines.append(
                f"Inference, whichever the method: {self.inference:.0%} of the dense MACs; {self.inference_on_24:.0%} on 2:4 "
                f"sparse tensor cores (run on {escape(self.inputs)})."
            )
        else:
            lines.append(
                "No inputs were run, so that operations are not counted: give --input, such as --input 1x3x224x224."
            )
        lines.append(
            "[dim]kept: share of the magnitude that a mask by magnitude keeps. TensorRT: whether a sparse kernel is likely to "
            f"win there, by the rule of thumb that it takes {PAYS_FROM} channels; the builder decides. As published: in the papers' closed "
            "forms, for sparse layers alone; asp's counts the dense training before it.[/]"
        )
        return "\n".join(lines)


def inspect_plan(plan: Plan, macs: ModelMacs | None, inputs: str) -> Inspection:
    """Put together what a plan would do, gain and cost.

    Args:
        plan: of a conversion.
        macs: of the model, if it could be run.
        inputs: what it was run on, in words.
    """
    manifest = plan.manifest()
    chosen = [d for d in plan.decisions if d.refusal is None]
    if macs is not None:  # those of the run under fake tensors, which always has them
        counted = {site: layer.forward for site, layer in macs.layers.items()}
        entries = tuple(replace(e, macs=counted.get(e.name, e.macs)) for e in manifest.entries)
        manifest = replace(manifest, entries=entries)
    ends = _cost(macs, chosen, make_method("static", {})) if macs is not None else None
    return Inspection(
        manifest,
        {d.site.name: share for d in chosen if (share := _kept(d)) is not None},
        {d.site.name: _win(d) for d in chosen},
        ends.inference if ends else None,
        ends.inference_on_24 if ends else None,
        tuple(_total(name, plan, chosen, macs) for name in METHODS),
        inputs,
    )


def _win(decision: Decision) -> str:
    site, recipe = decision.site, decision.recipe
    return expected_win(site.shape, getattr(site.module, "groups", 1), recipe.pattern, recipe.reduction_axis)


def expected_win(shape: tuple[int, ...], groups: int, pattern: Pattern, axis: Any) -> str:
    """Say how likely a sparse kernel of TensorRT is to win, by what NVIDIA's maintainers say and users measured.

    Sparse kernels pay from about 256 channels on both sides; a 3x3 kernel sums over nine times its input channels, and
    grouped convolutions are not considered. Sources: NVIDIA/TensorRT issues 3849, 4054 and 4065.

    >>> expected_win((512, 512, 3, 3), 1, Pattern(2, 4), 1), expected_win((64, 64, 1, 1), 1, Pattern(2, 4), 1)
    ('likely', 'unlikely')
    """
    if not pattern.implies(TENSOR_CORES) or axis == FLAT:
        return "no"  # NVIDIA's rule is not kept
    if groups > 1:
        return "no"
    inputs = math.prod(shape) // shape[0] if axis != 0 else shape[0]
    outputs = shape[0] if axis != 0 else math.prod(shape[1:])
    channels = shape[1] if axis == 1 else inputs
    if min(channels, outputs) >= PAYS_FROM:
        return "likely"
    return "perhaps" if inputs >= PAYS_FROM and outputs >= PAYS_FROM // 2 else "unlikely"


def _decision(entry: Entry) -> str:
    if not entry.converted:
        remedy = f"; [dim]{escape(entry.remedy)}[/]" if entry.remedy else ""
        return f"[yellow]skipped[/]: {escape(entry.reason)}{remedy}"
    how = "" if entry.how == "in place" else f", {escape(entry.how.removeprefix('in place; '))}"
    return f"[green]{entry.pattern}[/]{how}{', [yellow]flat blocks[/]' if entry.axis == FLAT else ''}"


def _kept(decision: Decision) -> float | None:
    parameter, recipe = decision.site.parameter, decision.recipe
    if parameter is None or parameter.is_meta or not parameter.numel():
        return None
    w_OSC = canonical(parameter.detach(), recipe.reduction_axis)
    whole = magnitude(w_OSC)
    return magnitude(largest(w_OSC, recipe.pattern)) / whole if whole else None


def _cost(macs: ModelMacs, chosen: list[Decision], method: Method[Any]) -> TrainingCost:
    sparse = {d.site.name: (method, d.recipe.pattern) for d in chosen}
    read = {d.site.name for d in chosen if method.splits_backward and (not d.site.is_layer or d.site.read_by)}
    return plan_cost(macs, sparse, TOTAL_STEPS, forward_only=read)


def _total(name: str, plan: Plan, chosen: list[Decision], macs: ModelMacs | None) -> MethodTotal:
    own = next((d.recipe.method for d in chosen if d.recipe.method.name == name), None)
    method = own or make_method(name, {})
    refusal = next((r for d in chosen if (r := method.refusal(d.recipe.pattern))), "")
    if refusal:
        return MethodTotal(name, refusal=refusal)
    cost = None if macs is None else _cost(macs, chosen, method)
    published = {published_ratio(name, pattern) for pattern in {d.recipe.pattern for d in chosen}}
    return MethodTotal(
        name,
        cost.ratio if cost else None,
        cost.ratio_on_24 if cost else None,
        published.pop() if len(published) == 1 else None,
        sum(_state(d, method) for d in chosen),
    )


def _state(decision: Decision, method: Method[Any]) -> int:
    site, recipe = decision.site, decision.recipe
    dtype = site.parameter.dtype if site.parameter is not None else torch.float32
    empty = torch.empty(site.shape, device="meta")
    O, S, C = canonical(empty, recipe.reduction_axis).shape  # noqa: E741
    return state_bytes(method, recipe.pattern, (O, S, C), dtype)


def _bytes(count: int) -> str:
    if count < 1_000:
        return f"{count} B"
    if count < 100_000:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
