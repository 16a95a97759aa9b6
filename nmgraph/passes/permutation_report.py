"""What a channel permutation did to a model: one row per region, as values and as a table; JSON is the manifest's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Region:
    """Tensors whose channels have one common order, and what became of it.

    Attributes:
        writers: layers whose output channels they are.
        readers: layers to be pruned whose input channels they are.
        channels: how many there are.
        permuted: whether they have a new order.
        before: magnitude that the readers' masks keep in the old order.
        after: magnitude that they keep in the new one.
        ideal: magnitude that they would keep without blocks, at the same density.
        reason: why the order is still the old one.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    channels: int
    permuted: bool
    before: float = 0.0
    after: float = 0.0
    ideal: float = 0.0
    reason: str = ""

    @property
    def gain(self) -> float:
        """Growth of the kept magnitude."""
        return self.after / self.before - 1 if self.before else 0.0

    @property
    def efficacy(self) -> float:
        """Share of the possible gain that was found."""
        possible = self.ideal - self.before
        return (self.after - self.before) / possible if possible > 0 else 0.0

    def seen_from(self, path: str) -> Region:
        """Give the region with the names that an owner of its module uses."""
        named = (tuple(f"{path}.{name}".rstrip(".") for name in names) for names in (self.writers, self.readers))
        writers, readers = named
        return replace(self, writers=writers, readers=readers)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Region:
        """Read plain values."""
        return cls(**{**values, "writers": tuple(values["writers"]), "readers": tuple(values["readers"])})


@dataclass(frozen=True)
class PermutationReport:
    """What was permuted in a model, and what had to stay.

    Attributes:
        regions: those with a layer to be pruned in them.
    """

    regions: tuple[Region, ...]

    @property
    def permuted(self) -> tuple[Region, ...]:
        """Regions in a new order."""
        return tuple(r for r in self.regions if r.permuted)

    def __str__(self) -> str:
        done = self.permuted
        before, after = sum(r.before for r in done), sum(r.after for r in done)
        gain = f", their layers keep {after / before - 1:.2%} more magnitude" if before else ""
        return f"{len(done)} of {len(self.regions)} regions permuted{gain}"

    def __rich__(self) -> Table:
        table = Table(title=f"channel order: {self}", title_justify="left", header_style="bold")
        for column in ("read by", "channels", "kept", "of the possible", "decision"):
            table.add_column(column, overflow="fold", no_wrap=column in ("channels", "kept"))
        for r in self.regions:
            decision = "[green]permuted" if r.permuted else f"[yellow]left[/]: {escape(r.reason)}"
            readers = ", ".join(r.readers[:3]) + (f" and {len(r.readers) - 3} more" if len(r.readers) > 3 else "")
            kept, share = (f"+{r.gain:.2%}", f"{r.efficacy:.0%}") if r.permuted else ("-", "-")
            table.add_row(escape(readers) or "(root)", str(r.channels), kept, share, decision)
        if not self.regions:
            table.caption_justify = "left"
            table.caption = (
                "No channels could be followed from layer to layer. With example inputs (--input), a run shows which parts "
                "of a model are called."
            )
        return table
