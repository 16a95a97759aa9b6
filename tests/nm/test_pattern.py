"""The N:M pattern as a value."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmgraph.errors import NMGraphError, PatternError
from nmgraph.nm.pattern import MAX_M, Pattern

PATTERNS = st.integers(2, MAX_M).flatmap(lambda m: st.builds(Pattern, st.integers(1, m - 1), st.just(m)))


@settings(deadline=None)
@given(PATTERNS)
def test_a_pattern_reads_back_what_it_prints(pattern):
    assert Pattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize("text", ["2:4", " 2:4 ", "2 : 4", "02:04", Pattern(2, 4)])
def test_parse_accepts_spaces_leading_zeros_and_patterns(text):
    assert Pattern.parse(text) == Pattern(2, 4)


@pytest.mark.parametrize("text", ["x", "", "2", "2:", ":4", "2:4:8", "2/4", "-2:4", "2.0:4", "2:4x", None, 24])
def test_parse_refuses_what_is_not_two_whole_numbers(text):
    message = f"{text!r} is not a pattern. Write N:M, for example 2:4 (keep 2 of every 4)."
    with pytest.raises(PatternError, match=f"^{re.escape(message)}$"):
        Pattern.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4:2", "pattern 4:2 keeps 4 of every 2 weights, which removes nothing. Did you mean 2:4?"),
        ("4:4", "pattern 4:4 keeps 4 of every 4 weights, which removes nothing. Use for example 2:4."),
        ("2:0", "pattern 2:0 keeps 2 of every 0 weights, which removes nothing. Use for example 2:4."),
        (
            "0:4",
            "pattern 0:4 keeps no weight at all. N is the count kept of every M: use 1:4 or more.",
        ),
        (
            "0:0",
            "pattern 0:0 keeps no weight at all. N is the count kept of every M: use 1:2 or more.",
        ),
        ("2:33", "pattern 2:33 has blocks of 33; M may be 32 at most."),
    ],
)
def test_a_pattern_that_makes_no_sense_is_refused_with_a_remedy(text, message):
    with pytest.raises(PatternError, match=f"^{re.escape(message)}$"):
        Pattern.parse(text)


def test_a_refused_pattern_is_both_a_value_error_and_one_of_ours():
    assert issubclass(PatternError, ValueError)
    assert issubclass(PatternError, NMGraphError)


@pytest.mark.parametrize("n", [-1, 0, 4, 5])
def test_the_constructor_refuses_what_parse_refuses(n):
    with pytest.raises(PatternError):
        Pattern(n, 4)


@settings(deadline=None)
@given(PATTERNS)
def test_density_and_combinations_follow_from_n_and_m(pattern):
    assert pattern.density == pattern.n / pattern.m
    assert pattern.combinations == math.comb(pattern.m, pattern.n)


@settings(deadline=None)
@given(PATTERNS, st.integers(0, 200))
def test_a_pattern_divides_exactly_the_axes_of_whole_blocks(pattern, length):
    assert pattern.divides(length) == (length in range(pattern.m, 201, pattern.m))


def test_fitting_lists_the_nearest_density_first():
    assert [str(p) for p in Pattern(2, 4).fitting(30)] == ["1:2"]
    assert [str(p) for p in Pattern(2, 4).fitting(12)] == ["2:4", "1:2", "1:4"]
    assert [str(p) for p in Pattern(1, 8).fitting(16)] == ["1:16", "1:4", "2:8", "2:4", "4:8", "1:2"]
    assert Pattern(2, 4).fitting(3) == ()


def test_patterns_are_hashable_and_ordered():
    assert sorted({Pattern(2, 4), Pattern(1, 4), Pattern(2, 4)}) == [Pattern(1, 4), Pattern(2, 4)]
