"""The trade-off picture: what is gained against the original, over what is lost of the score.

The drawing is as wide as the page allows while its text and marks keep their size: positions are percentages. Every
candidate has a mark of its own shape, and a transparent spot over it that shows its name when hovered or focused.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from flyweight.records import Interval, Measured, Objective, Result
from flyweight.report import _view, _words
from flyweight.report._markup import Markup, element, join, within
from flyweight.report._scale import Axis, linear, logarithmic

BUDGET = 200_000
AXIS_NAMES: dict[Objective, str] = {
    "latency": "times faster than the original",
    "size": "times smaller than the original",
    "memory": "times less memory than the original",
}
SHAPES: dict[str, str] = {
    "original": "M0-6.5 6.5 0 0 6.5-6.5 0z",
    "best": "M0-11 2.7-3.8 10.5-3.4 4.4 1.5 6.5 8.9 0 4.6-6.5 8.9-4.4 1.5-10.5-3.4-2.7-3.8z",
    "front": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "other": "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
    "broken": "M-3.5-3.5 3.5 3.5M-3.5 3.5 3.5-3.5",
}


@dataclass(frozen=True)
class Point:
    """A candidate's place in the picture."""

    row: _view.Row
    gain: float
    drop: float


def tradeoff(result: Result) -> Markup:
    """The picture with its legend, and a sentence on what could not be drawn."""
    points = _points(result)
    if not points:
        return element("p", {"class": "quiet"}, "No candidate has finite figures for this picture.")
    x, y = _gain_axis(points, result), _drop_axis(points, result.goal.max_drop)
    spots, shown = within((_spot(point, x, y, result) for point in points), BUDGET)
    drawing = element(
        "svg",
        {"aria-hidden": "true"},
        _frame(x, y, result),
        _front(points, x, y),
        *(_drawn(point, x, y, result) for point in reversed(points[:shown])),  # the best is drawn over the others
        *(_name(point, points, x, y, result) for point in points if point.row.role in ("original", "best")),
    )
    return element(
        "figure",
        {"class": "plot"},
        element("div", {"class": "area"}, drawing, spots),
        _legend(points, result),
        _not_drawn(len(_view.rows(result)) - shown, result.goal.minimize),
    )


def gauge(result: Result) -> Markup:
    """The drop of the best with its interval beside the bound, on one line."""
    drop, limit, ends = result.best.drop, result.goal.max_drop, _ends(result.best.drop_interval)
    if not math.isfinite(drop):
        return join(())
    low, high = min(0.0, drop, *ends), max(limit, drop, *ends, 1e-4)
    axis = linear(low - 0.08 * (high - low), high + 0.15 * (high - low), 4)
    at = axis.at(drop)
    parts = [
        _rect(_pc(axis.at(limit)), "0", _pc(100 - axis.at(limit)), "44", "beyond"),
        _line(axis.at(0), 0, axis.at(0), 100, "one"),
        _line(axis.at(limit), 0, axis.at(limit), 100, "limit"),
    ]
    parts.append(_text(_pc(axis.at(limit)), "0", "goal", "limit-name x", dy="-6"))
    parts += [_text(_pc(axis.at(tick)), "44", _percent(tick), "tick x", dy="18") for tick in axis.ticks]
    if ends:
        parts.append(_line(axis.at(min(ends)), 50, axis.at(max(ends)), 50, "whisker best"))
    parts.append(element("svg", {"x": _pc(at), "y": "50%", "class": "mark best"}, _path("best")))
    return element("svg", {"class": "gauge", "role": "img", "aria-label": "The drop beside the goal"}, *parts)


def mark(shape: str) -> Markup:
    """The small picture of a candidate's role, to tie tables and legend to the plot."""
    return element(
        "svg", {"class": f"mark {shape}", "viewBox": "-10 -10 20 20", "aria-hidden": "true"}, _path(shape)
    )


def shape(row: _view.Row) -> str:
    """The mark's name: the role, but "broken" for another trial that breaks the goal."""
    return "broken" if row.role == "other" and row.measured.verdict == "broken" else row.role


def _points(result: Result) -> list[Point]:
    found = []
    for row in _view.rows(result):
        gain = _view.factor(result, row.measured, result.goal.minimize)
        if gain is not None and 0 < gain < math.inf and math.isfinite(row.measured.drop):
            found.append(Point(row, gain, row.measured.drop))
    return found


def _gain_axis(points: list[Point], result: Result) -> Axis:
    gains = [point.gain for point in points]
    if result.goal.minimize == "latency":
        gains += [end for p in points if p.row.role != "other" for end in _ends(p.row.measured.speedup_interval)]
    low, high = min(1.0, *gains), max(1.0, *gains)
    room = max((high / low) ** 0.06, 1.02)
    return logarithmic(low / room, high * room)


def _drop_axis(points: list[Point], max_drop: float) -> Axis:
    """From a little above the best score to a few times the bound; what is worse sits at the lower edge."""
    told = [p for p in points if p.row.role in ("original", "best")]
    ends = [end for p in told for end in (p.drop, *_ends(p.row.measured.drop_interval))]
    reach = max(2.5 * max_drop, 1.1 * max(ends), 0.002)
    reach = max(reach, *(1.05 * p.drop for p in points if p.row.role == "front" and p.drop < 2 * reach), 0)
    low = min(0.0, *ends, *(p.drop for p in points if p.drop > -reach))
    return linear(max(low, -3 * reach) - 0.08 * reach, reach)


def _ends(interval: Interval | None) -> list[float]:
    return [] if interval is None else [end for end in (interval.low, interval.high) if 0 < abs(end) < math.inf]


def _frame(x: Axis, y: Axis, result: Result) -> Markup:
    limit = y.at(result.goal.max_drop)
    parts = [_rect("0", _pc(limit), "100%", _pc(100 - limit), "beyond")]
    for tick in x.ticks:
        parts.append(_line(x.at(tick), 0, x.at(tick), 100, "one" if math.isclose(tick, 1) else "grid"))
        parts.append(_text(_pc(x.at(tick)), "100%", f"{tick:.4g}×", "tick x", dy="18"))
    for tick in y.ticks:
        parts.append(_line(0, y.at(tick), 100, y.at(tick), "grid"))
        parts.append(_text("0", _pc(y.at(tick)), _percent(tick), "tick y", dx="-8", dy="4"))
    parts.append(_line(0, limit, 100, limit, "limit"))
    label = f"goal: a drop of at most {_words.bound(result.goal.max_drop)}"
    parts.append(_text("0", _pc(limit), label, "limit-name", dx="8", dy="17"))
    parts.append(_text("50%", "100%", AXIS_NAMES[result.goal.minimize], "axis x", dy="38"))
    parts.append(_text("0", "0", "drop of the score, downwards", "axis y", dx="-46", dy="-12"))
    return join(parts)


def _front(points: list[Point], x: Axis, y: Axis) -> Markup:
    """The stairs through the points that no other beats: what a gain costs at least."""
    stairs = sorted((p for p in points if p.row.role != "other"), key=lambda p: (p.gain, -p.drop))
    best: list[Point] = []
    for point in reversed(stairs):
        if not best or point.drop < best[-1].drop:
            best.append(point)
    best.reverse()
    parts = []
    for left, right in itertools.pairwise(best):
        parts.append(_line(x.at(left.gain), y.at(left.drop), x.at(left.gain), y.at(right.drop), "stairs"))
        parts.append(_line(x.at(left.gain), y.at(right.drop), x.at(right.gain), y.at(right.drop), "stairs"))
    return join(parts)


def _drawn(point: Point, x: Axis, y: Axis, result: Result) -> Markup:
    left, top, role = x.at(point.gain), y.at(point.drop), point.row.role
    parts = []
    if point.row.measured.drop_interval is not None and y.holds(point.drop):
        ends = point.row.measured.drop_interval
        parts.append(_line(left, y.at(ends.low), left, y.at(ends.high), f"whisker {role}"))
    if role != "other" and result.goal.minimize == "latency" and y.holds(point.drop):
        ends = point.row.measured.speedup_interval
        parts.append(_line(x.at(ends.low), top, x.at(ends.high), top, f"whisker {role}"))
    figure = _path(shape(point.row)) if y.holds(point.drop) else _off_scale(point, y)
    parts.append(element("svg", {"x": _pc(left), "y": _pc(top), "class": f"mark {shape(point.row)}"}, figure))
    return join(parts)


def _name(point: Point, points: list[Point], x: Axis, y: Axis, result: Result) -> Markup:
    """The point's role beside it, in the corner with the fewest other points."""
    left, top = x.at(point.gain), y.at(point.drop)
    places = [(x.at(p.gain) - left, y.at(p.drop) - top) for p in points if p is not point]

    def crowd(corner: tuple[int, int]) -> int:
        outside = not (0 < left + 12 * corner[0] < 100 and 0 < top + 8 * corner[1] < 100)
        near = (-1 < dx * corner[0] < 18 and -3 < dy * corner[1] < 11 for dx, dy in places)
        return sum(near) + 100 * outside

    right, below = min(((1, -1), (1, 1), (-1, -1), (-1, 1)), key=crowd)
    name = _view.role_name(point.row.role, result)
    kind = "name" if right > 0 else "name end"
    return _text(_pc(left), _pc(top), name, kind, dx=str(12 * right), dy="21" if below > 0 else "-11")


def _off_scale(point: Point, y: Axis) -> Markup:
    down = point.drop > y.high
    return element("path", {"d": "M-5-8h10L0 0z" if down else "M-5 8h10L0 0z"})


def _spot(point: Point, x: Axis, y: Axis, result: Result) -> Markup:
    left, top = x.at(point.gain), y.at(point.drop)
    place = f"{'right' if left > 66 else 'left' if left < 33 else 'middle'} {'below' if top < 40 else 'above'}"
    lines = _told(point.row.measured, result)
    return element(
        "span",
        {
            "class": f"spot {point.row.role} {place}",
            "style": f"left:{_pc(left)};top:{_pc(top)}",
            "tabindex": "0",
            "role": "img",
            "aria-label": f"{_view.role_name(point.row.role, result)}: {'; '.join(lines)}",
        },
        element("span", {"class": "tip"}, element("b", {}, lines[0]), *(element("i", {}, line) for line in lines[1:])),
    )


def _told(measured: Measured, result: Result) -> list[str]:
    """A candidate in a few lines: name, gain, drop, size."""
    gain, word = _words.compared(_view.factor(result, measured, result.goal.minimize), result.goal.minimize)
    between = _words.span(measured.drop_interval, _words.percent)
    return [
        f"{_words.one_line(measured.name, 90)} on {_words.one_line(measured.runtime, 30)}",
        f"{gain} {word}",
        f"drop {_words.percent(measured.drop)}" + (f" ({between})" if between else ""),
        f"{_words.milliseconds(measured.latency_ms)}, {_words.size(measured.bytes)}, {measured.verdict}",
    ]


def _legend(points: list[Point], result: Result) -> Markup:
    shown = {shape(point.row) for point in points}
    names = {
        "original": "original",
        "best": "recommended" if result.status == "met" else "nearest to the goal",
        "front": "alternative that no other beats in both",
        "other": "other trial",
        "broken": "other trial that breaks the goal",
    }
    items = [element("li", {}, mark(key), name) for key, name in names.items() if key in shown]
    if any(point.row.measured.drop_interval for point in points):
        items.append(element("li", {}, element("span", {"class": "bar"}), "95 % interval"))
    if any(not _drop_axis(points, result.goal.max_drop).holds(point.drop) for point in points):
        items.append(element("li", {}, _triangle(), "beyond the edge"))
    return element("figcaption", {}, element("ul", {"class": "legend"}, *items))


def _triangle() -> Markup:
    path = element("path", {"d": "M-5-5h10L0 4z"})
    return element("svg", {"class": "mark other", "viewBox": "-10 -10 20 20", "aria-hidden": "true"}, path)


def _not_drawn(number: int, objective: Objective) -> Markup:
    if number == 0:
        return join(())
    why = f"no finite figure for {objective} and drop, or no room"
    return element("p", {"class": "quiet"}, f"Not drawn: {_words.plural(number, 'candidate')} ({why}).")


def _path(name: str) -> Markup:
    return element("path", {"d": SHAPES[name]})


def _line(x1: float, y1: float, x2: float, y2: float, name: str) -> Markup:
    return element("line", {"x1": _pc(x1), "y1": _pc(y1), "x2": _pc(x2), "y2": _pc(y2), "class": name})


def _rect(x: str, y: str, width: str, height: str, name: str) -> Markup:
    return element("rect", {"x": x, "y": y, "width": width, "height": height, "class": name})


def _text(x: str, y: str, text: str, name: str, dx: str = "0", dy: str = "0") -> Markup:
    return element("text", {"x": x, "y": y, "dx": dx, "dy": dy, "class": name}, text)


def _percent(fraction: float) -> str:
    return _words.bound(round(fraction, 9)).replace("-", "−")


def _pc(value: float) -> str:
    return f"{value:.2f}%"
