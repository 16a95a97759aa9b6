"""How far a phase has come."""

import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmgraph.errors import MethodError
from nmgraph.methods.contract import Clock
from nmgraph.methods.schedule import check_phase, cubic, ramp

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
