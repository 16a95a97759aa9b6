"""Curves and histograms as inline SVG, drawn by matplotlib in colours that the page sets, so that they follow light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from nmgraph.errors import MissingPackageError
from nmgraph.training.run_log import BINS, HIGH, LOW, LayerPicture, RunLog

# Colours that occur nowhere else stand for what the page's style sheet sets.
_INK, _LINE, _BLUE, _ORANGE = "#010203", "#010204", "#010205", "#010206"
_VARIABLES = {_INK: "var(--soft)", _LINE: "var(--line)", _BLUE: "var(--blue)", _ORANGE: "var(--orange)"}
_POINTS = 400
_WIDE_RANGE = 30  # from the smallest to the largest value; beyond, a logarithmic axis shows more
_HUGE = 1e100  # beyond, differences overflow
_FLAT = 1e-3  # of a share that hardly moves, the rounding is not to fill the picture
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "path.simplify": True,
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "ytick.major.size": 0,
}


def draw_metric(log: RunLog, name: str, key: str) -> str:
    """Draw a number that the training loop noted.

    Args:
        log: of the run.
        name: of the number.
        key: begins the ids in the SVG, which have to differ on a page.
    """
    found = [(r.step, v) for r in log.records if (v := r.metrics.get(name)) is not None]
    steps, values = np.array(found, dtype=float).reshape(-1, 2).T
    return _draw(key, log, steps, [values], share=False)


def draw_quantity(log: RunLog, quantity: str, key: str, *, share: bool) -> str:
    """Draw what a quantity of the layers did: the mean over the layers, and the range from the least to the most.

    Args:
        log: of the run.
        quantity: a name in ``QUANTITIES``.
        key: begins the ids in the SVG.
        share: write it in percent.
    """
    found = [(r.step, [n[quantity] for n in r.layers.values() if quantity in n]) for r in log.records]
    found = [(step, values) for step, values in found if values]
    rows = [(step, sum(v) / len(v), min(v), max(v)) for step, v in found]
    steps, *lines = np.array(rows, dtype=float).reshape(-1, 4).T
    return _draw(key, log, steps, lines, share=share)


def _draw(key: str, log: RunLog, steps: np.ndarray, lines: Sequence[np.ndarray], *, share: bool) -> str:
    """Draw one line, or a line with a band around it, of at most so many points."""
    parts = np.array_split(np.arange(len(steps)), min(_POINTS, len(steps)))
    merges: Sequence[Any] = (np.mean, np.min, np.max)
    steps = np.array([steps[part].mean() for part in parts])
    lines = [np.clip(v, -_HUGE, _HUGE) for v in lines]
    lines = [np.array([merge(v[p]) for p in parts]) for v, merge in zip(lines, merges, strict=False)]

    first, last = log.records[0].step, log.records[-1].step  # of all, so that the charts of a page can be compared
    margin = max(0.04 * (last - first), 0.5)

    def paint(axes: Any) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

        if len(lines) > 1:
            axes.fill_between(steps, lines[1], lines[2], color=_BLUE, alpha=0.2, linewidth=0)
        axes.plot(steps, lines[0], color=_BLUE, linewidth=1.8, marker="o" if len(steps) == 1 else None)
        smallest, largest = lines[0].min(), lines[0].max()
        if share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
            if largest - smallest < _FLAT:
                axes.set_ylim(0, 1)
        elif smallest > 0 and largest > _WIDE_RANGE * smallest:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlim(first - margin, last + margin)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("step")

    return _svg(key, paint, (4.0, 2.4))


def draw_magnitudes(now: LayerPicture, before: LayerPicture | None, key: str) -> str:
    """Draw how the magnitudes of a layer's weights are distributed: those kept, those masked, and all of them before.

    Args:
        now: of the layer.
        before: when training began; None where that is not known.
        key: begins the ids in the SVG.
    """

    def paint(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        edges = np.linspace(LOW, HIGH, BINS + 1)
        kept, masked = np.array(now.kept), np.array(now.magnitudes) - np.array(now.kept)
        if before is not None:
            axes.stairs(before.magnitudes, edges, color=_LINE, fill=True)
        axes.stairs(masked, edges, color=_ORANGE, linewidth=1.6)
        axes.stairs(kept, edges, color=_BLUE, linewidth=1.6)
        filled = np.flatnonzero(np.array(now.magnitudes) + np.array(before.magnitudes if before else 0))
        if len(filled):
            axes.set_xlim(edges[filled[0]] - 0.5, edges[filled[-1] + 1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.set_xlabel("log2 of the magnitude")

    return _svg(key, paint, (4.0, 2.0))


def _svg(key: str, paint: Any, inches: tuple[float, float]) -> str:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("a report's charts need matplotlib. pip install matplotlib.") from error
    buffer = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=inches, facecolor="none")
        axes = figure.add_axes((0.15, 0.2, 0.83, 0.75))
        paint(axes)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inlined(buffer.getvalue(), key)


def _inlined(text: str, key: str) -> str:
    """Make a part of a page of an SVG file: its ids are its own, its colours are the page's, and it names no address."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>\s*", "", text, flags=re.DOTALL)  # of a document's own
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href=", "href=")
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'href="#|url\(#', lambda found: f"{found.group()}{key}-", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return re.sub(r"\s*\n\s*", "\n", text)
