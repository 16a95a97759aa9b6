"""How far a phase has come, as pure functions of progress in 0..1."""

from __future__ import annotations

import math
from collections.abc import Callable

from nmgraph.errors import MethodError
from nmgraph.nm.pattern import Pattern


def ramp(progress: float, start: float, end: float) -> float:
    """Rise from 0 at ``start`` to 1 at ``end``, both fractions of the whole run; a step where they are equal.

    >>> ramp(0.25, 0.0, 0.5), ramp(0.9, 0.0, 0.5), ramp(0.0, 0.0, 0.0)
    (0.5, 1.0, 1.0)
    """
    if progress >= end:
        return 1.0
    return (progress - start) / (end - start) if progress > start else 0.0


def cubic(x: float) -> float:
    """Zhu and Gupta's gradual pruning curve ``1 - (1 - x)^3`` (arXiv 1710.01878)."""
    return 1.0 - (1.0 - x) ** 3


CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cubic": cubic,
    "cosine": lambda x: 1.0 - math.cos(math.pi * x / 2),
}
"""From 0 at the beginning of a phase to 1 at its end."""


def kept_count(x: float, pattern: Pattern, curve: str) -> int:
    """Count how many weights of a block are kept at ``x`` of a gradual phase: M at 0, N at 1, rounded between.

    >>> [kept_count(x, Pattern(1, 4), "cubic") for x in (0.0, 0.1, 0.3, 1.0)]
    [4, 3, 2, 1]
    """
    # Halves round up, also where 12.5 came out as 12.499999999999998.
    return pattern.m - math.floor((pattern.m - pattern.n) * CURVES[curve](x) + 0.5 + 1e-9)


def kept_after(
    step: int, total_steps: int, phase: tuple[float, float], interval: int, pattern: Pattern, curve: str
) -> int:
    """Count the weights kept of a block once so many steps are done, if pruning happens every ``interval`` steps, and at the end.

    >>> [kept_after(step, 100, (0.0, 0.25), 10, Pattern(1, 4), "linear") for step in (9, 10, 19, 20, 25)]
    [4, 3, 3, 2, 1]
    """
    start, end = phase
    whole = step if step >= end * total_steps else step // interval * interval
    return kept_count(ramp(whole / total_steps, start, end), pattern, curve)


def check_phase(method: str, start: float, end: float) -> None:
    """Refuse a phase that does not lie within the run.

    Raises:
        MethodError: unless ``0 <= start <= end <= 1``.
    """
    if not 0.0 <= start <= end <= 1.0:
        raise MethodError(
            f"{method}: t_i={start} and t_f={end} are fractions of all steps, so 0 <= t_i <= t_f <= 1 must hold."
        )


def check_choice(method: str, option: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that is none of the known ones.

    Raises:
        MethodError: listing them.
    """
    if value not in known:
        raise MethodError(f"{method}: {option}={value!r} is none of {', '.join(known)}.")


def check_range(method: str, option: str, value: float, low: float, high: float, note: str = "") -> None:
    """Refuse a number outside ``[low, high]``, or one that is not finite.

    Raises:
        MethodError: with the range.
    """
    if not (math.isfinite(value) and low <= value <= high):
        allowed = f"must be {low:g} or more" if high == math.inf else f"must lie in {low:g} to {high:g}"
        raise MethodError(f"{method}: {option}={value} {allowed}{f'; {note}' if note else ''}.")
