"""The layer picture: one column per layer, its predicted damage on top and its choice in a lane below.

A lane per choice tells the choices apart by place, not by colour. Models of more than 400 layers share columns.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from flyweight.records import LayerChoice
from flyweight.report import _words
from flyweight.report._markup import Markup, element, join
from flyweight.report._scale import Axis

COLUMNS = 400
LANES = 8


@dataclass(frozen=True)
class Column:
    """Consecutive layers that share a place in the picture: one, unless there are more than COLUMNS."""

    layers: tuple[LayerChoice, ...]
    left: float
    """Percent of the drawing's width."""
    width: float
    """Percent of the drawing's width."""


@dataclass(frozen=True)
class Lane:
    """The layers with one choice, or with one of the rarer choices that share the last lane."""

    name: str
    choices: frozenset[str]
    layers: int


def strip(layers: Sequence[LayerChoice]) -> Markup:
    """The picture of all layers, in the model's order; nothing without layers."""
    if not layers:
        return join(())
    columns = _columns(layers)
    lanes = (_lane(lane, columns) for lane in _lanes(layers))
    return element("figure", {"class": "strip"}, _damage(columns), *lanes, _ends(layers))


def _columns(layers: Sequence[LayerChoice]) -> list[Column]:
    share = math.ceil(len(layers) / COLUMNS)
    parts = [tuple(layers[start : start + share]) for start in range(0, len(layers), share)]
    width = 100 / len(parts)
    return [Column(part, index * width, width) for index, part in enumerate(parts)]


def _lanes(layers: Sequence[LayerChoice]) -> list[Lane]:
    """The most frequent choices first; those that have no lane of their own share the last."""
    counts = Counter(layer.choice for layer in layers).most_common()
    own = counts if len(counts) <= LANES else counts[: LANES - 1]
    rest = counts[len(own) :]
    lanes = [Lane(choice, frozenset({choice}), number) for choice, number in own]
    if rest:
        name = _words.plural(len(rest), "other choice")
        lanes.append(Lane(name, frozenset(choice for choice, _ in rest), sum(number for _, number in rest)))
    return lanes


def _lane(lane: Lane, columns: Sequence[Column]) -> Markup:
    runs = itertools.groupby(
        columns, lambda column: any(layer.choice in lane.choices for layer in column.layers)
    )
    bars = [_run(list(run), lane) for inside, run in runs if inside]
    return _row(lane.name, _words.plural(lane.layers, "layer"), "lane", bars)


def _run(columns: list[Column], lane: Lane) -> Markup:
    first, last = columns[0], columns[-1]
    names = [layer.site for column in columns for layer in column.layers if layer.choice in lane.choices]
    told = names[0] if len(names) == 1 else f"{len(names)} layers, {_short(names[0])} to {_short(names[-1])}"
    return _bar(
        first.left, last.left + last.width - first.left, 0, 100, f"{_short(told, 160)}: {_short(lane.name)}"
    )


def _damage(columns: Sequence[Column]) -> Markup:
    """A bar per column on a logarithmic scale: the largest damage of its layers."""
    known = [worst for column in columns if (worst := _worst(column))]
    if not known:
        return element("p", {"class": "quiet"}, "No damage was predicted for single layers.")
    low, high = (
        10.0 ** math.floor(math.log10(min(known))),
        10.0 ** math.ceil(math.log10(max(known) * 1.001)),
    )
    axis = Axis(low, high, (), log=True)
    bars = [_damage_bar(column, axis) for column in columns]
    told = f"{low:g} to {high:g}, logarithmic".replace("e-0", "e-")
    return _row("predicted damage", told, "damage", bars)


def _damage_bar(column: Column, axis: Axis) -> Markup:
    worst = _worst(column)
    height = 0.0 if worst is None else max(2.0, axis.at(worst))
    names = _short(column.layers[0].site)
    if len(column.layers) > 1:
        names = f"{names} to {_short(column.layers[-1].site)}"
    told = "no damage predicted" if worst is None else f"damage {_words.damage(worst)}"
    return _bar(column.left, column.width * 0.86, 100 - height, height, f"{names}: {told}")


def _worst(column: Column) -> float | None:
    """The largest damage, within what an axis can show; None when none was predicted."""
    known = [
        layer.damage for layer in column.layers if layer.damage is not None and math.isfinite(layer.damage)
    ]
    if not known:
        return None
    return min(max(known), 1e30) if max(known) > 1e-30 else 0.0


def _ends(layers: Sequence[LayerChoice]) -> Markup:
    first, last = (element("span", {}, _short(layer.site, 40)) for layer in (layers[0], layers[-1]))
    return element(
        "div", {"class": "row foot"}, element("span", {}), element("div", {"class": "ends"}, first, last)
    )


def _row(name: str, note: str, kind: str, bars: list[Markup]) -> Markup:
    label = element("span", {"class": "label"}, _short(name), element("small", {}, note))
    return element("div", {"class": f"row {kind}"}, label, element("svg", {"aria-hidden": "true"}, *bars))


def _bar(left: float, width: float, top: float, height: float, told: str) -> Markup:
    place = {"x": f"{left:.2f}%", "y": f"{top:.1f}%", "width": f"{width:.2f}%", "height": f"{height:.1f}%"}
    return element("rect", place, element("title", {}, told))


def _short(name: str, limit: int = 80) -> str:
    return _words.one_line(name, limit)
