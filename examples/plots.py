"""The demo's two pictures. Colours are Okabe and Ito's, told apart by colour-blind eyes and in print."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from demo_digits import History

    from nmgraph.training.run_log import RunLog

BLUE, ORANGE, GRAY, INK = "#0072B2", "#E69F00", "#DDE1E6", "#333333"
DENSE = {"color": ORANGE, "linestyle": "--"}
SPARSE = {"color": BLUE}
DPI = 200
BLOCK = 4
BLOCK_GAP = 6  # pixels
SQUARE = 14  # pixels for one weight and the line beside it
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#999999",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E6E6E6",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}

plt.switch_backend("Agg")  # draws to files, with or without a screen


def draw_curves(path: Path, dense: History, sparse: History, log: RunLog, steps_per_epoch: int) -> None:
    """Draw accuracy and loss of both runs, and beside them the share of weights that LBC keeps."""
    epochs = np.arange(1, len(dense.losses) + 1)
    changes = [record.step for record in log.records if record.mean("flipped")]
    with mpl.rc_context(STYLE):
        figure, (accuracy, loss, kept) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")

        accuracy.set_title("Held-out accuracy, %")
        accuracy.plot(epochs, np.multiply(dense.accuracies, 100), **DENSE, label="dense")
        accuracy.plot(epochs, np.multiply(sparse.accuracies, 100), **SPARSE, label="LBC 2:4")

        loss.set_title("Training loss (log scale)")
        loss.semilogy(epochs, dense.losses, **DENSE)
        loss.semilogy(epochs, sparse.losses, **SPARSE)

        kept.set_title("Weights kept in converted layers, %")
        kept.axhline(100, **DENSE)
        kept.plot(
            [r.step / steps_per_epoch for r in log.records], [100 * r.mean("kept") for r in log.records], **SPARSE
        )
        kept.set_ylim(45, 104)

        for axes in (accuracy, loss, kept):
            axes.set_xlabel("epoch")
            axes.set_xlim(0, len(epochs))
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            for step in changes:
                label = "LBC removes weights" if step == changes[0] else None
                axes.axvline(step / steps_per_epoch, color="#777777", linewidth=1, linestyle=":", zorder=1, label=label)
        accuracy.legend(loc="lower right")
        figure.savefig(path, dpi=DPI)
        plt.close(figure)


def draw_mask(path: Path, layer: str, log: RunLog, steps_per_epoch: int) -> None:
    """Draw a 3x3 convolution's mask at the centre of the kernel, in every picture where it changed: one square per weight."""
    every = [(picture.step, picture.layers[layer].mask.numpy()) for picture in log.pictures]
    masks = every[:1] + [now for before, now in pairwise(every) if not np.array_equal(before[1], now[1])]
    pictures = [mask for _, mask in masks]
    painted = [_paint(now, before) for now, before in zip(pictures, pictures[:1] + pictures, strict=False)]
    height, width, _ = painted[0].shape
    left, between, right, top, bottom = 150, 80, 40, 180, 190
    full_width = left + len(painted) * (width + between) - between + right
    full_height = top + height + bottom

    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = plt.figure(figsize=(full_width / DPI, full_height / DPI))
        for i, ((step, _), mask, image) in enumerate(zip(masks, pictures, painted, strict=True)):
            # Axes of exactly the image's size: no pixel of it is resampled.
            x = left + i * (width + between)
            axes = figure.add_axes((x / full_width, bottom / full_height, width / full_width, height / full_height))
            axes.imshow(image, interpolation="none", extent=(0, width, height, 0))
            when = f"epoch {step / steps_per_epoch:.1f}" if step else "at the start"
            axes.set_title(f"{when}: {mask.mean():.0%} kept", fontsize=10)
            axes.set_xticks([_place(c) for c in range(0, mask.shape[1], 2 * BLOCK)], range(0, mask.shape[1], 2 * BLOCK))
            axes.set_yticks([r * SQUARE for r in range(0, mask.shape[0], 8)], range(0, mask.shape[0], 8))
            axes.set_xlabel("input channel")
            axes.spines[:].set_visible(False)
            if i == 0:
                axes.set_ylabel("output channel")
        figure.text(
            left / full_width, 1 - 70 / full_height, fontsize=11, fontweight="bold",
            s=f"Mask of {layer}, centre of the kernel: of each {BLOCK} input channels, LBC leaves 2",
        )  # fmt: skip
        meanings = {"kept": BLUE, "removed since the picture to the left": ORANGE, "removed earlier": GRAY}
        figure.legend(handles=[Patch(color=c, label=name) for name, c in meanings.items()], loc="lower center", ncols=3)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)


def _place(column: int) -> int:
    """Give the pixel where a column begins: blocks stand apart."""
    return column * SQUARE + column // BLOCK * BLOCK_GAP


def _paint(now: np.ndarray, before: np.ndarray) -> np.ndarray:
    rows, columns = now.shape
    image = np.ones((rows * SQUARE, _place(columns) - BLOCK_GAP, 3))
    colours = np.where(now[..., None], to_rgb(BLUE), np.where(before[..., None], to_rgb(ORANGE), to_rgb(GRAY)))
    for row, column in np.ndindex(rows, columns):
        y, x = row * SQUARE, _place(column)
        image[y : y + SQUARE - 1, x : x + SQUARE - 1] = colours[row, column]
    return image
