"""Is it faster: two predictors timed in turn, so that a machine whose speed drifts treats both alike."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from flyweight.records import Interval

SECONDS = 4.0
"""Time for one race."""
_ROUNDS = (6, 30)
_BLOCK_SECONDS = 0.02


@dataclass(frozen=True)
class Race:
    """Latencies in milliseconds: medians over rounds with 95 % intervals; speedup = first / second, round by round."""

    first_ms: float
    first_interval: Interval
    second_ms: float
    second_interval: Interval
    speedup: float
    speedup_interval: Interval


def race(first: Callable[[], Any], second: Callable[[], Any], seconds: float = SECONDS) -> Race:
    """Time two functions in alternating blocks for about so many seconds, at least 6 rounds.

    Each block starts with a call that is not counted. The order within a round alternates.
    """
    calls = [_calls(run) for run in (first, second)]
    rounds: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(rounds) < _ROUNDS[0] or (len(rounds) < _ROUNDS[1] and time.perf_counter() - start < seconds):
        order = (0, 1) if len(rounds) % 2 == 0 else (1, 0)
        times = {which: _block((first, second)[which], calls[which]) for which in order}
        rounds.append((times[0], times[1]))
    one, two = ([1000 * pair[i] for pair in rounds] for i in (0, 1))
    ratios = [a / b for a, b in rounds]
    return Race(
        *(statistics.median(one), _interval(one)),
        *(statistics.median(two), _interval(two)),
        *(statistics.median(ratios), _interval(ratios)),
    )


def fastest_threads(run: Callable[[], Any], most: int) -> int:
    """1 or `most` threads, whichever lets PyTorch run the function faster; it is left with what it had."""
    times: dict[int, list[float]] = {count: [] for count in {1, most}}
    for _ in range(3):
        for count, seen in times.items():
            with threads(count):
                seen.append(_block(run, 2))
    return min(times, key=lambda count: statistics.median(times[count]))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _calls(run: Callable[[], Any]) -> int:
    """Calls in a block, after a warm-up: enough for _BLOCK_SECONDS, at most 20."""
    run()
    took = _block(run, 1)
    return max(2, min(20, round(_BLOCK_SECONDS / max(took, 1e-9))))


def _block(run: Callable[[], Any], calls: int) -> float:
    """The median time of so many calls in seconds, after one that is not counted."""
    run()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _interval(values: list[float]) -> Interval:
    """Distribution-free 95 % interval of the median: two order statistics (widest that a binomial allows)."""
    ordered, count = sorted(values), len(values)
    tail, skip = 0.5**count, 0
    mass = tail
    while skip < count // 2 - 1:
        tail = tail * (count - skip) / (skip + 1)
        if mass + tail > 0.025:
            break
        mass += tail
        skip += 1
    return Interval(ordered[skip], ordered[-1 - skip])
