"""How many bits each layer gets: the least damage that a budget of bytes buys.

A knapsack in which every layer takes one of its levels. The steps from level to level along the lower convex hull of a
layer's damage over bytes are taken in the order of what a byte saves, as in Shoham & Gersho, "Efficient bit allocation for
an arbitrary set of quantizers" (IEEE Transactions on Acoustics, Speech and Signal Processing, 1988): the best choice there
is for the budgets at which a step ends, and less than one step away from it between them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flyweight.records import Step


@dataclass(frozen=True)
class Level:
    """One way to treat a layer, with what it costs."""

    step: Step
    bytes: int
    damage: float
    """What it adds to the model's loss, by prediction."""


def allocate(levels: Mapping[str, Sequence[Level]], budget: float) -> dict[str, Level] | None:
    """The level of each layer with the least sum of damages within a budget of bytes; None when the smallest do not fit.

    It is never worse than any levels that have the same place in all layers and fit. Damages that are not finite are avoided
    where that is possible.
    """
    chosen = {name: min(some, key=_size) for name, some in levels.items()}
    left = budget - sum(level.bytes for level in chosen.values())
    if left < 0:
        return None
    steps = [(*pair, name) for name, some in levels.items() for pair in itertools.pairwise(_hull(some))]
    for smaller, larger, name in sorted(steps, key=lambda step: _saved(step[0], step[1]), reverse=True):
        more = larger.bytes - chosen[name].bytes
        if chosen[name] is smaller and more <= left:
            chosen[name], left = larger, left - more
    return min((chosen, *_uniform(levels, budget)), key=_damage)


def smallest(levels: Mapping[str, Sequence[Level]], damage: float) -> dict[str, Level]:
    """The level of each layer with few bytes and a sum of damages of at most `damage`; with the least where that is less."""
    low, high = (sum(end(level.bytes for level in some) for some in levels.values()) for end in (min, max))
    found = allocate(levels, high) or {}
    while low < high:
        middle = (low + high) // 2
        choice = allocate(levels, middle)
        if choice is not None and _damage(choice) <= damage:
            found, high = choice, middle
        else:
            low = middle + 1
    return found


def _hull(levels: Sequence[Level]) -> list[Level]:
    """The levels on the lower convex hull of damage over bytes, the smallest first."""
    found: list[Level] = []
    for level in sorted(levels, key=_size):
        if found and not level.damage < found[-1].damage:
            continue
        while len(found) > 1 and _saved(found[-1], level) >= _saved(found[-2], found[-1]):
            found.pop()
        if found and found[-1].bytes == level.bytes:
            found.pop()
        found.append(level)
    return found


def _uniform(levels: Mapping[str, Sequence[Level]], budget: float) -> list[dict[str, Level]]:
    """The choices of one place for all layers that fit; none where layers have different numbers of levels."""
    counts = {len(some) for some in levels.values()}
    if len(counts) != 1:
        return []
    every = ({name: some[place] for name, some in levels.items()} for place in range(counts.pop()))
    return [choice for choice in every if sum(level.bytes for level in choice.values()) <= budget]


def _saved(smaller: Level, larger: Level) -> float:
    """Damage saved by each further byte."""
    if math.isinf(smaller.damage):
        return math.inf
    return (smaller.damage - larger.damage) / max(larger.bytes - smaller.bytes, 1e-9)


def _size(level: Level) -> tuple[int, float]:
    return level.bytes, level.damage


def _damage(choice: Mapping[str, Level]) -> float:
    return math.fsum(level.damage for level in choice.values())
