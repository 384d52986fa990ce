"""The allocation against every choice there is, and what holds for any."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyweight.planning.allocate import Level, allocate, smallest
from flyweight.records import Step


def level(size: int, damage: float) -> Level:
    return Level(Step("weight_only", "a", {"bits": size}), size, damage)


def cost(choice: Mapping[str, Level]) -> tuple[int, float]:
    return sum(one.bytes for one in choice.values()), math.fsum(one.damage for one in choice.values())


def every(levels: Mapping[str, Sequence[Level]], budget: float) -> list[float]:
    """The damages of all choices that fit."""
    found = (cost(dict(zip(levels, choice, strict=True))) for choice in itertools.product(*levels.values()))
    return [damage for size, damage in found if size <= budget]


SITE = st.lists(st.builds(level, st.integers(1, 40), st.floats(0, 100)), min_size=1, max_size=4)
SITES = st.dictionaries(st.sampled_from("abcd"), SITE, min_size=1)


@given(SITES, st.integers(0, 160))
def test_fits_and_is_less_than_a_step_from_the_best(levels: dict[str, list[Level]], budget: int) -> None:
    found, possible = allocate(levels, budget), every(levels, budget)
    if found is None:
        assert not possible
        return
    size, damage = cost(found)
    assert size <= budget
    assert all(found[name] in levels[name] for name in levels)
    largest = max(max(a.damage for a in some) - min(a.damage for a in some) for some in levels.values())
    assert min(possible) - 1e-9 <= damage <= min(possible) + largest + 1e-9


@given(SITES)
def test_best_of_all_with_budget_for_everything(levels: dict[str, list[Level]]) -> None:
    found = allocate(levels, 1000)
    assert found is not None
    assert cost(found)[1] == pytest.approx(sum(min(a.damage for a in some) for some in levels.values()))


@given(
    st.lists(st.lists(st.floats(0, 100), min_size=3, max_size=3), min_size=1, max_size=5), st.integers(0, 2)
)
def test_never_worse_than_uniform(damages: list[list[float]], place: int) -> None:
    sizes = (2, 3, 7)
    levels = {str(i): [level(s, d) for s, d in zip(sizes, row, strict=True)] for i, row in enumerate(damages)}
    uniform = {name: some[place] for name, some in levels.items()}
    found = allocate(levels, cost(uniform)[0])
    assert found is not None
    assert cost(found)[1] <= cost(uniform)[1] + 1e-9


def test_bytes_go_where_they_save_most() -> None:
    levels = {"dull": [level(2, 1.0), level(4, 0.9)], "sharp": [level(2, 9.0), level(4, 1.0)]}
    found = allocate(levels, 6)
    assert found is not None
    assert {name: one.bytes for name, one in found.items()} == {"dull": 2, "sharp": 4}


def test_infinite_damage_is_avoided_first() -> None:
    levels = {"a": [level(2, math.inf), level(4, 5.0)], "b": [level(2, 100.0), level(4, 0.0)]}
    found = allocate(levels, 6)
    assert found is not None
    assert found["a"].bytes == 4


def test_what_cannot_fit_is_none() -> None:
    assert allocate({"a": [level(5, 0.0)]}, 4) is None


@given(SITES, st.floats(0, 300))
def test_the_smallest_within_a_damage(levels: dict[str, list[Level]], bound: float) -> None:
    size, damage = cost(smallest(levels, bound))
    least = math.fsum(min(one.damage for one in some) for some in levels.values())
    assert damage <= max(bound, least) + 1e-9
    kept = [level for level in (cost(one) for one in uniform_choices(levels)) if level[1] <= bound]
    assert size <= min((one for one, _ in kept), default=size)


def uniform_choices(levels: Mapping[str, Sequence[Level]]) -> list[dict[str, Level]]:
    """The same place in all sites."""
    count = min(len(some) for some in levels.values())
    same = count == max(len(some) for some in levels.values())
    return [{name: some[place] for name, some in levels.items()} for place in range(count)] if same else []
