"""The N:M pattern as a value: parsed once at the edge, valid wherever it exists."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from nmgraph.errors import PatternError

MAX_M = 32


@dataclass(frozen=True, order=True)
class Pattern:
    """Keep at most ``n`` of every ``m`` consecutive weights along the reduction axis.

    N is the count *kept* (some tools count the removed ones: the same at 2:4, the opposite at 1:4).

    Raises:
        PatternError: unless ``1 <= n < m <= 32``.

    Examples:
        >>> Pattern.parse("1:4"), str(Pattern(2, 4)), Pattern(2, 4).density
        (Pattern(n=1, m=4), '2:4', 0.5)
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int)):
            raise PatternError(
                f"pattern {self.n}:{self.m} is not made of whole numbers. Use for example Pattern(2, 4)."
            )
        if self.n < 1:
            raise PatternError(
                f"pattern {self.n}:{self.m} keeps no weight at all. N is the count kept of every M: use 1:{min(max(self.m, 2), MAX_M)} or more."
            )
        if self.m > MAX_M:
            raise PatternError(f"pattern {self.n}:{self.m} has blocks of {self.m}; M may be {MAX_M} at most.")
        if self.n >= self.m:
            hint = f"Did you mean {self.m}:{self.n}?" if 0 < self.m < self.n else "Use for example 2:4."
            raise PatternError(
                f"pattern {self.n}:{self.m} keeps {self.n} of every {self.m} weights, which removes nothing. {hint}"
            )

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Read ``"N:M"``; a Pattern passes through.

        Raises:
            PatternError: if the text is not two whole numbers with a colon between, or no valid pattern.
        """
        if isinstance(text, Pattern):
            return text
        match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", str(text))
        if match is None:
            raise PatternError(f"{text!r} is not a pattern. Write N:M, for example 2:4 (keep 2 of every 4).")
        return cls(int(match[1]), int(match[2]))

    @property
    def density(self) -> float:
        """Share of weights kept, N / M."""
        return self.n / self.m

    @property
    def combinations(self) -> int:
        """Ways to keep exactly N of M: C(M, N)."""
        return math.comb(self.m, self.n)

    def divides(self, length: int) -> bool:
        """Tell whether an axis of ``length`` weights splits into whole blocks."""
        return length > 0 and length % self.m == 0

    def implies(self, other: Pattern) -> bool:
        """Tell whether every weight that keeps to this pattern keeps to ``other``, too, with blocks along the same axis.

        Examples:
            >>> [str(p) for p in map(Pattern.parse, ("1:4", "2:8", "1:16", "1:2", "4:8")) if p.implies(Pattern(2, 4))]
            ['1:4', '2:8', '1:16', '1:2']
        """
        starts = range(0, math.lcm(self.m, other.m), other.m)
        # A block of the other may hold parts of several blocks of this; each part keeps n at most, or all of itself.
        parts = (Counter(i // self.m for i in range(start, start + other.m)) for start in starts)
        return all(sum(min(self.n, size) for size in part.values()) <= other.n for part in parts)

    def misfit(self, length: int, what: str = "input channel") -> str:
        """Say that an axis of ``length`` does not split into whole blocks."""
        return f"{length} {what}{' is' if length == 1 else 's are'} not a multiple of {self.m}"

    def fitting(self, length: int) -> tuple[Pattern, ...]:
        """List the usual patterns that would fit an axis of ``length``, the nearest density first."""
        usual = (Pattern(2, 4), Pattern(1, 4), Pattern(2, 8), Pattern(4, 8), Pattern(1, 16), Pattern(1, 2))
        fits = [p for p in usual if p.divides(length)]
        return tuple(sorted(fits, key=lambda p: abs(p.density - self.density)))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


TENSOR_CORES = Pattern(2, 4)  # what sparse tensor cores take
