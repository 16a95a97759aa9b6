"""Prune finished weights further, by magnitude, until they keep to a pattern that hardware takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from nmgraph.nm.grouping import FLAT, Axis, canonical, restore
from nmgraph.nm.masks import check_blocks, magnitude, magnitude_mask
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.manifest import Entry, Manifest
from nmgraph.passes.structure import owner_of


@dataclass(frozen=True)
class Projection:
    """What projecting one site took away.

    Attributes:
        name: of the site.
        before: its pattern as trained.
        after: what it keeps to now, along the input channels.
        kept_weights: share of its non-zero weights that is left.
        kept_magnitude: share of the sum of its magnitudes that is left.
    """

    name: str
    before: str
    after: str
    kept_weights: float
    kept_magnitude: float


def project(model: nn.Module, manifest: Manifest, pattern: Pattern) -> tuple[tuple[Projection, ...], Manifest]:
    """Project every sparse site that does not keep to the pattern yet, in place; dense layers stay dense.

    Sites whose channels the pattern does not divide are left as they are.

    Args:
        model: a finalized model.
        manifest: of its conversion.
        pattern: to keep to, along the input channels.

    Returns:
        What was taken from whom, and the manifest with the patterns that hold now.
    """
    done: dict[str, Projection] = {}
    for entry in manifest.converted:
        found = _project_site(getattr(*owner_of(model, entry.name)), entry, pattern)
        if found is not None:
            done[entry.name] = found
    entries = tuple(_renewed(e, pattern) if e.converted and e.name in done else e for e in manifest.entries)
    return tuple(done.values()), replace(manifest, entries=entries)


def _project_site(weight: nn.Parameter, entry: Entry, pattern: Pattern) -> Projection | None:
    axis = _channels(entry.axis)
    w_OSC = canonical(weight.detach(), axis)
    if not pattern.divides(w_OSC.shape[-1]) or check_blocks(w_OSC, pattern).holds:
        return None
    kept_OSC = w_OSC * magnitude_mask(w_OSC, pattern)
    weights = float(torch.count_nonzero(kept_OSC) / torch.count_nonzero(w_OSC))
    kept_magnitude = magnitude(kept_OSC) / magnitude(w_OSC)
    with torch.no_grad():
        weight.copy_(restore(kept_OSC, tuple(weight.shape), axis) + 0.0)  # + 0.0: no negative zeros
    return Projection(entry.name, entry.pattern, str(pattern), weights, kept_magnitude)


def _renewed(entry: Entry, pattern: Pattern) -> Entry:
    return replace(entry, pattern=str(pattern), axis=_channels(entry.axis), how=f"projected from {entry.pattern}")


def _channels(axis: Axis) -> int:
    return 1 if axis == FLAT else axis
