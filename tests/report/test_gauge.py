from __future__ import annotations

import dataclasses
import math

from report import page, samples

from flyweight.records import Interval, Result
from flyweight.report import _gauge


def place(result: Result, name: str, side: str) -> float:
    return float((page.read(_gauge.gauge(result).text).with_class(name)[0][side] or "")[:-1])


def test_the_interval_lies_before_the_goal_when_it_is_within() -> None:
    result = samples.met()
    assert result.best.drop_interval is not None
    assert result.best.drop_interval.high < result.goal.max_drop
    assert place(result, "whisker", "x1") < place(result, "mark", "x") < place(result, "whisker", "x2")
    assert place(result, "whisker", "x2") < place(result, "limit", "x1")


def test_the_interval_lies_beyond_the_goal_when_it_is_broken() -> None:
    result = samples.infeasible()
    assert place(result, "limit", "x1") < place(result, "whisker", "x1")


def test_an_end_at_zero_is_drawn() -> None:
    result = samples.met()
    best = dataclasses.replace(result.best, drop=0.002, drop_interval=Interval(0.0, 0.004))
    result = dataclasses.replace(result, best=best)
    assert place(result, "whisker", "x1") == place(result, "one", "x1")


def test_no_interval_no_whisker_and_no_drop_no_picture() -> None:
    assert "whisker" not in _gauge.gauge(samples.without_intervals()).text
    result = samples.met()
    lost = dataclasses.replace(result, best=dataclasses.replace(result.best, drop=math.nan))
    assert _gauge.gauge(lost).text == ""
