"""Who wins, who is nearest, and what the front is."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning.made import ORIGINAL, measured

from flyweight.planning import choose
from flyweight.records import Goal, Interval, Measured

GOAL = Goal(max_drop=0.01)
CANDIDATES = st.lists(
    st.builds(
        lambda speedup, drop, half, size: measured(
            "c", GOAL, speedup=speedup, drop=drop, half=half, bytes=size
        ),
        st.floats(0.2, 9),
        st.floats(-0.05, 0.2),
        st.floats(0, 0.05),
        st.integers(10, 5000),
    ),
    max_size=12,
)


@pytest.mark.parametrize(("objective", "expected"), [("latency", 2.0), ("size", 4.0), ("memory", 8.0)])
def test_a_gain_is_how_many_times_better(objective: str, expected: float) -> None:
    found = measured("c", GOAL, speedup=2.0, bytes=250, peak_memory_bytes=500)
    goal = Goal(minimize=objective)  # type: ignore[arg-type]
    assert choose.gain_of(found, goal, ORIGINAL) == expected


def test_an_unknown_memory_is_no_gain() -> None:
    goal = Goal(minimize="memory")
    assert choose.gain_of(measured("c", GOAL, peak_memory_bytes=None), goal, ORIGINAL) == 0
    unknown = dataclasses.replace(ORIGINAL, peak_memory_bytes=None)
    assert choose.gain_of(measured("c", GOAL), goal, unknown) == 0


def test_the_best_keeps_the_bound_and_is_surely_faster() -> None:
    fast, allowed = (
        measured("fast", GOAL, speedup=5, drop=0.02),
        measured("allowed", GOAL, speedup=3, drop=0.009),
    )
    unsure = measured("unsure", GOAL, speedup=4, speedup_interval=Interval(0.9, 6.0))
    unresolved = measured("unresolved", GOAL, speedup=4, drop=0.005, half=0.01)
    assert choose.best([fast, unsure, unresolved, allowed], GOAL, ORIGINAL) is allowed
    assert choose.best([fast, unsure, unresolved], GOAL, ORIGINAL) is None


def test_a_tie_goes_to_the_smaller_one() -> None:
    small = measured("small", GOAL, speedup=2.99, bytes=250)
    large = measured("large", GOAL, speedup=3.0, bytes=1000)
    assert choose.best([large, small], GOAL, ORIGINAL) is small
    assert choose.best([large, measured("slow", GOAL, speedup=2.5, bytes=10)], GOAL, ORIGINAL) is large


def test_among_speeds_that_timing_cannot_tell_apart_the_least_drop_wins() -> None:
    wide = Interval(2.8, 3.2)
    lossy = measured("lossy", GOAL, speedup=3.0, speedup_interval=wide, drop=0.004, bytes=250)
    close = measured("close", GOAL, speedup=2.9, speedup_interval=wide, drop=-0.001, bytes=255)
    assert choose.best([lossy, close], GOAL, ORIGINAL) is close
    unsure = dataclasses.replace(lossy, drop_interval=Interval(-0.001, 0.009))
    assert choose.best([unsure, close], GOAL, ORIGINAL) is unsure
    beaten = dataclasses.replace(unsure, speedup=2.95, drop=0.005)
    assert choose.best([lossy, beaten, close], GOAL, ORIGINAL) is close
    sure = dataclasses.replace(close, speedup_interval=Interval(2.7, 2.79))
    assert choose.best([lossy, sure], GOAL, ORIGINAL) is lossy
    slower = dataclasses.replace(close, speedup=2.8)
    assert choose.best([lossy, slower], GOAL, ORIGINAL) is lossy
    large = dataclasses.replace(close, bytes=1000)
    assert choose.best([lossy, large], GOAL, ORIGINAL) is lossy


def test_what_is_smaller_must_not_be_slower() -> None:
    goal = Goal(minimize="size")
    assert choose.best([measured("slow", goal, speedup=0.5, bytes=100)], goal, ORIGINAL) is None
    equal = measured("equal", goal, speedup=1.0, bytes=100)
    assert choose.best([equal], goal, ORIGINAL) is equal


def test_where_the_goal_names_the_runtime_a_smaller_model_may_be_slower() -> None:
    goal = Goal(minimize="size", runtime="transformers")
    slow = measured("slow", goal, speedup=0.5, bytes=100)
    assert choose.best([slow], goal, ORIGINAL) is slow
    assert choose.best([slow], dataclasses.replace(goal, minimize="latency"), ORIGINAL) is None


def test_the_nearest_exceeds_the_bound_least() -> None:
    near = measured("near", GOAL, speedup=1.5, drop=0.02, half=0.001)
    far, wide = (
        measured("far", GOAL, speedup=5, drop=0.1),
        measured("wide", GOAL, speedup=2, drop=0.015, half=0.02),
    )
    assert choose.nearest([far, wide, near], GOAL, ORIGINAL) is near
    assert choose.nearest([measured("slow", GOAL, speedup=0.5)], GOAL, ORIGINAL) is ORIGINAL
    assert choose.nearest([], GOAL, ORIGINAL) is ORIGINAL


@given(CANDIDATES)
def test_no_point_of_the_front_is_beaten_and_all_others_are(found: list[Measured]) -> None:
    front = choose.front([*found, ORIGINAL], GOAL, ORIGINAL)
    assert front

    def beats(one: Measured, other: Measured) -> bool:
        return (
            one.speedup >= other.speedup
            and one.drop <= other.drop
            and (one.speedup, one.drop) != (other.speedup, other.drop)
        )

    for point in front:
        assert not any(beats(other, point) for other in [*found, ORIGINAL])
    for other in found:
        assert any(beats(p, other) or (p.speedup, p.drop) == (other.speedup, other.drop) for p in front)
    assert [p.speedup for p in front] == sorted((p.speedup for p in front), reverse=True)


@given(CANDIDATES)
def test_the_best_is_met_and_nearly_the_largest_gain(found: list[Measured]) -> None:
    best = choose.best(found, GOAL, ORIGINAL)
    able = [m for m in found if m.verdict == "met" and m.speedup_interval.low > 1]
    assert (best is None) == (not able)
    if best:
        assert best.verdict == "met"
        assert best.speedup * choose.NOISE >= max(m.speedup for m in able)
