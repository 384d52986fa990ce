"""Scores, drops and their intervals: against the bootstrap, and against what simulated truth they cover."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flyweight.errors import DataError
from flyweight.evaluation.quality import FEW, Drop, Scores, _t, compare, judge, samples_needed
from flyweight.records import Goal, Interval

Array = np.ndarray
Pair = tuple[Array, Array]
Make = Callable[[np.random.Generator, int], Pair]
SETS = 800


def scores(values: Array) -> Scores:
    return Scores(float(values.mean()), tuple(values.tolist()))


def normal(source: np.random.Generator, count: int) -> Pair:
    original = source.normal(0.8, 0.1, count)
    return original, original - 0.005 + source.normal(0, 0.03, count)


def reciprocal_ranks(source: np.random.Generator, count: int) -> Pair:
    """Heavy tails on both sides: most are 1 or nearly 0, and a third of the ranks move."""
    rank = np.floor(source.pareto(0.8, count)) + 1
    moved = source.standard_t(2, count) * (source.random(count) < 0.3) * (1 + rank * 0.1)
    return 1 / np.minimum(rank, 1000), 1 / np.clip(rank + np.round(moved), 1, 1000)


def binary(right: float, lost: float, gained: float) -> Make:
    """0 or 1, with a share of the right ones lost and a share of the wrong ones gained."""

    def make(source: np.random.Generator, count: int) -> Pair:
        original, change = source.random(count) < right, source.random(count)
        found = np.where(original, change >= lost, change < gained)
        return original.astype(float), found.astype(float)

    return make


WORLDS: dict[str, tuple[Make, int]] = {
    "normal, 50": (normal, 50),
    "normal, 500": (normal, 500),
    "reciprocal ranks, 150": (reciprocal_ranks, 150),
    "reciprocal ranks, 1000": (reciprocal_ranks, 1000),
    "0/1, many changes": (binary(0.5, 0.1, 0.1), 300),
    "0/1, about 12 changes": (binary(0.9, 0.02, 0.02), 600),
    "0/1, about 4 changes": (binary(0.9, 0.01, 0.02), 300),
    "0/1, about 1 change": (binary(0.7, 0.002, 0.002), 500),
    "0/1, nearly all right": (binary(0.99, 0.003, 0.1), 300),
}


@pytest.mark.parametrize("world", WORLDS)
def test_intervals_cover_the_truth(world: str) -> None:
    """At least 93 % of nominal 95 %: with 800 sets, chance alone moves the share by 0.8 %."""
    make, count = WORLDS[world]
    whole = make(np.random.default_rng(99), 2_000_000)
    true = (whole[0].mean() - whole[1].mean()) / abs(whole[0].mean())
    source, covered = np.random.default_rng(0), 0
    for _ in range(SETS):
        found = compare(*map(scores, make(source, count)))
        assert found.interval is not None
        covered += found.interval.low <= true <= found.interval.high
    assert covered / SETS >= 0.93


@pytest.mark.parametrize("make", [normal, reciprocal_ranks, binary(0.6, 0.1, 0.15)])
def test_the_interval_is_as_wide_as_the_bootstraps(make: Make) -> None:
    source = np.random.default_rng(3)
    original, candidate = make(source, 800)
    index = source.integers(0, 800, (4000, 800))
    drops = 1 - candidate[index].mean(1) / original[index].mean(1)
    low, high = np.quantile(drops, [0.025, 0.975])
    found = compare(scores(original), scores(candidate))
    assert found.half == pytest.approx((high - low) / 2, rel=0.1)
    assert found.value == pytest.approx(1 - candidate.mean() / original.mean())


@pytest.mark.parametrize("count", [20, 200])
def test_no_change_among_few_samples_proves_little(count: int) -> None:
    same = scores((np.arange(count) % 4 > 0).astype(float))
    found = compare(same, same)
    assert found.value == 0
    assert found.half > 1.5 / count / same.mean  # one changed sample more, each way, must stay possible
    assert found.half < 4.5 / count / same.mean
    assert compare(same, same, exact=True).interval == Interval(0, 0)


def test_a_change_too_few_is_widened_and_enough_are_not() -> None:
    original = np.ones(1000)
    halves = {}
    for changes in (FEW - 1, FEW):
        candidate = original.copy()
        candidate[:changes] = 0
        usual = 1.96 * candidate.std(ddof=1) / math.sqrt(1000)
        halves[changes] = compare(scores(original), scores(candidate)).half / usual
    assert halves[FEW] == pytest.approx(1, abs=0.01)
    assert 1.05 < halves[FEW - 1] < 1.3


@given(
    st.lists(st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)), min_size=12, max_size=40),
    st.floats(0.01, 100),
    st.booleans(),
)
def test_a_drop_has_no_unit_and_knows_its_sign(
    pairs: list[tuple[float, float]], scale: float, exact: bool
) -> None:
    original, candidate = (np.array(part) for part in zip(*pairs, strict=True))
    found = compare(scores(original), scores(candidate), exact)
    scaled = compare(scores(original * scale), scores(candidate * scale), exact)
    assert scaled.value == pytest.approx(found.value, abs=1e-9)
    assert scaled.half == pytest.approx(found.half, rel=1e-6, abs=1e-9)
    assert (found.value > 0) == (original.mean() > candidate.mean())


def test_a_score_below_zero_has_a_drop_of_its_size() -> None:
    """A log likelihood: -1.0 to -1.1 is 10 % worse."""
    original = Scores(-1.0, (-1.0, -1.0))
    assert compare(original, Scores(-1.1, (-1.1, -1.1))).value == pytest.approx(0.1)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(DataError, match="the same samples each time, got 3 and 2 samples"):
        compare(Scores(1.0, (1.0, 1.0, 1.0)), Scores(1.0, (1.0, 1.0)))
    with pytest.raises(DataError, match="other than 0"):
        compare(Scores(0.0, (0.0, 0.0)), Scores(1.0, (1.0, 1.0)))


def test_one_number_gives_a_drop_without_an_interval() -> None:
    for original, candidate in itertools.product((Scores(0.8, None), Scores(0.8, (0.8,))), repeat=2):
        assert compare(original, candidate).interval is None
        assert original.interval() is None


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.02, 0.01, "met"), (0.0, 0.0101, "unresolved"), (0.01, 0.02, "unresolved"), (0.0101, 0.02, "broken")],
)
def test_a_verdict_needs_the_whole_interval(low: float, high: float, verdict: str) -> None:
    assert Drop((low + high) / 2, Interval(low, high)).verdict(Goal(max_drop=0.01)) == verdict


def test_a_verdict_without_an_interval_is_the_figures() -> None:
    assert Drop(0.01, None).verdict(Goal(max_drop=0.01)) == "met"
    assert Drop(0.0101, None).verdict(Goal(max_drop=0.01)) == "broken"
    assert Drop(0.0101, None).half == 0


def test_so_many_samples_are_needed_as_are_said() -> None:
    """With the samples that the answer asks for, the interval is as wide as the margin to the bound."""
    source, bound = np.random.default_rng(5), 0.02
    for _ in range(10):
        pilot = compare(*map(scores, normal(source, 300)))
        needed = samples_needed(300, pilot, bound)
        assert needed is not None
        assert needed >= 300
        then = [compare(*map(scores, normal(source, needed))).half for _ in range(20)]
        margin = max(bound - pilot.value, 0)
        assert np.median(then) <= 1.15 * margin
        if needed > 400:
            assert np.median(then) >= 0.85 * margin


def test_a_drop_that_is_told_already_needs_no_more_samples() -> None:
    assert samples_needed(100, Drop(0.0, Interval(-0.005, 0.005)), 0.01) == 100
    assert samples_needed(100, Drop(0.0, Interval(-0.02, 0.02)), 0.01) == 400
    assert samples_needed(100, Drop(0.0, None), 0.01) is None


@pytest.mark.parametrize(("freedom", "quantile"), [(4, 2.776), (9, 2.262), (29, 2.045), (10**6, 1.960)])
def test_students_quantile_is_the_tables(freedom: int, quantile: float) -> None:
    assert _t(freedom) == pytest.approx(quantile, rel=0.01)


def test_the_mean_of_scores_has_its_interval() -> None:
    source, covered = np.random.default_rng(1), 0
    for _ in range(SETS):
        interval = scores(source.normal(3, 1, 12)).interval()
        assert interval is not None
        covered += interval.low <= 3 <= interval.high
    assert covered / SETS >= 0.93


def test_a_score_is_seeded_and_takes_many_shapes() -> None:
    def noise(predict: object) -> list[float]:
        return torch.rand(3).tolist() + np.random.rand(2).tolist()

    assert judge(noise, len, 7) == judge(noise, len, 7) != judge(noise, len, 8)
    assert judge(lambda _: torch.tensor([1.0, 0.0]), len, 0) == Scores(0.5, (1.0, 0.0))
    assert judge(lambda _: np.float32(0.5), len, 0) == Scores(0.5, None)
    assert judge(lambda _: True, len, 0) == Scores(1.0, None)


@pytest.mark.parametrize(
    "bad", [None, "0.9", [], [[1.0, 2.0]], [1.0, float("inf")], float("nan"), [1.0, "x"], {}]
)
def test_a_score_must_be_finite_numbers(bad: object) -> None:
    with pytest.raises(DataError, match="finite numbers") as caught:
        judge(lambda _: bad, len, 0)  # type: ignore[arg-type, return-value]
    assert "Task.score" in caught.value.where


def test_an_interrupt_is_not_taken_for_a_failing_score() -> None:
    def stop(predict: object) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(stop, len, 0)
