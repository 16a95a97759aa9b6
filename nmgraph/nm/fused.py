"""Functions of every block's N best, computed in one pass over memory.

What is done with a mask is mostly elementwise: the weight or zero, a decay of what it drops. :class:`Blockwise` takes
such a function and computes it in one of three ways, with the same result to the bit:

- by *sorting*: what the mask is defined by, on any tensor;
- by *comparing*, of large ones on the CPU: a weight is kept if fewer than N of its block beat it. Chunks that fit a
  processor's cache are laid out so that every comparison is one of long rows;
- by comparing, *compiled* by ``torch.compile``: a block's other members lie at fixed distances in memory, so that one
  loop over contiguous memory loads, compares, counts and stores. No mask, no order and no other layout is written.

Compiling takes seconds, so a function is compiled once it has done enough for that to pay (:mod:`nmgraph.compilation`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from nmgraph.compilation import Compiled, is_exporting, is_plain
from nmgraph.nm.grouping import in_memory_order, memory_order, out_of_memory_order

_PAYS = 1 << 30  # weights done for one kind of block until compiling costs less than going on, some ten seconds
_SMALL = 1 << 13  # weights below which the calls cost more than sorting; times M if not compiled
_ROW = 128  # weights that a compiled loop runs over, at least; its table stays in the nearest cache
_COPIED = 1 << 18  # weights below which a second call costs more than a copy
_CHUNK = 1 << 18  # weights compared at a time on the CPU, to stay in its cache
_MANY = 1 << 24  # weights at a time elsewhere, to bound memory

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


def top_n_staying(scores: Tensor, n: int | Tensor, marked: Tensor) -> Tensor:
    """Do :func:`top_n` along the last axis, but of equals take those first that are marked already: no gain, no change.

    >>> top_n_staying(torch.zeros(4), 2, torch.tensor([False, True, False, True]))
    tensor([False,  True, False,  True])
    """
    marked_first = marked.byte().argsort(dim=-1, descending=True, stable=True)
    chosen = top_n(scores.gather(-1, marked_first), n)
    return torch.zeros_like(chosen).scatter(-1, marked_first, chosen)


def zero_outside(mask: Tensor, t: Tensor) -> Tensor:
    """Give ``t`` where the mask holds, else 0, whatever stands there; without a gradient."""
    if t.device.type != "cpu" or not is_plain(mask, t):
        return torch.where(mask, t, torch.zeros((), dtype=t.dtype, device=t.device))
    # All bits, or none: on the CPU six times as fast as to choose.
    bits = torch.bitwise_and(t.view(_BITS[t.element_size()]), mask.view(torch.int8).neg())
    return bits.view(t.dtype)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


_functions: list[Blockwise] = []


class Blockwise:
    """An elementwise function of tensors and of which of their elements are among the best of their block.

    Args:
        score: of the tensors, elementwise: what a block's members are ranked by.
        value: of the mask of the best and of the tensors, elementwise, in the first one's dtype; without it the mask.

    Of equals the lowest index ranks first. A NaN ranks first and is always kept, so that it shows.
    """

    def __init__(self, score: Callable[..., Tensor], value: Callable[..., Tensor] | None = None) -> None:
        self._score, self._value = score, value
        self._kernels: dict[int, Compiled] = {}  # by M
        with _lock:
            self._number = len(_functions)
            _functions.append(self)

    def __call__(self, m: int, keep: int | Tensor, *tensors: Tensor, dim: int = -1) -> Tensor:
        """Compute it for blocks of ``m`` along ``dim``.

        Args:
            m: length of a block; must divide the axis.
            keep: how many are the best, ``0 <= keep <= m``; a 0-d integer tensor is never read on the host.
            tensors: all of one shape.
            dim: the axis that is cut into blocks.

        Returns:
            of the first tensor's shape and memory order.
        """
        if torch.compiler.is_dynamo_compiling() and not is_exporting():
            number, known = (None, keep) if isinstance(keep, int) else (keep, 0)
            found: Tensor = torch.ops.nmgraph.blockwise(self._number, m, known, number, list(tensors), dim)
            return found
        return self._compute(m, keep, tensors, dim)

    def like(self, first: Tensor) -> Tensor:
        """Give a tensor of the result's shape, dtype and memory order."""
        return torch.empty_like(first, dtype=torch.bool if self._value is None else first.dtype)

    def _compute(self, m: int, keep: int | Tensor, tensors: Sequence[Tensor], dim: int) -> Tensor:
        first = tensors[0]
        order = memory_order(first)
        laid = [in_memory_order(t.detach(), order) for t in tensors]
        apart = math.prod(laid[0].shape[order.index(dim % first.dim()) + 1 :])  # of two neighbours in a block
        found, plain = None, is_plain(*laid)
        if plain and first.numel() >= _SMALL:
            kernel = self._kernel(m)
            found = kernel.attempt(lambda: self._compiled(kernel, m, keep, apart, laid), first.numel(), first.device)
        if found is None:
            found = self._in_chunks(m, keep, apart, laid, plain)
        return out_of_memory_order(found.view(laid[0].shape), order)

    def _in_chunks(self, m: int, keep: int | Tensor, apart: int, laid: list[Tensor], plain: bool) -> Tensor:
        """Compute it by comparing; by sorting of few weights, on other devices, and of what is no plain tensor."""
        cut = [t.view(-1, m, apart) for t in laid]
        compares = plain and laid[0].device.type == "cpu" and laid[0].numel() >= _SMALL * m
        chunk = max(1, (_CHUNK if compares else _MANY) // (m * apart))
        found = []
        for start in range(0, max(1, len(cut[0])), chunk):
            own = [t[start : start + chunk] for t in cut]
            scores = self._score(*own)
            # With a NaN no comparison holds; sorting is what says which come first then.
            by_comparing = compares and not bool(scores.amax().isnan())
            kept = _best_of_planes(scores, keep) if by_comparing else top_n(scores, keep, dim=1) | scores.isnan()
            found.append(kept if self._value is None else self._value(kept, *own))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _compiled(self, kernel: Compiled, m: int, keep: int | Tensor, apart: int, laid: list[Tensor]) -> Tensor:
        """Compute it by comparing, in one compiled loop."""
        flat = [t.view(-1) for t in laid]
        length, device = len(flat[0]), laid[0].device
        dtype = torch.uint8 if self._value is None else laid[0].dtype
        table, row = _table(m, apart, str(device))
        about = table, _count(keep, str(device)) if isinstance(keep, int) else keep, apart + _NOT_BAKED_IN

        def run(out: Tensor, *surrounded: Tensor) -> None:
            # The kernel looks a row back and a row ahead. What it sees there does not count, but must be memory.
            kernel(out.view(-1, table.shape[1], row // table.shape[1]), *about, *surrounded)

        if length < _COPIED or length < 4 * row:
            whole = -(-length // row) * row
            found = torch.empty(whole, dtype=dtype, device=device)
            run(found, *(torch.cat([t.new_zeros(row), t, t.new_zeros(whole - length + row)]) for t in flat))
            found = found[:length]
        else:
            found, last = torch.empty(length, dtype=dtype, device=device), length // row * row - row
            run(found[row:last], *flat)
            edges = [torch.cat([t[:row], t[:row], t[last:], t[: 3 * row - (length - last)]]) for t in flat]
            at_edges = torch.empty(3 * row, dtype=dtype, device=device)
            run(at_edges, *edges)
            found[:row], found[last:] = at_edges[:row], at_edges[row : row + length - last]
        return found.view(torch.bool) if self._value is None else found

    def _kernel(self, m: int) -> Compiled:
        with _lock:
            if m not in self._kernels:
                self._kernels[m] = Compiled(_comparing(m, self._score, self._value), _PAYS)
            return self._kernels[m]


@torch.library.custom_op("nmgraph::blockwise", mutates_args=())
def _blockwise(
    function: int, m: int, keep: int, kept_of_state: Tensor | None, tensors: list[Tensor], dim: int
) -> Tensor:
    """Compute a :class:`Blockwise` function as one node of a user's ``torch.compile``, which would sort otherwise."""
    return _functions[function]._compute(m, keep if kept_of_state is None else kept_of_state, tensors, dim)


@_blockwise.register_fake
def _(function: int, m: int, keep: int, kept_of_state: Tensor | None, tensors: list[Tensor], dim: int) -> Tensor:
    return _functions[function].like(tensors[0])


def _best_of_planes(scores_KMS: Tensor, keep: int | Tensor) -> Tensor:
    """Do :func:`top_n` along the blocks by comparing every two members; the scores must not be NaN."""
    m = scores_KMS.shape[1]
    planes = scores_KMS.transpose(0, 1).contiguous().flatten(1).unbind()
    # Of two, either the earlier is at least as high or the later is higher: it wins unless the earlier does.
    wins_ML = torch.arange(m, dtype=torch.int8, device=scores_KMS.device).unsqueeze(1).repeat(1, planes[0].numel())
    for later in range(m):
        for earlier in range(later):
            won = torch.ge(planes[earlier], planes[later]).view(torch.int8)
            wins_ML[earlier].add_(won)
            wins_ML[later].sub_(won)
    kept_ML = wins_ML > m - 1 - keep
    return kept_ML.view(m, len(scores_KMS), -1).transpose(0, 1).contiguous()


_NOT_BAKED_IN = 2  # added to a number: dynamo would compile anew for 0 and for 1


def _comparing(m: int, score: Callable[..., Tensor], value: Callable[..., Tensor] | None) -> Callable[..., None]:
    """Write the kernel for blocks of ``m``."""

    def kernel(out_KAB: Tensor, table: Tensor, keep: Tensor, apart: int, *flat: Tensor) -> None:
        rows, a, b = out_KAB.shape
        apart -= _NOT_BAKED_IN

        def at(offset: int) -> list[Tensor]:
            start = a * b + offset
            return [t[start : start + rows * a * b].view(rows, a, b) for t in flat]

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
def _table(m: int, apart: int, device: str) -> tuple[Tensor, int]:
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
