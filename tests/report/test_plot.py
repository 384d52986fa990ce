from __future__ import annotations

import dataclasses
import math

import pytest
from report import page, samples

from flyweight.records import Interval, Result
from flyweight.report import _draw, _plot, _view


def spots(result: Result) -> dict[str, tuple[float, float]]:
    """Left and top in percent of every spot, by the candidate's name."""
    found = {}
    for about in page.read(_plot.tradeoff(result).text).with_class("spot"):
        left, top = ((float(part.split(":")[1][:-1])) for part in (about["style"] or "").split(";"))
        found[(about["aria-label"] or "").split("; ")[0]] = (left, top)
    return found


def limit(result: Result) -> float:
    """Where the goal's line is, in percent of the height."""
    lines = page.read(_plot.tradeoff(result).text).with_class("limit")
    assert len(lines) == 1
    return float((lines[0]["y1"] or "")[:-1])


def test_every_measured_candidate_has_a_focusable_spot_with_its_name() -> None:
    result = samples.met(60)
    places = spots(result)
    assert len(places) == len(_view.rows(result))
    assert f"best: {result.best.name} on {result.best.runtime}" in places
    about = page.read(_plot.tradeoff(result).text).with_class("spot")
    assert {item["tabindex"] for item in about} == {"0"}


def test_better_lies_to_the_right_and_higher_up() -> None:
    result = samples.met(9)
    places = spots(result)
    left, top = places[f"best: {result.best.name} on {result.best.runtime}"]
    original_left, original_top = places["original: the original on torch"]
    assert left > original_left
    assert top > original_top
    assert top < limit(result)


def test_what_breaks_the_goal_lies_below_its_line() -> None:
    result = samples.met()
    line, places = limit(result), spots(result)
    for row in _view.rows(result):
        name = f"{_view.role_name(row.role, result)}: {row.measured.name} on {row.measured.runtime}"
        assert (places[name][1] > line) == (row.measured.drop > result.goal.max_drop), name


def test_the_marks_differ_by_shape_and_not_by_colour_alone() -> None:
    assert len(set(_draw.SHAPES.values())) == len(_draw.SHAPES)
    drawn = page.read(_plot.tradeoff(samples.met()).text).with_class("mark")
    assert {name for about in drawn for name in (about["class"] or "").split()} >= set(_draw.SHAPES)


def test_far_beyond_the_goal_is_drawn_at_the_edge_and_said() -> None:
    result = samples.met(9)
    wild = dataclasses.replace(result.front[0], drop=0.9, plan=samples.met(60).front[0].plan)
    text = _plot.tradeoff(dataclasses.replace(result, front=(wild, *result.front))).text
    assert _draw.BELOW in text
    assert "beyond the edge" in text
    bare = dataclasses.replace(result, trials=(), front=())
    assert "beyond the edge" not in _plot.tradeoff(bare).text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_candidates_without_usable_figures_are_left_out_and_said(value: float) -> None:
    result = samples.met(9)
    broken = dataclasses.replace(result.best, drop=value, drop_interval=Interval(value, value))
    text = _plot.tradeoff(dataclasses.replace(result, best=broken)).text
    assert "Not drawn: 1 candidate " in text
    assert "nan" not in text
    assert "inf" not in text.replace("infeasible", "")


def test_without_memory_figures_there_is_a_sentence_instead() -> None:
    result = samples.without_intervals()
    result = dataclasses.replace(result, goal=dataclasses.replace(result.goal, minimize="memory"))
    assert "No candidate has finite figures" in _plot.tradeoff(result).text


def test_without_intervals_there_are_no_drop_whiskers() -> None:
    assert "95 % interval" in _plot.tradeoff(samples.met()).text
    text = _plot.tradeoff(samples.without_intervals()).text
    assert "95 % interval" not in text
    assert "whisker" not in text


@pytest.mark.parametrize("drop", [0.0, 0.0001, 0.5, 0.999])
def test_any_goal_has_its_line_inside_the_picture(drop: float) -> None:
    result = samples.met(9)
    result = dataclasses.replace(result, goal=dataclasses.replace(result.goal, max_drop=drop))
    assert 0 < limit(result) < 100


def test_thousands_of_trials_stay_within_the_budget_and_are_counted() -> None:
    result = samples.met(3000)
    text = _plot.tradeoff(result).text
    shown = len(page.read(text).with_class("spot"))
    assert shown < len(_view.rows(result))
    assert f"Not drawn: {len(_view.rows(result)) - shown:,} candidates" in text
    assert len(text.encode()) < 2.5 * _plot.BUDGET


def test_the_best_is_drawn_over_the_others() -> None:
    drawn = [about["class"] for about in page.read(_plot.tradeoff(samples.met(60)).text).with_class("mark")]
    inside = drawn[: drawn.index("mark original") + 1]  # the legend comes after the drawing
    assert inside[-2:] == ["mark best", "mark original"]


def test_the_stairs_join_the_points_that_no_other_beats() -> None:
    result = samples.met()
    places = spots(result)
    read = page.read(_plot.tradeoff(result).text)
    steps = [
        tuple(float((line[key] or "")[:-1]) for key in ("x1", "y1", "x2", "y2"))
        for line in read.with_class("stairs")
    ]
    told = {
        places[f"{_view.role_name(row.role, result)}: {row.measured.name} on {row.measured.runtime}"]
        for row in _view.rows(result)
        if row.role != "other"
    }
    kept = {p for p in told if not any(q[0] >= p[0] and q[1] <= p[1] and q != p for q in told)}
    assert len(kept) > 3
    assert len(steps) == 2 * (len(kept) - 1)
    assert kept == {step[:2] for step in steps[::2]} | {step[2:] for step in steps[1::2]}
