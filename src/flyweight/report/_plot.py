"""The trade-off picture: what is gained against the original, over what is lost of the score.

Over every candidate's mark lies a transparent spot that shows the candidate's name when it is hovered or focused,
by style alone. What lies far beyond the goal sits at the picture's edge, as a triangle.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from flyweight.records import Measured, Objective, Result
from flyweight.report import _draw, _scale, _view, _words
from flyweight.report._markup import Markup, element, join, within

BUDGET = 200_000
CORNERS = ((1, -1), (1, 1), (-1, -1), (-1, 1))
AXIS_NAMES: dict[Objective, str] = {
    "latency": "times faster than the original",
    "size": "times smaller than the original",
    "memory": "times less memory than the original",
}


@dataclass(frozen=True)
class Point:
    """A candidate's place in the picture."""

    row: _view.Row
    left: float
    """Percent of the width."""
    top: float
    """Percent of the height."""
    inside: bool
    """Whether the drop lies on the axis; if not, the point sits at the edge."""


@dataclass(frozen=True)
class Axes:
    """How many times better to the right, and the drop downwards."""

    gain: _scale.Axis
    drop: _scale.Axis


def tradeoff(result: Result) -> Markup:
    """The picture with its legend, and a sentence on what could not be drawn."""
    rows = [row for row in _view.rows(result) if _drawable(row, result)]
    if not rows:
        return element("p", {"class": "quiet"}, "No candidate has finite figures for this picture.")
    axes = Axes(_gain_axis(rows, result), _drop_axis(rows, result.goal.max_drop))
    points = [_point(row, axes, result) for row in rows]
    spots, shown = within((_spot(point, result) for point in points), BUDGET)
    points = points[:shown]
    drawing = element(
        "svg",
        {"aria-hidden": "true"},
        _frame(axes, result),
        _stairs(points),
        *(_drawn(point, axes, result) for point in reversed(points)),  # so that the best lies on top
        *(_name(point, points, result) for point in points if point.row.role in ("original", "best")),
    )
    return element(
        "figure",
        {"class": "plot"},
        element("div", {"class": "area"}, drawing, spots),
        _legend(points, result),
        _not_drawn(len(_view.rows(result)) - shown, result.goal.minimize),
    )


def _drawable(row: _view.Row, result: Result) -> bool:
    gain = _gain(row, result)
    return gain is not None and _scale.drawable(gain) and gain > 1e-6 and _scale.drawable(row.measured.drop)


def _gain(row: _view.Row, result: Result) -> float | None:
    return _view.factor(result, row.measured, result.goal.minimize)


def _gain_axis(rows: list[_view.Row], result: Result) -> _scale.Axis:
    gains = [gain for row in rows if (gain := _gain(row, result)) is not None]
    if result.goal.minimize == "latency":
        told = (row for row in rows if row.role != "other")
        gains += [end for row in told for end in _scale.ends(row.measured.speedup_interval) if end > 1e-6]
    low, high = min(1.0, *gains), max(1.0, *gains)
    room = max((high / low) ** 0.06, 1.02)
    return _scale.logarithmic(low / room, high * room)


def _drop_axis(rows: list[_view.Row], max_drop: float) -> _scale.Axis:
    """From a little above the best score to a few times the goal, or as far as the best and most of the front reach."""
    told = [row.measured for row in rows if row.role in ("original", "best")]
    ends = [end for m in told for end in (m.drop, *_scale.ends(m.drop_interval))]
    reach = max(2.5 * max_drop, 1.1 * max(ends), 0.002)
    front = (1.05 * row.measured.drop for row in rows if row.role == "front")
    reach = max([reach, *(drop for drop in front if drop < 2 * reach)])
    low = min([0.0, *ends, *(row.measured.drop for row in rows if row.measured.drop > -reach)])
    return _scale.linear(max(low, -3 * reach) - 0.08 * reach, reach)


def _point(row: _view.Row, axes: Axes, result: Result) -> Point:
    drop = row.measured.drop
    return Point(row, axes.gain.at(_gain(row, result) or 1.0), axes.drop.at(drop), axes.drop.holds(drop))


def _frame(axes: Axes, result: Result) -> Markup:
    limit = axes.drop.at(result.goal.max_drop)
    parts = [_draw.area(0, limit, "beyond")]
    for tick in axes.gain.ticks:
        left = axes.gain.at(tick)
        parts.append(_draw.line((left, 0), (left, 100), "one" if math.isclose(tick, 1) else "grid"))
        parts.append(_draw.text(left, 100, f"{tick:.4g}×", "tick x", (0, 18)))
    for tick in axes.drop.ticks:
        top = axes.drop.at(tick)
        parts.append(_draw.line((0, top), (100, top), "grid"))
        parts.append(_draw.text(0, top, _words.tick(tick), "tick y", (-8, 4)))
    goal = f"goal: a drop of at most {_words.bound(result.goal.max_drop)}"
    parts.append(_draw.line((0, limit), (100, limit), "limit"))
    parts.append(_draw.text(0, limit, goal, "limit-name", (8, 17)))
    parts.append(_draw.text(50, 100, AXIS_NAMES[result.goal.minimize], "axis x", (0, 38)))
    parts.append(_draw.text(0, 0, "drop of the score, downwards", "axis y", (-46, -12)))
    return join(parts)


def _stairs(points: list[Point]) -> Markup:
    """The stairs through the points that no other beats: the least drop at which a gain was found."""
    kept: list[Point] = []
    told = [point for point in points if point.row.role != "other"]
    for point in sorted(told, key=lambda point: (-point.left, point.top)):
        if not kept or point.top < kept[-1].top:
            kept.append(point)
    parts = []
    for right, left in itertools.pairwise(kept):
        parts.append(_draw.line((left.left, left.top), (left.left, right.top), "stairs"))
        parts.append(_draw.line((left.left, right.top), (right.left, right.top), "stairs"))
    return join(parts)


def _drawn(point: Point, axes: Axes, result: Result) -> Markup:
    """The mark with its intervals; at the edge a triangle without them."""
    m, role, name = point.row.measured, point.row.role, _draw.shape(point.row)
    if not point.inside:
        path = _draw.BELOW if point.top > 50 else _draw.ABOVE
        return _draw.mark_at(point.left, point.top, "other" if name == "broken" else name, path)
    parts = []
    if drops := _scale.ends(m.drop_interval):
        low, high = axes.drop.at(min(drops)), axes.drop.at(max(drops))
        parts.append(_draw.line((point.left, low), (point.left, high), f"whisker {role}"))
    gains = _scale.ends(m.speedup_interval)
    if gains and role in ("best", "front") and result.goal.minimize == "latency":
        low, high = axes.gain.at(min(gains)), axes.gain.at(max(gains))
        parts.append(_draw.line((low, point.top), (high, point.top), f"whisker {role}"))
    return join((*parts, _draw.mark_at(point.left, point.top, name)))


def _name(point: Point, points: list[Point], result: Result) -> Markup:
    """The point's role beside it, in the corner with the fewest other points."""
    others = [(p.left - point.left, p.top - point.top) for p in points if p is not point]

    def crowd(corner: tuple[int, int]) -> int:
        right, below = corner
        outside = not (0 < point.left + 12 * right < 100 and 0 < point.top + 8 * below < 100)
        return sum(-1 < dx * right < 18 and -3 < dy * below < 11 for dx, dy in others) + 1000 * outside

    right, below = min(CORNERS, key=crowd)
    kind = "name" if right > 0 else "name end"
    shift = (12 * right, 21 if below > 0 else -11)
    return _draw.text(point.left, point.top, _view.role_name(point.row.role, result), kind, shift)


def _spot(point: Point, result: Result) -> Markup:
    side = "right" if point.left > 66 else "left" if point.left < 33 else "middle"
    lines = _told(point.row.measured, result)
    about = {
        "class": f"spot {point.row.role} {side} {'below' if point.top < 40 else 'above'}",
        "style": f"left:{_draw.pc(point.left)};top:{_draw.pc(point.top)}",
        "tabindex": "0",
        "role": "img",
        "aria-label": f"{_view.role_name(point.row.role, result)}: {'; '.join(lines)}",
    }
    figures = (element("i", {}, line) for line in lines[1:])
    return element("span", about, element("span", {"class": "tip"}, element("b", {}, lines[0]), *figures))


def _told(measured: Measured, result: Result) -> list[str]:
    """A candidate in a few lines: its name, then its figures."""
    gain, word = _words.compared(_view.factor(result, measured, result.goal.minimize), result.goal.minimize)
    interval = _words.span(measured.drop_interval, _words.percent)
    return [
        f"{_words.one_line(measured.name, 90)} on {_words.one_line(measured.runtime, 30)}",
        f"{gain} {word}",
        f"drop {_words.percent(measured.drop)}" + (f" ({interval})" if interval else ""),
        f"{_words.milliseconds(measured.latency_ms)}, {_words.size(measured.bytes)}, {measured.verdict}",
    ]


def _legend(points: list[Point], result: Result) -> Markup:
    names: dict[_draw.Shape, str] = {
        "original": "original",
        "best": "recommended" if result.status == "met" else "nearest to the goal",
        "front": "alternative that no other beats in both",
        "other": "other trial",
        "broken": "other trial that breaks the goal",
    }
    shown = {_draw.shape(point.row) for point in points}
    items = [element("li", {}, _draw.mark(name), words) for name, words in names.items() if name in shown]
    if any(point.row.measured.drop_interval for point in points):
        items.append(element("li", {}, element("span", {"class": "bar"}), "95 % interval"))
    if not all(point.inside for point in points):
        items.append(element("li", {}, _draw.mark("other", "M-5-5h10L0 4z"), "beyond the edge"))
    return element("figcaption", {}, element("ul", {"class": "legend"}, *items))


def _not_drawn(number: int, objective: Objective) -> Markup:
    if number == 0:
        return join(())
    why = f"no finite figure for {objective} and drop, or no room"
    return element("p", {"class": "quiet"}, f"Not drawn: {_words.plural(number, 'candidate')} ({why}).")
