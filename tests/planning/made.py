"""Measurements, sites and surveys for the tests of planning and search; what a test does not name is like the original's."""

from __future__ import annotations

import dataclasses
from typing import Any

from flyweight.evaluation.bench import Survey
from flyweight.records import Goal, Interval, Measured, Plan, Site, Step

ORIGINAL = Measured(
    name="original",
    runtime="torch",
    plan=Plan(),
    score=1.0,
    score_interval=None,
    drop=0.0,
    drop_interval=Interval(0.0, 0.0),
    latency_ms=10.0,
    latency_interval=Interval(10.0, 10.0),
    speedup=1.0,
    speedup_interval=Interval(1.0, 1.0),
    bytes=1000,
    peak_memory_bytes=4000,
    verdict="met",
)


def measured(
    name: str, goal: Goal, *, speedup: float = 1.0, drop: float = 0.0, half: float = 0.0, **more: Any
) -> Measured:
    """A candidate with its verdict; half: of the drop's interval."""
    interval = Interval(drop - half, drop + half)
    verdict = (
        "met"
        if interval.high <= goal.max_drop
        else "broken"
        if interval.low > goal.max_drop
        else "unresolved"
    )
    made = dataclasses.replace(
        ORIGINAL,
        name=name,
        speedup=speedup,
        speedup_interval=Interval(speedup * 0.99, speedup * 1.01),
        latency_ms=10.0 / speedup,
        drop=drop,
        drop_interval=interval,
        verdict=verdict,
    )
    return dataclasses.replace(made, **more)


def survey(speedup: float = 1.0, size: int = 1000, failure: str = "") -> Survey:
    """A survey with one percent of uncertainty in the speed."""
    values: dict[str, Any] = {
        "speedup": speedup,
        "latency_ms": 10 / speedup,
        "bytes": size,
        "failure": failure,
    }
    ends = {"speedup_low": speedup * 0.99, "speedup_high": speedup * 1.01}
    known = {item.name for item in dataclasses.fields(Survey)}
    return Survey(**{name: value for name, value in {**values, **ends}.items() if name in known})


def site(name: str, *, macs: int = 100, size: int = 100, kind: Any = "linear") -> Site:
    """A linear layer unless said otherwise."""
    return Site(name=name, kind=kind, parameters=size // 4, bytes=size, macs=macs)


def steps(*names: str, method: str = "weight_only", **options: Any) -> dict[str, Step]:
    """One step at each of the sites."""
    return {name: Step(method, name, options) for name in names}
