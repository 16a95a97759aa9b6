"""The page: one HTML file that asks for nothing else, and lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nmgraph.accounting.cost import TrainingCost
from nmgraph.files import written_atomically
from nmgraph.nm.pattern import Pattern
from nmgraph.report.charts import draw_magnitudes, draw_metric, draw_quantity
from nmgraph.report.findings import Findings, Layer
from nmgraph.report.pictures import ADDED, GONE, KEPT, REMOVED, draw_mask, draw_strip
from nmgraph.training.run_log import QUANTITIES, LayerPicture

_MOMENTS = 9  # pictures of a layer; as many as a run that is not resumed has
_COUNTED = {"live_combinations"}  # quantities that are no shares


@dataclass(frozen=True)
class Chart:
    """A drawing with what it shows in words."""

    title: str
    meaning: str
    svg: Markup


@dataclass(frozen=True)
class MaskPicture:
    """One mask.

    Attributes:
        when: it was so.
        kept: share of what is shown that it keeps.
        source: the picture, as a data URI.
        width: of it, in pixels.
    """

    when: str
    kept: float
    source: str
    width: int


@dataclass(frozen=True)
class Portrait:
    """What a layer looks like: its masks over time, and its magnitudes."""

    name: str
    masks: Sequence[MaskPicture]
    magnitudes: Markup
    has_before: bool


def write_page(findings: Findings, path: Path) -> None:
    """Write a report in one step.

    Raises:
        MissingPackageError: if the packages that draw are not installed.
        FileError: if it cannot be written; an old file is unchanged then.
    """
    page = render(findings)
    with written_atomically(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # a name in a file may hold half a character


def render(findings: Findings) -> str:
    """Make the text of the page."""
    room = Environment(
        loader=PackageLoader("nmgraph.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    room.filters |= {"count": count_text, "bytes": byte_text, "percent": percent_text, "columns": columns}
    room.filters["breakable"] = breakable
    style, script = (files("nmgraph.report").joinpath("page", name).read_text() for name in ("page.css", "page.js"))
    return room.get_template("page.html").render(
        found=findings,
        summary=findings.summary(),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        charts=list(_charts(findings)),
        portraits=list(_portraits(findings)),
        strips=_strips(findings),
        last=_last_numbers(findings),
        legend={"kept": KEPT, "new since the picture before": ADDED, "gone since": REMOVED, "masked": GONE},
        costs=_costs(findings.layers),
        step_costs=_step_costs(findings.cost),
    )


def _charts(findings: Findings) -> Iterator[Chart]:
    log = findings.log
    if log is None:
        return
    metrics = dict.fromkeys(name for r in log.records for name, value in r.metrics.items() if value is not None)
    for i, name in enumerate(metrics):
        yield Chart(name, "noted by the training loop", Markup(draw_metric(log, name, f"metric{i}")))
    seen = dict.fromkeys(name for r in log.records for numbers in r.layers.values() for name in numbers)
    for i, name in enumerate(seen):
        svg = draw_quantity(log, name, f"quantity{i}", share=name not in _COUNTED)
        yield Chart(name.replace("_", " "), QUANTITIES.get(name, "shown by the method"), Markup(svg))


def _portraits(findings: Findings) -> Iterator[Portrait]:
    taken = findings.log.pictures if findings.log else ()
    for i, layer in enumerate(findings.converted):
        name = layer.entry.name
        shown = [(f"step {picture.step:,}", picture.layers[name]) for picture in taken if name in picture.layers]
        now = findings.pictures.get(name)
        # A log that ends where the model stands shows the model as it is.
        if now is not None and (not taken or taken[-1].step != findings.step):
            shown.append(("now", now))
        shown = _thinned(shown)
        if shown:
            before = shown[0][1] if len(shown) > 1 else None
            drawn = Markup(draw_magnitudes(shown[-1][1], before, f"layer{i}"))
            yield Portrait(name or "(root)", _masks(shown, layer), drawn, before is not None)


def _thinned(shown: list[tuple[str, LayerPicture]]) -> list[tuple[str, LayerPicture]]:
    """Leave away moments where a run that was resumed has too many; the first and the last stay."""
    few = min(_MOMENTS, len(shown))
    return [shown[i * (len(shown) - 1) // max(1, few - 1)] for i in range(few)]


def _masks(shown: Sequence[tuple[str, LayerPicture]], layer: Layer) -> list[MaskPicture]:
    masks: list[MaskPicture] = []
    before = None
    for when, picture in shown:
        now = picture.mask.numpy()
        comparable = before is not None and before.shape == now.shape
        source, width = draw_mask(now, before if comparable else None, Pattern.parse(layer.entry.pattern).m)
        masks.append(MaskPicture(when, float(now.mean()), source, width))
        before = now
    return masks


def _strips(findings: Findings) -> dict[str, str]:
    """Draw for every layer when how many of its weights changed sides; the first record has nothing to compare with."""
    records = findings.log.records[1:] if findings.log else ()
    most = max((n.get("flipped", 0.0) for r in records for n in r.layers.values()), default=0.0)
    names = [layer.entry.name for layer in findings.converted] if records else []
    return {n: draw_strip([r.layers.get(n, {}).get("flipped", 0.0) for r in records], most) for n in names}


def _last_numbers(findings: Findings) -> dict[str, Any]:
    records = findings.log.records if findings.log else ()
    return dict(records[-1].layers) if records else {}


def _costs(layers: Sequence[Layer]) -> list[tuple[str, int, float]]:
    """Give (name, dense operations, kept ones) of the layers, the most expensive first."""
    rows = [(layer.entry.name or "(root)", layer.entry.macs or 0, layer.kept_macs or 0.0) for layer in layers]
    return sorted((row for row in rows if row[1]), key=lambda row: row[1], reverse=True)


def _step_costs(cost: TrainingCost | None) -> list[tuple[str, int, float, float]]:
    """Give (product, dense operations of a step, needed ones, those on 2:4 sparse tensor cores), all three together first."""
    if cost is None:
        return []
    rows = list(zip(("forward", "input gradient", "weight gradient"), cost.dense, cost.needed, cost.on_24, strict=True))
    return [("together", sum(cost.dense), sum(cost.needed), sum(cost.on_24)), *rows]


def breakable(name: str) -> Markup:
    """Let a long name break between its words, and nowhere else.

    >>> breakable("held_out"), breakable("LayerNorm")
    (Markup('held_<wbr>out'), Markup('Layer<wbr>Norm'))
    """
    return Markup("<wbr>").join(re.split(r"(?<=[_.])|(?<=[a-z])(?=[A-Z])", name))


def columns(count: int, most: int) -> int:
    """Give the number of columns with which so many cards fill their rows evenly.

    >>> [columns(count, 4) for count in range(1, 10)]
    [1, 2, 3, 4, 3, 3, 4, 4, 3]
    """
    return math.ceil(count / math.ceil(count / most)) if count else 1


def count_text(number: float | None) -> str:
    """Write a number with three digits and k, M, G or T.

    >>> count_text(64), count_text(4_089_184_256), count_text(None)
    ('64', '4.09 G', '–')
    """
    if number is None:
        return "–"
    for unit in ("", " k", " M", " G"):
        if number < 999.5:
            return f"{number:.0f}" if not unit else re.sub(r"e\+02$", "00", f"{number:.3g}") + unit
        number /= 1000
    return f"{number:,.3g} T"


def byte_text(number: float) -> str:
    """Write a size.

    >>> byte_text(94_000_000)
    '94 MB'
    """
    text = count_text(number)
    return f"{text}B" if " " in text else f"{text} B"


def percent_text(share: float | None) -> str:
    """Write a share in percent.

    >>> percent_text(0.5), percent_text(0.00042)
    ('50 %', '0.042 %')
    """
    if share is None:
        return "–"
    return f"{100 * share:.3g} %" if share < 0.9995 or share >= 1 else "99.9 %"
