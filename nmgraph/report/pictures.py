"""Masks as pictures of a few hundred bytes each, which a page holds in itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np

from nmgraph.errors import MissingPackageError

KEPT, ADDED, REMOVED, GONE = "#0072B2", "#009E73", "#E69F00", "#80808059"  # Okabe and Ito's; legible on light and dark
_GAP, _EMPTY, _GONE, _REMOVED, _ADDED, _KEPT = range(6)
_PALETTE = ("#00000000", "#00000000", GONE, REMOVED, ADDED, KEPT)
_WIDTH = 128  # pixels that a picture has at least, without its gaps


def draw_mask(now: np.ndarray, before: np.ndarray | None, block: int) -> tuple[str, int]:
    """Draw a mask beside what it was before, as a PNG in a data URI, and give its width in pixels.

    Args:
        now: bool ``[rows, columns]``.
        before: the same some steps earlier; None colours nothing as changed.
        block: columns of a block, which stand apart from the next by one pixel.
    """
    was = now if before is None else before
    colours = np.select([now & was, now, was], [_KEPT, _ADDED, _REMOVED], _GONE).astype(np.uint8)
    square = max(2, _WIDTH // max(1, now.shape[1]))
    image = colours.repeat(square, 0).repeat(square, 1)
    gaps = [column * square for column in range(block, now.shape[1], block)]
    image = np.insert(image, gaps, _GAP, axis=1)
    return _png(image, [_rgba(colour) for colour in _PALETTE]), image.shape[1]


def draw_strip(values: Sequence[float], most: float) -> str:
    """Draw numbers as one row of pixels, the larger the denser, as a PNG in a data URI.

    Args:
        values: 0 or more.
        most: what is drawn in full.
    """
    shares = np.sqrt(np.clip(np.array(values) / most, 0, 1)) if most else np.zeros(len(values))
    return _png((shares * 255).astype(np.uint8)[None], [(*_rgba(KEPT)[:3], alpha) for alpha in range(256)])


def _png(image: np.ndarray, palette: Sequence[tuple[int, int, int, int]]) -> str:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPackageError("a report's pictures need Pillow. pip install pillow.") from error
    picture = Image.fromarray(image, mode="P")
    picture.putpalette([number for colour in palette for number in colour[:3]])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True, transparency=bytes(colour[3] for colour in palette))
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _rgba(colour: str) -> tuple[int, int, int, int]:
    red, green, blue, alpha = bytes.fromhex(f"{colour[1:]}FF"[:8])
    return red, green, blue, alpha
