"""Drawing primitives: lines, texts and the marks that tell the candidates apart by shape, not by colour alone.

Places along a drawing are percentages, so that it can be as wide as the page while text and marks keep their size.
"""

from __future__ import annotations

from typing import Literal

from flyweight.report import _view
from flyweight.report._markup import Markup, element

Shape = Literal["original", "best", "front", "other", "broken"]
SHAPES: dict[Shape, str] = {
    "original": "M0-6.5 6.5 0 0 6.5-6.5 0z",
    "best": "M0-11 2.7-3.8 10.5-3.4 4.4 1.5 6.5 8.9 0 4.6-6.5 8.9-4.4 1.5-10.5-3.4-2.7-3.8z",
    "front": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "other": "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
    "broken": "M-3.5-3.5 3.5 3.5M-3.5 3.5 3.5-3.5",
}
BELOW = "M-5-8h10L0 0z"
ABOVE = "M-5 8h10L0 0z"


def shape(row: _view.Row) -> Shape:
    """The mark's name: the role, but "broken" for another trial that breaks the goal."""
    return "broken" if row.role == "other" and row.measured.verdict == "broken" else row.role


def mark(name: Shape, path: str = "") -> Markup:
    """A mark as a small picture of its own, to tie tables and legend to the plot."""
    place = {"class": f"mark {name}", "viewBox": "-10 -10 20 20", "aria-hidden": "true"}
    return element("svg", place, element("path", {"d": path or SHAPES[name]}))


def mark_at(left: float, top: float, name: Shape, path: str = "") -> Markup:
    """A mark inside a drawing, centred on a place given in percent."""
    place = {"x": pc(left), "y": pc(top), "class": f"mark {name}"}
    return element("svg", place, element("path", {"d": path or SHAPES[name]}))


def line(start: tuple[float, float], end: tuple[float, float], name: str) -> Markup:
    """A straight line between two places (left, top) in percent."""
    (x1, y1), (x2, y2) = start, end
    return element("line", {"x1": pc(x1), "y1": pc(y1), "x2": pc(x2), "y2": pc(y2), "class": name})


def area(left: float, top: float, name: str) -> Markup:
    """The rectangle from a place in percent to the drawing's lower right corner."""
    place = {"x": pc(left), "y": pc(top), "width": pc(100 - left), "height": pc(100 - top)}
    return element("rect", {**place, "class": name})


def text(left: float, top: float, words: str, name: str, shift: tuple[float, float] = (0, 0)) -> Markup:
    """Words at a place in percent, shifted by pixels."""
    dx, dy = shift
    place = {"x": pc(left), "y": pc(top), "dx": f"{dx:g}", "dy": f"{dy:g}", "class": name}
    return element("text", place, words)


def pc(value: float) -> str:
    """A number in percent, as SVG and CSS write it."""
    return f"{value:.2f}%"
