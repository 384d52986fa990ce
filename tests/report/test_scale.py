from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest

from flyweight.records import Interval
from flyweight.report import _scale


def test_linear_places_and_ticks() -> None:
    axis = _scale.linear(0, 0.02)
    assert [axis.at(value) for value in (0, 0.01, 0.02)] == pytest.approx([0, 50, 100])
    assert axis.ticks == pytest.approx((0, 0.005, 0.01, 0.015, 0.02))


def test_logarithmic_places_and_ticks() -> None:
    axis = _scale.logarithmic(1, 16)
    assert [axis.at(value) for value in (1, 2, 4, 16)] == pytest.approx([0, 25, 50, 100])
    assert axis.ticks == pytest.approx((1, 2, 3, 5, 10))


def test_what_lies_outside_sits_at_the_edge() -> None:
    axis = _scale.linear(0, 1)
    assert (axis.at(-3), axis.at(7), axis.holds(7), axis.holds(1)) == (0, 100, False, True)


@hypothesis.given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.integers(3, 9))
def test_linear_axes_have_few_ticks_inside(low: float, high: float, count: int) -> None:
    axis = _scale.linear(low, high, count)
    assert 1 <= len(axis.ticks) <= count + 1
    room = 1e-6 * (axis.high - axis.low)
    assert all(axis.low - room <= tick <= axis.high + room for tick in axis.ticks)


@hypothesis.given(st.floats(1e-6, 1e6), st.floats(1.01, 1e6))
def test_logarithmic_axes_have_few_ticks_inside_and_keep_the_order(low: float, ratio: float) -> None:
    axis = _scale.logarithmic(low, low * ratio)
    assert 1 <= len(axis.ticks) <= 8
    places = [axis.at(tick) for tick in axis.ticks]
    assert places == sorted(places)
    assert all(0 <= place <= 100 for place in places)


def test_only_finite_values_of_sane_size_are_drawn() -> None:
    assert [_scale.drawable(value) for value in (0.0, -3, math.nan, math.inf, 1e300)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert _scale.ends(Interval(0.0, 2.0)) == [0.0, 2.0]
    assert _scale.ends(Interval(0.0, math.inf)) == _scale.ends(None) == []
