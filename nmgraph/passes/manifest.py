"""The manifest: for every linear- or conv-like site in the model exactly one entry."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import fx, nn

from nmgraph.errors import ConversionError
from nmgraph.nm.grouping import FLAT, Axis
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.permutation_report import Region

_ATTRIBUTE = "nm_manifest"
MANIFEST_KEY = "nmgraph.manifest"  # in the metadata of files


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
        axis: the reduction axis of its weight, or ``flat``.
        fits: the usual patterns that would fit it, the nearest density first.
        calls: how often one forward calls it, where the graph shows that.
        macs: multiply-accumulate operations with it in one forward, where example inputs were run.
        reason: why it was skipped.
        remedy: what to do if it should not be.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str
    converted: bool
    how: str = ""
    axis: Axis = 1
    fits: tuple[str, ...] = ()
    calls: int | None = None
    macs: int | None = None
    reason: str = ""
    remedy: str = ""

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """What a conversion did, or would do.

    Attributes:
        method: name of the training method.
        entries: all sites, in the model's order.
        inputs: (shape, dtype, name) of the example inputs, where any were given.
        untraced: classes whose forward could not be followed, or ``(root)``, with the reason.
        channel_order: regions of a channel permutation; those that say permuted have another order than in the dense model.
    """

    method: str
    entries: tuple[Entry, ...]
    inputs: tuple[tuple[tuple[int, ...], str, str], ...] = ()
    untraced: dict[str, str] = field(default_factory=dict)
    channel_order: tuple[Region, ...] = ()

    @property
    def converted(self) -> tuple[Entry, ...]:
        """Sites that are sparse-trainable."""
        return tuple(e for e in self.entries if e.converted)

    @property
    def skipped(self) -> tuple[Entry, ...]:
        """Sites that stay dense, each with its reason."""
        return tuple(e for e in self.entries if not e.converted)

    @property
    def patterns(self) -> dict[str, Pattern]:
        """Pattern of every converted site."""
        return {e.name: Pattern.parse(e.pattern) for e in self.converted}

    @property
    def axes(self) -> dict[str, Axis]:
        """Reduction axis of every converted site."""
        return {e.name: e.axis for e in self.converted}

    @property
    def coverage(self) -> float:
        """Share of the sites' weights that was converted."""
        total = sum(e.parameters for e in self.entries)
        return sum(e.parameters for e in self.converted) / total if total else 0.0

    @property
    def macs_coverage(self) -> float | None:
        """Share of the multiply-accumulate operations with the sites' weights that was converted; None if not known."""
        total = sum(e.macs or 0 for e in self.entries)
        return sum(e.macs or 0 for e in self.converted) / total if total else None

    @property
    def not_followed(self) -> str | None:
        """Say, for below a table, what could not be followed; None if everything was."""
        if not self.untraced:
            return None
        shown = [f"{name} ({why})" for name, why in list(self.untraced.items())[:4]]
        shown += [f"{len(self.untraced) - 4} more"] * (len(self.untraced) > 4)
        return escape("Not followed: " + "; ".join(shown))

    def seen_from(self, path: str) -> Manifest:
        """Give the manifest of a module at ``path`` with the names that its owner uses; its inputs are not the owner's."""
        if not path:
            return self
        entries = (replace(e, name=f"{path}.{e.name}".rstrip(".")) for e in self.entries)
        untraced = {f"{path}.{name}": reason for name, reason in self.untraced.items()}
        regions = tuple(r.seen_from(path) for r in self.channel_order)
        return Manifest(self.method, tuple(entries), (), untraced, regions)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)

    def to_json(self) -> str:
        """Give a JSON text, which ``from_json`` reads back."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what ``to_json`` wrote."""
        values = json.loads(text)
        tuples = ("shape", "fits")
        entries = tuple(Entry(**entry | {key: tuple(entry[key]) for key in tuples}) for entry in values["entries"])
        inputs = tuple((tuple(shape), dtype, name) for shape, dtype, name in values["inputs"])
        regions = tuple(map(Region.from_dict, values.get("channel_order", ())))
        return cls(values["method"], entries, inputs, values["untraced"], regions)

    def __str__(self) -> str:
        shares = f"{self.coverage:.1%} of their weights"
        if self.macs_coverage is not None:
            shares += f" and {self.macs_coverage:.1%} of their operations"
        return f"{len(self.converted)} sites converted, {len(self.skipped)} skipped, {shares}"

    def __rich__(self) -> Table:
        weights, macs = sum(e.parameters for e in self.entries), sum(e.macs or 0 for e in self.entries)
        table = Table(title=f"{self.method}: {self}", title_justify="left", header_style="bold")
        shares = {"weights": weights, **({"operations": macs} if macs else {})}
        for column in ("site", "shape", *shares, "pattern", "decision"):
            justify: Any = "right" if column in shares else "left"
            table.add_column(column, overflow="fold", no_wrap=column == "shape", justify=justify)
        for entry in self.entries:
            decision = "[green]converted" if entry.converted else f"[yellow]skipped[/]: {escape(entry.reason)}"
            if entry.converted and entry.axis == FLAT:
                decision += "[/], [yellow]flat blocks: not for TensorRT"
            elif entry.converted and entry.how != "in place":
                decision += f"[/] {escape(entry.how)}"
            if entry.remedy:
                decision += f"; [dim]{escape(entry.remedy)}"
            shape = "x".join(map(str, entry.shape))
            parts = [
                f"{(n or 0) / whole:.1%}"
                for n, whole in zip((entry.parameters, entry.macs), shares.values(), strict=False)
            ]
            pattern = entry.pattern if entry.converted else "-"
            table.add_row(escape(entry.name) or "(root)", shape, *parts, pattern, decision)
        table.caption, table.caption_justify = self.not_followed, "left"
        return table


def write_manifest(model: nn.Module, manifest: Manifest) -> None:
    """Keep the manifest with the model, as text: a copy or a pickle of the model needs nothing of ours for it."""
    if isinstance(model, fx.GraphModule):
        model.meta[_ATTRIBUTE] = manifest.to_json()  # a GraphModule's other attributes don't survive deepcopy
    else:
        setattr(model, _ATTRIBUTE, manifest.to_json())


def find_manifest(model: nn.Module) -> Manifest | None:
    """Find the manifest of a model, or those of converted models inside it, with their names as seen from here."""
    found: list[Manifest] = []
    owners: list[str] = []  # what was said of a part before its owner was converted is history
    for path, module in model.named_modules():
        text = module.meta.get(_ATTRIBUTE) if isinstance(module, fx.GraphModule) else module.__dict__.get(_ATTRIBUTE)
        if text is not None and not any(path.startswith(f"{owner}." if owner else "") for owner in owners):
            owners.append(path)
            found.append(Manifest.from_json(text).seen_from(path))
    if not found:
        return None
    methods = "+".join(dict.fromkeys(m.method for m in found))
    untraced = {name: reason for m in found for name, reason in m.untraced.items()}
    regions = tuple(r for m in found for r in m.channel_order)
    return Manifest(methods, tuple(e for m in found for e in m.entries), found[0].inputs, untraced, regions)


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
