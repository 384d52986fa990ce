"""Axes of the pictures: where a value lies, in percent of the drawing's width or height, and where the ticks go."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flyweight.records import Interval

LARGEST = 1e6
"""Beyond this a value is taken for a defect of the measurement and not drawn."""


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from low to high."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value in percent of the axis, in [0, 100]; what lies outside sits at the nearer end."""
        low, high, value = (math.log(max(x, 1e-300)) if self.log else x for x in (self.low, self.high, value))
        return 100 * min(1.0, max(0.0, (value - low) / (high - low)))

    def holds(self, value: float) -> bool:
        """Whether the value lies on the axis."""
        return self.low <= value <= self.high


def linear(low: float, high: float, count: int = 6) -> Axis:
    """A linear axis over [low, high] with at most `count` round ticks; equal ends are set apart."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return Axis(low, high, tuple(step * index for index in range(first, last + 1)))


def logarithmic(low: float, high: float, count: int = 6) -> Axis:
    """A logarithmic axis over [low, high], both above 0, with at most about `count` round ticks."""
    if high / low < 3:
        return Axis(low, high, linear(low, high, count).ticks, log=True)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = tuple(t for t in (m * 10.0**k for k in decades for m in mantissas) if low <= t <= high)
        if len(ticks) <= count:
            return Axis(low, high, ticks, log=True)
    return Axis(low, high, ticks[:: math.ceil(len(ticks) / count)], log=True)


def drawable(value: float) -> bool:
    """Whether a value is finite and of a size that can be drawn beside others."""
    return math.isfinite(value) and abs(value) <= LARGEST


def ends(interval: Interval | None) -> list[float]:
    """Both ends of an interval that can be drawn; none otherwise."""
    if interval is None or not (drawable(interval.low) and drawable(interval.high)):
        return []
    return [interval.low, interval.high]
