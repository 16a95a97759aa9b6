"""How far a phase has come."""

import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmgraph.errors import MethodError
from nmgraph.methods.contract import Clock
from nmgraph.methods.schedule import CURVES, check_choice, check_phase, check_range, cubic, kept_count, ramp
from nmgraph.nm.pattern import Pattern

SHARES = st.floats(0.0, 1.0)


@settings(deadline=None)
@given(SHARES, st.tuples(SHARES, SHARES).map(sorted))
def test_ramp_stays_in_its_range_and_reaches_both_ends(progress, phase):
    start, end = phase
    risen = ramp(progress, start, end)
    assert 0.0 <= risen <= 1.0
    assert ramp(end, start, end) == 1.0
    assert start == end or ramp(start, start, end) == 0.0
    assert progress > start or start == end or risen == 0.0


@settings(deadline=None)
@given(SHARES, SHARES, st.tuples(SHARES, SHARES).map(sorted))
def test_ramp_and_cubic_never_fall(one, other, phase):
    earlier, later = sorted((one, other))
    assert ramp(earlier, *phase) <= ramp(later, *phase)
    assert cubic(earlier) <= cubic(later)


@pytest.mark.parametrize(("progress", "risen"), [(0.0, 0.0), (0.25, 0.0), (0.5, 0.5), (0.75, 1.0), (1.0, 1.0)])
def test_ramp_is_linear_between_its_ends(progress, risen):
    assert ramp(progress, 0.25, 0.75) == risen


def test_ramp_is_a_step_where_its_ends_are_equal():
    assert [ramp(p, 0.5, 0.5) for p in (0.0, 0.49, 0.5, 1.0)] == [0.0, 0.0, 1.0, 1.0]


def test_cubic_is_the_gradual_pruning_curve():
    for x in (Fraction(i, 8) for i in range(9)):  # eighths are exact in floating point
        assert Fraction(cubic(float(x))) == 1 - (1 - x) ** 3


@pytest.mark.parametrize(
    ("start", "end"), [(-0.1, 0.5), (0.6, 0.5), (0.0, 1.1), (float("nan"), 0.5), (0.0, float("nan"))]
)
def test_a_phase_outside_the_run_is_refused(start, end):
    message = f"lbc: t_i={start} and t_f={end} are fractions of all steps, so 0 <= t_i <= t_f <= 1 must hold."
    with pytest.raises(MethodError, match=f"^{re.escape(message)}$"):
        check_phase("lbc", start, end)


def test_the_clock_counts_the_step_being_taken_and_stops_at_the_end():
    assert (Clock(0, 4, 0.1).progress_before, Clock(0, 4, 0.1).progress) == (0.0, 0.25)
    assert (Clock(3, 4, 0.1).progress_before, Clock(3, 4, 0.1).progress) == (0.75, 1.0)
    assert (Clock(9, 4, 0.1).progress_before, Clock(9, 4, 0.1).progress) == (1.0, 1.0)


@pytest.mark.parametrize("curve", CURVES)
def test_every_curve_goes_from_none_to_all_and_never_falls(curve):
    heights = [CURVES[curve](i / 64) for i in range(65)]
    assert heights[0] == 0.0
    assert heights[-1] == pytest.approx(1.0, abs=1e-15)
    assert heights == sorted(heights)


def test_the_curves_are_three():
    assert {name: round(curve(0.5), 6) for name, curve in CURVES.items()} == {
        "linear": 0.5,
        "cubic": 0.875,
        "cosine": 0.292893,
    }


PATTERNS = st.integers(2, 32).flatmap(lambda m: st.builds(Pattern, st.integers(1, m - 1), st.just(m)))


@settings(deadline=None)
@given(PATTERNS, st.sampled_from(sorted(CURVES)), SHARES, SHARES)
def test_the_kept_count_falls_from_m_to_n_and_is_the_nearest_whole_number(pattern, curve, one, other):
    earlier, later = sorted((one, other))
    assert kept_count(0.0, pattern, curve) == pattern.m
    assert kept_count(1.0, pattern, curve) == pattern.n
    assert kept_count(earlier, pattern, curve) >= kept_count(later, pattern, curve)
    exactly = pattern.m - (pattern.m - pattern.n) * CURVES[curve](one)
    assert abs(kept_count(one, pattern, curve) - exactly) <= 0.5 + 1e-8


def test_half_a_weight_is_pruned():
    assert [kept_count(x, Pattern(2, 4), "linear") for x in (0.24, 0.25, 0.74, 0.75)] == [4, 3, 3, 2]
    x = (55 / 120 - 0.25) / 0.25  # 5/6, were it not for rounding; 12.5 of 15
    assert kept_count(x, Pattern(1, 16), "linear") == 3


@pytest.mark.parametrize("value", ["", "OR", "xor"])
def test_a_word_that_is_no_choice_is_refused(value):
    message = f"bame: combine={value!r} is none of or, and."
    with pytest.raises(MethodError, match=f"^{re.escape(message)}$"):
        check_choice("bame", "combine", value, ("or", "and"))


@pytest.mark.parametrize("value", ["or", "and"])
def test_a_choice_passes(value):
    check_choice("bame", "combine", value, ("or", "and"))


@pytest.mark.parametrize(
    ("value", "low", "high", "note", "message"),
    [
        (1.5, 0.0, 1.0, "", "rigl: drop=1.5 must lie in 0 to 1."),
        (-0.1, 0.0, 1.0, "the paper's is 0.3", "rigl: drop=-0.1 must lie in 0 to 1; the paper's is 0.3."),
        (float("nan"), 0.0, 1.0, "", "rigl: drop=nan must lie in 0 to 1."),
        (0, 1, float("inf"), "", "rigl: drop=0 must be 1 or more."),
        (float("inf"), 1, float("inf"), "", "rigl: drop=inf must be 1 or more."),
    ],
)
def test_a_number_outside_its_range_is_refused(value, low, high, note, message):
    with pytest.raises(MethodError, match=f"^{re.escape(message)}$"):
        check_range("rigl", "drop", value, low, high, note)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_both_ends_of_a_range_belong_to_it(value):
    check_range("rigl", "drop", value, 0.0, 1.0)
