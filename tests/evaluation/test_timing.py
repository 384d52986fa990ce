"""Races with a clock of our own: what is counted, for how long, and that a drifting machine treats both alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from flyweight.evaluation import timing
from flyweight.evaluation.timing import _interval, fastest_threads, race


class Clock:
    """Time that passes only when a function runs; `speed` may change with the time."""

    def __init__(self, speed: Callable[[float], float] = lambda _: 1.0) -> None:
        self.now, self.speed, self.runs = 0.0, speed, 0

    def perf_counter(self) -> float:
        return self.now

    def taking(self, *seconds: float) -> Callable[[], None]:
        """A function that takes these times in turn."""
        state = iter(range(10**9))

        def run() -> None:
            self.runs += 1
            self.now += seconds[next(state) % len(seconds)] * self.speed(self.now)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    return made


def test_a_race_tells_the_latencies_and_their_ratio(clock: Clock) -> None:
    found = race(clock.taking(0.03), clock.taking(0.01), 4.0)
    assert (found.first_ms, found.second_ms) == pytest.approx((30, 10))
    assert found.speedup == pytest.approx(3)
    assert (found.speedup_interval.low, found.speedup_interval.high) == pytest.approx((3, 3))


def test_a_machine_that_slows_down_treats_both_alike(clock: Clock) -> None:
    """It becomes ten times slower within the race: times spread, their ratio hardly."""
    clock.speed = lambda now: 1 + now * 2
    found = race(clock.taking(0.02), clock.taking(0.01), 4.0)
    assert found.first_interval.high / found.first_interval.low > 2
    assert found.speedup == pytest.approx(2, rel=0.1)
    assert found.speedup_interval.low > 1.5


@pytest.mark.parametrize("seconds", [0.0, 1.0, 3.0])
def test_a_race_takes_about_its_time_but_at_least_six_rounds(clock: Clock, seconds: float) -> None:
    race(clock.taking(0.01), clock.taking(0.01), seconds)
    # A round is two blocks of three calls; the warm-up a few more.
    assert 6 * 0.06 <= clock.now <= max(seconds, 6 * 0.06) + 0.2


def test_a_race_has_at_most_thirty_rounds(clock: Clock) -> None:
    race(clock.taking(1e-4), clock.taking(1e-4), 1e9)
    assert clock.runs <= 30 * 2 * 21 + 2 * 22


def test_a_slow_first_call_is_not_counted(clock: Clock) -> None:
    first = iter([5.0])

    def run() -> None:
        clock.now += next(first, 0.01)

    assert race(run, clock.taking(0.01), 1.0).first_interval.high == pytest.approx(10)


@pytest.mark.parametrize("count", range(6, 61))
def test_the_interval_of_a_median_is_the_narrowest_that_the_binomial_allows(count: int) -> None:
    """Order statistics k and n + 1 - k cover the median with probability 1 - 2 P(Bin(n, 1/2) < k)."""
    found = _interval([float(value) for value in range(1, count + 1)])
    rank = int(found.low)
    assert found.high == count + 1 - rank

    def cover(k: int) -> float:
        return 1 - 2 * sum(math.comb(count, i) for i in range(k)) / 2**count

    assert cover(rank) >= 0.95
    assert cover(rank + 1) < 0.95


def test_an_interval_takes_times_in_any_order() -> None:
    assert _interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == _interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


@pytest.mark.parametrize("best", [1, 2])
def test_the_faster_count_of_threads_is_told_and_pytorch_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    set_to = [7]
    clock = Clock(lambda _: 1.0 if set_to[-1] == best else 3.0)
    monkeypatch.setattr(timing, "time", clock)
    fake = SimpleNamespace(set_num_threads=set_to.append, get_num_threads=lambda: set_to[-1])
    monkeypatch.setattr(timing, "torch", fake)
    assert fastest_threads(clock.taking(0.01), 2) == best
    assert set_to[-1] == 7


def test_a_real_race_is_won_by_less_work() -> None:
    found = race(lambda: sum(range(50_000)), lambda: sum(range(1_000)), 0.2)
    assert found.speedup_interval.low > 5
