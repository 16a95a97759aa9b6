"""How far a phase has come, as pure functions of progress in 0..1."""

from __future__ import annotations

from nmgraph.errors import MethodError


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


def check_phase(method: str, start: float, end: float) -> None:
    """Refuse a phase that does not lie within the run.

    Raises:
        MethodError: unless ``0 <= start <= end <= 1``.
    """
    if not 0.0 <= start <= end <= 1.0:
        raise MethodError(
            f"{method}: t_i={start} and t_f={end} are fractions of all steps, so 0 <= t_i <= t_f <= 1 must hold."
        )
