"""Draw the pictures of docs/concepts.md from what nmgraph computes: ``python docs/pictures.py``. A test draws them anew."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.transforms import Affine2D
from torch import nn

import nmgraph
from nmgraph.layers.masked import masked_weights
from nmgraph.nm.masks import magnitude_mask
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.transposable import transposable_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNIT = Path.unit_rectangle()
GAP = 0.35  # between blocks, in weights
IMAGES = FilePath(__file__).parent / "images"
BLUE, ORANGE, GREEN, PINK, GRAY, INK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#DDE1E6", "#333333"
STYLE = {
    "svg.hashsalt": "nmgraph",
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#999999",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
TWO_OF_FOUR = Pattern(2, 4)


def draw_blocks() -> Figure:
    """Draw a Linear weight's 2:4 mask, and the blocks of a convolution along both possible axes."""
    torch.manual_seed(0)
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    linear, convolution = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _grid(linear, magnitude_mask(torch.randn(8, 1, 16), TWO_OF_FOUR)[:, 0].numpy(), blocks=(1, 4))
    linear.set(title="Linear(16, 8): 2:4 along the input features", xlabel="input feature", ylabel="output feature")
    linear.legend(
        handles=[Patch(color=BLUE, label="kept"), Patch(color=GRAY, label="masked")],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=2,
    )

    # One output channel of a 3x3 convolution: its kernel window once per input channel.
    cells: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for channel in range(8):
        for position in range(9):
            y, x = divmod(position, 3)
            along_channels = position == 4 and channel < 4
            flat = (channel * 9 + position) // 4 == 13
            colour = BLUE if along_channels else ORANGE if flat else GRAY
            cells[colour].append((channel * 4 + x, y))
        convolution.text(channel * 4 + 1.45, -0.4, str(channel), ha="center")
    _squares(convolution, cells)
    convolution.set(xlim=(-0.2, 31.2), ylim=(3.2, -1.2), aspect="equal", xticks=[], yticks=[])
    convolution.spines[:].set_visible(False)
    convolution.set(
        title="Conv2d(8, 1, 3): a block along each axis", xlabel="input channel, each with its kernel window"
    )
    convolution.legend(
        handles=[
            Patch(color=BLUE, label='"channels": four input channels, one kernel position'),
            Patch(color=ORANGE, label='"flat": four neighbours in memory'),
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.4),
    )
    return figure


def draw_backward() -> Figure:
    """Draw which products see blocks: a mask along rows, and a transposable one."""
    torch.manual_seed(1)
    weight = torch.randn(8, 8)
    rows = magnitude_mask(weight[:, None], TWO_OF_FOUR)[:, 0]
    both = transposable_mask(weight[:, None], TWO_OF_FOUR)[:, 0]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    pictures = [
        ("Forward sums along rows", rows, (1, 4), "2:4 in every row"),
        ("Input gradient sums along columns", rows, (4, 1), "{} of 16 blocks keep more than 2"),
        ("A transposable mask serves both", both, (4, 4), "2:4 in every row and column"),
    ]
    for axes, (title, mask, blocks, said) in zip(figure.subplots(1, 3), pictures, strict=True):
        kept = mask.reshape(8 // blocks[0], blocks[0], 8 // blocks[1], blocks[1]).sum((1, 3))
        broken = (kept > 2) if blocks == (4, 1) else torch.zeros_like(kept, dtype=torch.bool)
        _grid(axes, mask.numpy(), blocks=blocks, broken=broken.numpy())
        axes.set_title(title, fontsize=9)
        axes.set(xlabel=f"input feature\n{said.format(int(broken.sum()))}", ylabel="output feature")
    figure.legend(
        handles=[
            Patch(color=BLUE, label="kept"),
            Patch(color=ORANGE, label="kept, in a block that keeps more than 2"),
            Patch(color=GRAY, label="masked"),
        ],
        loc="outside lower center",
        ncols=3,
    )
    return figure


def draw_life() -> Figure:
    """Draw what share of the weights methods keep during a run of 100 steps at 1:4."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    often = {"interval": 5}  # the usual one is longer than this run
    for method, options, colour, line in (
        ("lbc", {}, BLUE, "-"),
        ("bame", often, ORANGE, "-"),
        ("gradual", often, GREEN, "--"),
        ("srste", {}, PINK, ":"),
    ):
        shares = kept_shares(method, **options)
        axes.plot(
            range(101), np.multiply(shares, 100), color=colour, linestyle=line, label=method, drawstyle="steps-post"
        )
    axes.set(title="Weights kept in the forward at 1:4, %", xlabel="optimizer steps done, of total_steps=100")
    axes.set(xlim=(0, 100), ylim=(0, 105))
    axes.legend(ncols=4, loc="upper right")
    return figure


def kept_shares(method: str, **options: int) -> list[float]:
    """Train a layer for 100 steps; give the share of its weights that are kept at the start and after each."""
    torch.manual_seed(0)
    model = nmgraph.convert(nn.Sequential(nn.Linear(64, 64)), method=method, pattern="1:4", **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    nmgraph.attach(model, optimizer, total_steps=100)
    (weight,) = masked_weights(model).values()
    shares = [float(weight.mask().float().mean())]
    for _ in range(100):
        optimizer.zero_grad()
        model(torch.randn(16, 64)).square().mean().backward()
        optimizer.step()
        shares.append(float(weight.mask().float().mean()))
    return shares


def _grid(axes: Axes, mask: np.ndarray, blocks: tuple[int, int], broken: np.ndarray | None = None) -> None:
    """Draw a mask, with its blocks standing apart; what is kept in a broken block has another colour."""
    cells: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for at, kept in np.ndenumerate(mask):
        place = at[0] // blocks[0], at[1] // blocks[1]
        y, x = (a + GAP * p * (size > 1) for a, p, size in zip(at, place, blocks, strict=True))
        colour = ORANGE if broken is not None and broken[place] else BLUE
        cells[colour if kept else GRAY].append((x, y))
    _squares(axes, cells)
    axes.set(xlim=(-0.2, x + 1), ylim=(y + 1, -0.2), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _squares(axes: Axes, cells: Mapping[str, list[tuple[float, float]]]) -> None:
    """Draw a square at every place, those of a colour as one path: a file of one path each would be three times as large."""
    for colour, places in cells.items():
        squares = [UNIT.transformed(Affine2D().scale(0.9).translate(x, y)) for x, y in places]
        axes.add_patch(PathPatch(Path.make_compound_path(*squares), color=colour, linewidth=0))


def render() -> dict[str, bytes]:
    """Give each picture's file: the same bytes on every run."""
    files = {}
    for name, draw in (("blocks", draw_blocks), ("backward", draw_backward), ("life", draw_life)):
        with mpl.rc_context(STYLE):
            written = io.BytesIO()
            draw().savefig(written, format="svg", metadata={"Date": None, "Creator": None})
        files[f"{name}.svg"] = b"\n".join(line.rstrip() for line in written.getvalue().splitlines()) + b"\n"
    return files


if __name__ == "__main__":
    for name, content in render().items():
        (IMAGES / name).write_bytes(content)
