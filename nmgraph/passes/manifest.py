"""The manifest: for every linear- or conv-like site in the model exactly one entry."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from torch import fx, nn

from nmgraph.errors import ConversionError

_ATTRIBUTE = "nm_manifest"


@dataclass(frozen=True)
class Entry:
    """One site: converted, and how; or skipped, why, and what would change that.

    Attributes:
        name: qualified name of the layer, or of the parameter where no layer holds it.
        kind: class of the layer, or the function that multiplies by the parameter.
        shape: of the weight.
        pattern: what it is, or would be, pruned to.
        converted: whether it is sparse-trainable.
        how: the way it was converted.
        calls: how often one forward calls it, where the graph shows that.
        reason: why it was skipped.
        remedy: what to do if it should not be.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str
    converted: bool
    how: str = ""
    calls: int | None = None
    reason: str = ""
    remedy: str = ""

    @property
    def parameters(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Manifest:
    """What a conversion did, or would do.

    Attributes:
        method: name of the training method.
        entries: all sites, in the model's order.
        notes: what could not be followed while tracing, by module.
        inputs: (shape, dtype, name) of the example inputs, where any were given.
    """

    method: str
    entries: tuple[Entry, ...]
    notes: dict[str, str] = field(default_factory=dict)
    inputs: tuple[tuple[tuple[int, ...], str, str], ...] = ()

    @property
    def converted(self) -> tuple[Entry, ...]:
        """Sites that are sparse-trainable."""
        return tuple(e for e in self.entries if e.converted)

    @property
    def skipped(self) -> tuple[Entry, ...]:
        """Sites that stay dense, each with its reason."""
        return tuple(e for e in self.entries if not e.converted)

    @property
    def coverage(self) -> float:
        """Share of the sites' weights that was converted."""
        total = sum(e.parameters for e in self.entries)
        return sum(e.parameters for e in self.converted) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)

    def to_json(self) -> str:
        """Give a JSON text, which :meth:`from_json` reads back."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what :meth:`to_json` wrote."""
        values = json.loads(text)
        entries = tuple(Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in values["entries"])
        inputs = tuple((tuple(shape), dtype, name) for shape, dtype, name in values["inputs"])
        return cls(values["method"], entries, values["notes"], inputs)

    def __str__(self) -> str:
        return (
            f"{len(self.converted)} sites converted, {len(self.skipped)} skipped, {self.coverage:.1%} of their weights"
        )

    def __rich__(self) -> Table:
        table = Table(title=f"{self.method}: {self}", title_justify="left", header_style="bold")
        for column in ("site", "kind", "shape", "pattern", "decision"):
            table.add_column(column, overflow="fold", no_wrap=column in ("kind", "shape"))
        for entry in self.entries:
            decision = "[green]converted" if entry.converted else f"[yellow]skipped[/]: {entry.reason}"
            if entry.remedy:
                decision += f"; [dim]{entry.remedy}"
            shape = "x".join(map(str, entry.shape))
            table.add_row(entry.name, entry.kind, shape, entry.pattern if entry.converted else "-", decision)
        return table


def write_manifest(model: nn.Module, manifest: Manifest) -> None:
    """Keep the manifest with the model, as text: a copy or a pickle of the model needs nothing of ours for it."""
    if isinstance(model, fx.GraphModule):
        model.meta[_ATTRIBUTE] = manifest.to_json()  # a GraphModule's other attributes don't survive deepcopy
    else:
        setattr(model, _ATTRIBUTE, manifest.to_json())


def find_manifest(model: nn.Module) -> Manifest | None:
    """Find the manifest of a model, or of the model inside a wrapper."""
    for module in model.modules():
        text = module.meta.get(_ATTRIBUTE) if isinstance(module, fx.GraphModule) else module.__dict__.get(_ATTRIBUTE)
        if text is not None:
            return Manifest.from_json(text)
    return None


def require_manifest(model: nn.Module) -> Manifest:
    """Find the manifest.

    Raises:
        ConversionError: if the model was not converted.
    """
    manifest = find_manifest(model)
    if manifest is None:
        raise ConversionError(
            f"{type(model).__name__} is not a converted model. Make it one with nmgraph.convert(model, method=...)."
        )
    return manifest
