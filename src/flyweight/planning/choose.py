"""Which candidate wins: the gain in what the goal minimizes, the front, the best, the nearest when nothing is met."""

from __future__ import annotations

from collections.abc import Sequence

from flyweight.records import Goal, Measured, Objective

TIE = 1.02
"""Gains closer than this are equal; the other figures decide then."""
NOISE = 1.05
"""Speeds whose intervals overlap are equal too, if they are closer than this; sizes closer than this are."""


def gain(objective: Objective, original: Measured, speedup: float, size: int, memory: int | None) -> float:
    """How many times better than the original a candidate is in the objective; 0 when it is not known."""
    if objective == "latency":
        return speedup
    if objective == "size":
        return original.bytes / max(size, 1)
    if memory is None or original.peak_memory_bytes is None:
        return 0.0
    return original.peak_memory_bytes / max(memory, 1)


def gain_of(candidate: Measured, goal: Goal, original: Measured) -> float:
    """The gain of a measured candidate."""
    return gain(goal.minimize, original, candidate.speedup, candidate.bytes, candidate.peak_memory_bytes)


def improves(candidate: Measured, goal: Goal, original: Measured) -> bool:
    """Whether the objective is really smaller; for latency its interval must say so.

    Else it must not be slower either, unless the goal names the runtime: then the speed there is told, and no condition.
    """
    if goal.minimize == "latency":
        return candidate.speedup_interval.low > 1
    fast = not speed_counts(goal) or candidate.speedup_interval.high >= 1
    return fast and gain_of(candidate, goal, original) > 1


def speed_counts(goal: Goal) -> bool:
    """Whether what is slower than the original is no answer: where a model runs is the search's to choose, or the goal's."""
    return goal.minimize == "latency" or goal.runtime == "auto"


def best(found: Sequence[Measured], goal: Goal, original: Measured) -> Measured | None:
    """The candidate within the bound with the largest gain.

    Gains that the timing cannot tell apart are ties. A drop is given up for good, a tie's speed is luck: so among ties of
    about the same size the least drop wins, and the largest gain among drops that are not surely larger. What is much
    smaller wins before that, since every drop here is one that the goal allows.
    """
    able = [m for m in found if m.verdict == "met" and improves(m, goal, original)]
    if not able:
        return None
    top = max(able, key=lambda m: gain_of(m, goal, original))
    ties = [m for m in able if _ties(m, top, goal, original)]
    first = max(ties, key=lambda m: m.speedup * original.bytes / m.bytes)
    alike = front([m for m in ties if m.bytes <= first.bytes * NOISE], goal, original)
    least = min(m.drop for m in alike)
    closest = [m for m in alike if (m.drop_interval.low if m.drop_interval else m.drop) <= least]
    return max(closest, key=lambda m: gain_of(m, goal, original))


def _ties(candidate: Measured, top: Measured, goal: Goal, original: Measured) -> bool:
    """Whether a gain is equal to the largest: nearly, or as far as its timing tells."""
    behind = gain_of(top, goal, original) / gain_of(candidate, goal, original)
    unsure = candidate.speedup_interval.high >= top.speedup_interval.low
    return behind <= TIE or (goal.minimize == "latency" and unsure and behind <= NOISE)


def nearest(found: Sequence[Measured], goal: Goal, original: Measured) -> Measured:
    """When nothing meets the goal: the improving candidate whose drop exceeds the bound least, else the original."""
    able = [m for m in found if improves(m, goal, original)]
    return min(able, key=lambda m: (worst_drop(m), -gain_of(m, goal, original)), default=original)


def front(found: Sequence[Measured], goal: Goal, original: Measured) -> tuple[Measured, ...]:
    """The candidates that no other beats in gain and drop at once, largest gain first."""
    ordered = sorted(found, key=lambda m: (-gain_of(m, goal, original), m.drop))
    kept: list[Measured] = []
    for candidate in ordered:
        if not kept or candidate.drop < min(m.drop for m in kept):
            kept.append(candidate)
    return tuple(kept)


def worst_drop(candidate: Measured) -> float:
    """The upper end of a drop's interval; the drop itself where there is none."""
    return candidate.drop if candidate.drop_interval is None else candidate.drop_interval.high
