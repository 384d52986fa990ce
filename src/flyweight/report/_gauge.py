"""The small picture of certainty: the drop of the best with its interval beside the goal, on one line."""

from __future__ import annotations

from flyweight.records import Result
from flyweight.report import _draw, _scale, _words
from flyweight.report._markup import Markup, element, join


def gauge(result: Result) -> Markup:
    """The picture; nothing when the drop cannot be drawn."""
    drop, limit = result.best.drop, result.goal.max_drop
    ends = _scale.ends(result.best.drop_interval)
    if not _scale.drawable(drop):
        return join(())
    low, high = min(0.0, drop, *ends), max(limit, drop, *ends, 1e-4)
    axis = _scale.linear(low - 0.08 * (high - low), high + 0.15 * (high - low), 4)
    at, goal, zero = axis.at(drop), axis.at(limit), axis.at(0)
    parts = [
        _draw.area(goal, 0, "beyond"),
        _draw.line((zero, 0), (zero, 100), "one"),
        _draw.line((goal, 0), (goal, 100), "limit"),
        _draw.text(goal, 0, "goal", "limit-name x", (0, -6)),
        *(_draw.text(axis.at(tick), 100, _words.tick(tick), "tick x", (0, 18)) for tick in axis.ticks),
    ]
    if ends:
        parts.append(_draw.line((axis.at(min(ends)), 50), (axis.at(max(ends)), 50), "whisker best"))
    told = {"class": "gauge", "role": "img", "aria-label": "the drop beside the goal"}
    return element("svg", told, *parts, _draw.mark_at(at, 50, "best"))
