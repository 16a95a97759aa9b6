"""Where training stands: steps done, what phase each method is in, what is unfinished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from torch import nn

from nmgraph.layers.masked import MaskedWeight, masked_weights
from nmgraph.methods.contract import Clock
from nmgraph.nm.masks import magnitude


@dataclass(frozen=True)
class LayerStanding:
    """Where one layer stands.

    Attributes:
        site: its name.
        method: name of its method.
        pattern: what it will be.
        step: optimizer steps done.
        total_steps: of the run; 0 before ``attach``.
        phase: what the method is doing, in words.
        kept: share of the weights in its mask.
        magnitude: share of the weights' absolute sum that the mask keeps; None of a weight of zeros.
        gauges: what else its method shows.
        unfinished: what is missing until the mask is N:M; empty if nothing is.
    """

    site: str
    method: str
    pattern: str
    step: int
    total_steps: int
    phase: str
    kept: float
    magnitude: float | None
    gauges: Mapping[str, float]
    unfinished: str


@dataclass(frozen=True)
class Standing:
    """Where the training of a model stands.

    Attributes:
        layers: in the model's order.
    """

    layers: tuple[LayerStanding, ...]

    @property
    def unfinished(self) -> tuple[LayerStanding, ...]:
        """Layers whose masks are not N:M yet."""
        return tuple(layer for layer in self.layers if layer.unfinished)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return {"layers": [asdict(layer) for layer in self.layers], "unfinished": [s.site for s in self.unfinished]}

    def __str__(self) -> str:
        return f"{len(self.layers) - len(self.unfinished)} of {len(self.layers)} layers are N:M"

    def __rich__(self) -> Group:
        return Group(*map(escape, self._phases()), self._table(), self._end())

    def _table(self) -> Table:
        gauges = list(dict.fromkeys(name for layer in self.layers for name in layer.gauges))
        table = Table(header_style="bold")
        table.add_column("site", overflow="fold")
        for column in ("pattern", "kept", "magnitude", *(name.replace("_", " ") for name in gauges)):
            table.add_column(column, justify="left" if column == "pattern" else "right")
        table.add_column("N:M", overflow="fold")
        for layer in self.layers:
            shares = ("-" if s is None else f"{s:.1%}" for s in (layer.kept, layer.magnitude))
            seen = ("-" if name not in layer.gauges else f"{layer.gauges[name]:.3g}" for name in gauges)
            reached = f"[yellow]{escape(layer.unfinished)}" if layer.unfinished else "[green]holds"
            table.add_row(escape(layer.site) or "(root)", layer.pattern, *shares, *seen, reached)
        return table

    def _phases(self) -> list[str]:
        """Say once what many layers have in common."""
        lines: dict[str, int] = {}
        for layer in self.layers:
            if layer.total_steps:
                steps = f"step {layer.step:,} of {layer.total_steps:,} ({layer.step / layer.total_steps:.0%})"
            else:
                steps = "not attached yet"
            line = f"{layer.method} {layer.pattern}, {steps}: {layer.phase}"
            lines[line] = lines.get(line, 0) + 1
        return [f"{line}  [{count} layer{'s' * (count > 1)}]" for line, count in lines.items()]

    def _end(self) -> str:
        if not self.unfinished:
            return f"[green]All {len(self.layers)} masks are N:M.[/] nmgraph export folds and proves them."
        if not any(layer.total_steps for layer in self.layers):
            return "Training has not begun: nmgraph.load it, and attach an optimizer."
        return (
            f"[yellow]{len(self.unfinished)} of {len(self.layers)} masks are not N:M yet.[/] Train on; nmgraph export --force "
            "prunes them by what the method knows now."
        )


def standing_of(model: nn.Module) -> Standing:
    """Say where the training of a converted model stands; of a sharded one every process has to ask."""
    return Standing(tuple(_layer(name, weight) for name, weight in masked_weights(model).items()))


@torch.no_grad()
def _layer(name: str, weight: MaskedWeight) -> LayerStanding:
    told, (step, total) = weight.told, weight.clock.tolist()
    mask, raw = weight.mask(), weight.raw.detach()
    whole = magnitude(raw)
    return LayerStanding(
        name,
        told.method.name,
        str(told.pattern),
        step,
        total,
        _phase(weight, step, total),
        float(mask.float().mean()),
        magnitude(raw * mask) / whole if whole else None,
        {gauge: float(value) for gauge, value in weight.gauges().items()},
        weight.unfinished() or "",
    )


def _phase(weight: MaskedWeight, step: int, total: int) -> str:
    """Say what the schedule says, by the work that the method announces."""
    method, pattern = weight.told.method, weight.told.pattern
    if not total:
        return "training has not begun"
    if step >= total:
        return "training has ended"

    def keeps(at: int) -> float:
        return method.work(pattern, Clock(at, total, 0.0)).forward

    if keeps(step) <= pattern.density + 1e-6:
        return "at its pattern"
    low, high = step, total  # keeps falls, or stays
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) <= pattern.density + 1e-6 else (middle, high)
    doing = "still dense" if keeps(step) == 1.0 else "removing weights"
    return f"{doing}; {pattern} from step {high:,} on"
