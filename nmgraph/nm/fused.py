"""Functions of every block's N best, computed in one pass over memory.

What is done with a mask is mostly elementwise: the weight or zero, a decay of what it drops. :class:`Blockwise` takes
such a function and computes it in either of two ways, with the same result to the bit:

- by *sorting*: what the mask is defined by, anywhere, on any tensor;
- by *comparing*, compiled by ``torch.compile``: a weight is kept if fewer than N of its block beat it, and its block's
  other members lie at fixed distances in memory, so that one loop over contiguous memory loads, compares, counts and
  stores. No mask, no order and no copy of another layout is ever written.

Compiling takes seconds, so a function is compiled once it has sorted enough for that to pay, and never for small
tensors (:mod:`nmgraph.compilation`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from nmgraph.compilation import compiled, give_up, is_plain, may_compile
from nmgraph.nm.grouping import in_memory_order, memory_order, out_of_memory_order

_PAYS = 1 << 30  # weights sorted for one kind of block until compiling costs less than going on, some ten seconds
_SMALL = 1 << 13  # weights below which the calls around a kernel cost more than sorting
_ROW = 512  # weights that an inner loop runs over, at least
_CHUNK = 1 << 24  # weights sorted at a time, to bound the memory of their order

_lock = threading.Lock()


def top_n(scores: Tensor, n: int | Tensor, dim: int = -1) -> Tensor:
    """Mark the ``n`` highest scores of an axis: exactly n, of equals the ones with the lowest index.

    Args:
        scores: any real dtype, finite.
        n: how many to mark, ``0 <= n <= M``; an integer tensor that broadcasts to ``scores`` with 1 at ``dim`` is never
            read on the host, so that a count that changes in training does not stall a GPU.
        dim: the axis of length M.

    Returns:
        bool, of the shape of ``scores``.

    >>> top_n(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), 2)
    tensor([[False,  True,  True, False]])
    """
    # A plain topk keeps an arbitrary one of equals, and another one on another device or rank.
    order = scores.argsort(dim=dim, descending=True, stable=True)
    marked = torch.zeros_like(scores, dtype=torch.bool)
    if isinstance(n, int):
        return marked.scatter(dim, order.narrow(dim, 0, n), True)
    places = torch.arange(scores.shape[dim], device=scores.device)
    wanted = places.reshape([-1 if axis == dim % scores.dim() else 1 for axis in range(scores.dim())]) < n
    return marked.scatter(dim, order, wanted.expand_as(scores))


class Blockwise:
    """An elementwise function of tensors and of which of their elements are among the best of their block.

    Args:
        score: of the tensors, elementwise: what a block's members are ranked by.
        value: of the mask of the best and of the tensors, elementwise, in the first one's dtype; without it the mask.

    Of equals the lowest index ranks first. A NaN ranks first and is always kept, so that it shows.
    """

    def __init__(self, score: Callable[..., Tensor], value: Callable[..., Tensor] | None = None) -> None:
        self._score, self._value = score, value
        self._sorted: dict[int, int] = {}  # by M: weights so far
        self._kernels: dict[int, Callable[..., None]] = {}

    def __call__(self, m: int, keep: int | Tensor, *tensors: Tensor, dim: int = -1) -> Tensor:
        """Compute it for blocks of ``m`` along ``dim``.

        Args:
            m: length of a block; must divide the axis.
            keep: how many are the best, ``0 <= keep <= m``; a 0-d integer tensor is never read on the host.
            tensors: all of one shape, or 0-d.
            dim: the axis that is cut into blocks.

        Returns:
            of the first tensor's shape and memory order.
        """
        first = tensors[0]
        order = memory_order(first)
        laid = [in_memory_order(t.detach(), order) if t.dim() else t.detach() for t in tensors]
        apart = math.prod(laid[0].shape[order.index(dim % first.dim()) + 1 :])  # of two neighbours in a block
        found = self._compared(m, keep, apart, laid) if self._compiles(m, laid) else self._ranked(m, keep, apart, laid)
        return out_of_memory_order(found.view(laid[0].shape), order)

    def _ranked(self, m: int, keep: int | Tensor, apart: int, laid: list[Tensor]) -> Tensor:
        """Compute it by sorting."""
        cut = [t.view(-1, m, apart) if t.dim() else t for t in laid]
        blocks = max(1, _CHUNK // (m * apart))
        chunks = [[t[start : start + blocks] if t.dim() else t for t in cut] for start in range(0, len(cut[0]), blocks)]
        found = [self._rank(keep, chunk) for chunk in chunks]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _rank(self, keep: int | Tensor, tensors: list[Tensor]) -> Tensor:
        score = self._score(*tensors)
        kept = top_n(score, keep, dim=1) | score.isnan()
        return kept if self._value is None else self._value(kept, *tensors)

    def _compiles(self, m: int, tensors: list[Tensor]) -> bool:
        """Decide which way to go."""
        if tensors[0].numel() < _SMALL or not is_plain(*tensors):
            return False
        with _lock:
            weights = self._sorted[m] = self._sorted.get(m, 0) + tensors[0].numel()
        return may_compile(tensors[0].device.type, pays=weights >= _PAYS)

    def _compared(self, m: int, keep: int | Tensor, apart: int, laid: list[Tensor]) -> Tensor:
        """Compute it by comparing, compiled; by sorting if that fails."""
        flat = [t.view(-1) if t.dim() else t for t in laid]
        dtype = torch.uint8 if self._value is None else laid[0].dtype
        found = torch.empty_like(flat[0], dtype=dtype)
        table, row = _apart_in_row(m, apart, str(found.device))
        if found.numel() < 4 * row:
            return self._ranked(m, keep, apart, laid)
        try:
            with torch.no_grad(), torch.autocast(found.device.type, enabled=False):
                self._compare(m, keep, apart, flat, found, table, row)
        except Exception as error:  # whatever a compiler may lack; sorting needs none
            give_up(found.device.type, error)
            return self._ranked(m, keep, apart, laid)
        return found.view(torch.bool) if self._value is None else found

    def _compare(
        self, m: int, keep: int | Tensor, apart: int, flat: list[Tensor], found: Tensor, table: Tensor, row: int
    ) -> None:
        kernel, cut = self._kernel(m), (table.shape[1], row // table.shape[1])
        keep = _count(keep, str(found.device)) if isinstance(keep, int) else keep
        # The kernel looks a row back and a row ahead. What it sees there does not count, but must be memory.
        last = found.numel() // row * row - row
        kernel(found[row:last].view(-1, *cut), table, keep, apart + _NOT_BAKED_IN, *flat)
        edges = [_edges(t, row, last) if t.dim() else t for t in flat]
        at_edges = torch.empty(3 * row, dtype=found.dtype, device=found.device)
        kernel(at_edges.view(-1, *cut), table, keep, apart + _NOT_BAKED_IN, *edges)
        found[:row], found[last:] = at_edges[:row], at_edges[row : row + len(found) - last]

    def _kernel(self, m: int) -> Callable[..., None]:
        with _lock:
            if m not in self._kernels:
                self._kernels[m] = compiled(_comparing(m, self._score, self._value))
            return self._kernels[m]


_NOT_BAKED_IN = 2  # added to a number: dynamo would compile anew for 0 and for 1


def _comparing(m: int, score: Callable[..., Tensor], value: Callable[..., Tensor] | None) -> Callable[..., None]:
    """Write the kernel for blocks of ``m``."""

    def kernel(out_KAB: Tensor, table: Tensor, keep: Tensor, apart: int, *flat: Tensor) -> None:
        rows, a, b = out_KAB.shape
        apart -= _NOT_BAKED_IN

        def at(offset: int) -> list[Tensor]:
            start = a * b + offset
            return [t[start : start + rows * a * b].view(rows, a, b) if t.dim() else t for t in flat]

        own = at(0)
        scores = score(*own)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        beats = torch.zeros_like(scores)
        for distance in range(1, m):
            # The table adds NaN where there is no such member, and with NaN no comparison holds. Counting what is beaten,
            # and not what beats, leaves a block with a NaN in it N members at most besides.
            before = score(*at(-distance * apart)) + table[2 * distance - 2]
            after = score(*at(distance * apart)) + table[2 * distance - 1]
            beats = beats + (before < scores).to(beats.dtype) + (after <= scores).to(beats.dtype)
        kept = (beats > m - 1 - keep) | (scores != scores)
        # Not the mask itself: vectors of bool are stored one by one.
        out_KAB.copy_(torch.where(kept, 1.0, 0.0).to(torch.uint8) if value is None else value(kept, *own))

    return kernel


@lru_cache(maxsize=64)
def _count(keep: int, device: str) -> Tensor:
    # A tensor, so that one kernel serves counts that are known and counts that are state.
    return torch.tensor(keep, device=device)


@lru_cache(maxsize=64)
def _apart_in_row(m: int, apart: int, device: str) -> tuple[Tensor, int]:
    """Say how many weights a row has, and which members of a block are which distance apart in it.

    Returns:
        float32 ``[2 (m - 1), A, B]``, 0 where the place has a member that many before it (even) or after it (odd),
        else NaN; and the length of a row, whole blocks of the same place in every row.
    """
    period = m * apart
    length = math.lcm(period, 16)  # of the widest vectors
    length *= max(1, _ROW // length)
    long = period > 8 * _ROW
    place = torch.arange(m).unsqueeze(1) if long else (torch.arange(length) // apart % m).unsqueeze(0)
    there = [t for distance in range(1, m) for t in (place >= distance, place + distance < m)]
    table = torch.where(torch.stack(there), 0.0, math.nan).to(device)
    return table, period if long else length


def _edges(flat: Tensor, row: int, last: int) -> Tensor:
    """Put the first row and what is left from ``last`` on side by side, five rows with what surrounds them."""
    return torch.cat([flat[:row], flat[:row], flat[last:], flat[: 3 * row - (len(flat) - last)]])
