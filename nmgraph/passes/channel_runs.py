"""Which channels must keep a common order: runs of channels that are joined, cut and pinned while a graph is read.

The channels of a tensor are a tuple of runs. Adding two tensors joins their runs; a concatenation strings them
together; a split cuts one. In the end every run that is not pinned may be ordered as one likes, if all that carries
it is ordered alike.
"""

from __future__ import annotations

from collections.abc import Iterable


class Run:
    """Some neighbouring channels; joined runs are one, and a cut one is its parts."""

    def __init__(self, size: int, pinned: str = "") -> None:
        self.size, self.pinned = size, pinned
        self._parts: tuple[Run, ...] = ()  # what it was joined to, or cut into

    def whole(self) -> tuple[Run, ...]:
        """Give the runs that it has become."""
        if not self._parts:
            return (self,)
        self._parts = tuple(run for part in self._parts for run in part.whole())  # keeps chains of joins short
        return self._parts

    def become(self, *parts: Run) -> None:
        """Be those runs from now on; a reason to stay in place goes over to them."""
        assert not self._parts and sum(part.size for part in parts) == self.size  # noqa: PT018
        self._parts = parts
        if self.pinned:
            pin(parts, self.pinned)


def whole(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Give what runs have become by now."""
    return tuple(now for run in runs for now in run.whole())


def size(runs: Iterable[Run]) -> int:
    """Count the channels."""
    return sum(run.size for run in runs)


def pin(runs: Iterable[Run], reason: str) -> None:
    """Keep runs in their place; the first reason counts."""
    for run in whole(runs):
        run.pinned = run.pinned or reason


def cut(runs: Iterable[Run], place: int) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """Part channels in front of ``place``, which may lie inside a run."""
    given = tuple(runs)
    begin = 0
    for run in whole(given):
        if begin < place < begin + run.size:
            run.become(Run(place - begin), Run(begin + run.size - place))
            break  # where the same run comes twice, the other one is cut by looking again
        begin += run.size
    now, begin = whole(given), 0
    for index, run in enumerate(now):
        if begin == place:
            return now[:index], now[index:]
        begin += run.size
    return now, ()


def join(one: Iterable[Run], other: Iterable[Run]) -> None:
    """Give two tensors' channels a common order; those of different numbers are pinned."""
    first, second = tuple(one), tuple(other)
    if size(first) != size(second):
        pin((*first, *second), "tensors of different channels meet in it")
        return
    while True:
        a_all, b_all = whole(first), whole(second)
        pair = next(((a, b) for a, b in zip(a_all, b_all, strict=False) if a is not b), None)
        if pair is None:
            return
        a, b = pair
        if a.size == b.size:
            a.become(b)
        elif a.size > b.size:
            a.become(Run(b.size), Run(a.size - b.size))
        else:
            b.become(Run(a.size), Run(b.size - a.size))
