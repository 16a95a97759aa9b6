"""The kernel of :func:`nmgraph.nm.both_ways.both_ways`; needs Triton, and a GPU or Triton's interpreter.

A program takes a tile of K columns of G neighbouring blocks. It loads the first row of each block as one plane ``[G, K]``, the
second of each as another, and so on: M planes that lie alike in the registers, so that the members of a block are compared
without moving anything. Only the transposed tile, ``[K, R]`` of R = G * M rows, goes through shared memory.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

_FAR = 1 << 31  # weights apart, from where on offsets take 64 bits
_TILE = 64  # rows and columns of a program: 128 bytes of half precision, in either direction


def write_both_ways(
    forward_OC: Tensor, backward_CO: Tensor, w_OC: Tensor, order_O: Tensor | None, n: int, m: int
) -> None:
    """Fill the operands of both directions, reading the weight once.

    Args:
        forward_OC: contiguous, of half precision.
        backward_CO: likewise.
        w_OC: float32, bfloat16 or float16, of any strides.
        order_O: int64, which row comes when; None for the weight's own order.
        n: how many of M rows a column keeps.
        m: 2, 4, 8 or 16; 1, with ``n`` of 1, where the columns stay as they are.
    """
    (rows, columns), (row_step, column_step) = w_OC.shape, w_OC.stride()
    order_O = None if order_O is None else order_O.contiguous()
    reach = max(rows * columns, rows * row_step + columns * column_step)
    grid = triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE)
    sizes = rows, columns, row_step, column_step
    with torch.cuda.device_of(w_OC):  # type: ignore[no-untyped-call]
        _kernel[grid](forward_OC, backward_CO, w_OC, order_O, *sizes, N=n, M=m, TILE=_TILE, LONG=reach >= _FAR)


# To mypy this is no Python: what a tuple holds is known as the loops are unrolled.
@triton.jit
@no_type_check
def _kernel(
    forward,
    backward,
    weight,
    order,
    rows,
    columns,
    row_step,
    column_step,
    N: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    LONG: tl.constexpr,
):
    index: tl.constexpr = tl.int64 if LONG else tl.int32
    first = tl.program_id(0).to(index) * TILE
    column_K = tl.program_id(1).to(index) * TILE + tl.arange(0, TILE)
    weights, magnitudes, kept = (), (), ()
    for i in tl.static_range(M):
        place_G = first + tl.arange(0, TILE // M) * M + i
        row_G = place_G if order is None else tl.load(order + place_G, mask=place_G < rows, other=0).to(index)
        there_GK = (place_G < rows)[:, None] & (column_K < columns)[None, :]
        at_GK = row_G[:, None] * row_step + column_K[None, :] * column_step
        # Through float32, as torch casts from one half precision to the other.
        w_GK = tl.load(weight + at_GK, mask=there_GK, other=0.0).to(tl.float32)
        cast_GK = w_GK.to(forward.dtype.element_ty)
        tl.store(forward + row_G[:, None] * columns + column_K[None, :], cast_GK, mask=there_GK)
        weights += (w_GK,)
        # As whole numbers, which are ordered as the floats are, with NaN above infinity.
        magnitudes += (w_GK.to(tl.int32, bitcast=True) & 0x7FFFFFFF,)
    for i in tl.static_range(M):
        beaten_GK = tl.zeros([TILE // M, TILE], tl.int32)
        for j in tl.static_range(M):
            # Of equals the first wins.
            beaten_GK += (magnitudes[j] > magnitudes[i] - (1 if j < i else 0)).to(tl.int32)
        stays_GK = (beaten_GK < N) | (weights[i] != weights[i])
        kept += (tl.trans(tl.where(stays_GK, weights[i], 0.0).to(backward.dtype.element_ty)),)
    place_R = first + tl.arange(0, TILE)
    there_KR = (column_K < columns)[:, None] & (place_R < rows)[None, :]
    tl.store(backward + column_K[:, None] * rows + place_R[None, :], _joined(kept).reshape(TILE, TILE), mask=there_KR)


@triton.jit
@no_type_check
def _joined(planes):
    """Stack M planes ``[K, G]``: ``[K, G, 2, ..., 2]``, which read in order is ``[K, G, M]``."""
    joined = planes[0]
    if len(planes) > 1:
        joined = tl.join(_joined(planes[::2]), _joined(planes[1::2]))
    return joined
