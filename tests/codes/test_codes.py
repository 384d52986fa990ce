"""Every code keeps the contract; and the suite notices one that does not."""

from __future__ import annotations

import dataclasses
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from flyweight import discover
from flyweight.codes import Grid, integer
from flyweight.testing import _code_checks as checks
from flyweight.testing.conformance import check_code, failures

pytestmark = pytest.mark.usefixtures("one_thread")

MOST = {
    "integer": (1, 3, 6),
    "palette": (5,),
    "low_float": (1, 3, 4),
    "ternary": (0, 2),
    "entropy": (1, 3),
    "iq4_nl": (0,),
    "sparse": (0, 3, 5),
    "super_block": (0, 2, 3),
    "vector_palette": (1,),
}
"""Levels that are different enough from each other."""


@pytest.mark.parametrize("name", discover.methods("codes"))
def test_codes(name: str) -> None:
    cells = list(check_code(name, [discover.method("codes", name).LEVELS[index] for index in MOST[name]]))
    assert not failures(cells)
    assert sum(cell.state == "passed" for cell in cells) > 75


@pytest.mark.heavy
@pytest.mark.parametrize("name", discover.methods("codes"))
def test_codes_at_all_levels(name: str) -> None:
    assert not failures(check_code(name))


@pytest.mark.parametrize("name", discover.methods("codes"))
def test_every_weight_is_taken_by_some_level_of_each_code_or_refused_by_all_with_reasons(name: str) -> None:
    code = discover.method("codes", name)
    for weight_name, build in checks.WEIGHTS.items():
        reasons = [code.refuse(*build().shape, options) for options in code.LEVELS]
        assert None in reasons or all(reasons)
        assert None in reasons or weight_name in ("one column", "tiny", "odd")


def broken(**changes: Any) -> ModuleType:
    """The integer code, but for some functions."""
    names = ("LEVELS", "Options", "refuse", "nbytes", "fit", "storable", "store", "restore")
    return SimpleNamespace(**{**{name: getattr(integer, name) for name in names}, **changes})  # type: ignore[return-value]


def case(
    code: ModuleType, weight_name: str = "normal", options: integer.Options = integer.LEVELS[3]
) -> checks.CodeCase:
    weight = checks.WEIGHTS[weight_name]()
    return checks.CodeCase("broken", code, options, weight_name, weight, torch.ones(weight.shape[1]))


def fit_and(change: Any) -> Any:
    def fit(weight: torch.Tensor, options: Any, energy: torch.Tensor | None = None) -> Grid:
        return change(integer.fit(weight, options, energy), weight)

    return fit


def touched(grid: Grid, weight: torch.Tensor) -> Grid:
    weight[0, 0] += 1
    return grid


WRONG = {
    "grid_well_formed": broken(fit=fit_and(lambda grid, _: dataclasses.replace(grid, scales=grid.scales * 0))),
    "finite": broken(fit=fit_and(lambda grid, _: dataclasses.replace(grid, scales=grid.scales * float("inf")))),
    "round_trip": broken(restore=lambda s, c, o: (integer.restore(s, c, o)[0].clamp(min=1), integer.restore(s, c, o)[1])),
    "extremes_round_trip": broken(store=lambda i, g, o: integer.store(i.clamp(g.low, g.high), g, o)),
    "honest_bytes": broken(nbytes=lambda *a: integer.nbytes(*a) - 1),
    "storable_already": broken(storable=lambda grid, _: dataclasses.replace(grid, scales=grid.scales * 2)),
    "pure": broken(fit=fit_and(touched)),
    "rows_in_any_order": broken(
        fit=fit_and(lambda g, w: dataclasses.replace(g, scales=g.scales * (1 + torch.arange(len(w)))[:, None]))
    ),
    "scale_free": broken(fit=fit_and(lambda grid, _: dataclasses.replace(grid, scales=torch.full_like(grid.scales, 0.02)))),
    "energy_helps": broken(
        fit=lambda w, o, e=None: integer.fit(w, o if e is None else dataclasses.replace(o, range="minmax"))
    ),
    "bad_input_refused": broken(fit=lambda w, o, e=None: integer.fit(w.nan_to_num(0, 0, 0), o, e)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_suite_finds_a_broken_code(name: str) -> None:
    check = next(one for one in checks.CHECKS if one.__name__ == name)
    check(case(broken()))
    with pytest.raises((checks.Broken, UserWarning)):
        check(case(WRONG[name]))


def test_the_suite_finds_zeros_that_do_not_stay() -> None:
    checks.zeros_stay(case(broken(), "zero channel"))
    moved = broken(fit=fit_and(lambda grid, _: dataclasses.replace(grid, zeros=grid.zeros + 0.5)))
    with pytest.raises(checks.Broken, match="zeros is not zero"):
        checks.zeros_stay(case(moved, "zero channel"))


def test_the_suite_finds_a_refusal_that_is_not_true() -> None:
    checks.refusal_truthful(case(broken(), "odd"))
    for wrong in (broken(refuse=lambda *_: None), broken(refuse=lambda *_: "never")):
        with pytest.raises(checks.Broken):
            checks.refusal_truthful(case(wrong, "odd"))


def test_the_suite_finds_levels_in_another_order() -> None:
    checks.levels_ordered(broken())
    with pytest.raises(checks.Broken, match="do not fall"):
        checks.levels_ordered(broken(LEVELS=integer.LEVELS[::-1]))
