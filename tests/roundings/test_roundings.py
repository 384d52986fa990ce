"""What every rounding must do on every kind of grid: range, purity, repeatability, and stated answers for awkward input."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from roundings.samples import KINDS, ROUNDINGS, gram, grids, random, seen, tabled

from flyweight.codes import Grid
from flyweight.discover import method
from flyweight.errors import DataError, ModelError, UsageError
from flyweight.roundings import Seen

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("name", ROUNDINGS)]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
INPUTS = 12


def pick(
    name: str, weight: torch.Tensor, grid: Grid, what: Seen | None = None, **options: Any
) -> tuple[Any, Grid]:
    module = method("roundings", name)
    integers, found = module.pick(
        weight, grid, what or seen(gram(weight.shape[1])), module.Options(**options)
    )
    assert integers.shape == weight.shape
    assert integers.dtype == torch.int16
    assert grid.low <= int(integers.min()) <= int(integers.max()) <= grid.high
    assert torch.isfinite(found.values(integers)).all()
    return integers, found


def weights() -> torch.Tensor:
    return torch.randn(6, INPUTS, generator=random(1))


def test_it_says_what_it_needs(name: str) -> None:
    assert method("roundings", name).NEEDS in ("nothing", "energy", "gram")
    assert {"nearest", "error_feedback", "half_quadratic", "coordinate"} <= set(ROUNDINGS)


@EVERY_KIND
def test_nothing_given_is_changed_and_equal_calls_give_equal_answers(name: str, kind: str) -> None:
    weight, matrix = weights(), gram(INPUTS)
    grid = grids(weight, 4)[kind]
    kept = [weight.clone(), matrix.clone(), grid.scales.clone()]
    first = pick(name, weight, grid, seen(matrix))
    second = pick(name, weight, grid, seen(matrix))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1].scales, second[1].scales)
    assert all(torch.equal(a, b) for a, b in zip(kept, [weight, matrix, grid.scales], strict=True))


@EVERY_KIND
def test_what_lies_on_the_grid_stays(name: str, kind: str) -> None:
    grid = grids(weights(), 4)[kind]
    integers = torch.randint(grid.low, grid.high + 1, (6, INPUTS), generator=random(2)).to(torch.int16)
    weight = grid.values(integers)
    found, after = pick(name, weight, grid)
    assert torch.allclose(after.values(found), weight, rtol=1e-5, atol=1e-6)


@EVERY_KIND
@pytest.mark.parametrize("factor", [2.0**-20, 4.0])
def test_units_do_not_matter(name: str, kind: str, factor: float) -> None:
    weight, matrix = weights(), gram(INPUTS)
    grid = grids(weight, 4)[kind]
    scaled = dataclasses.replace(grid, scales=grid.scales * factor)
    first, before = pick(name, weight, grid, seen(matrix))
    second, after = pick(name, weight * factor, scaled, seen(matrix * 2.0**30))
    assert torch.equal(first, second)
    assert torch.equal(before.scales * factor, after.scales)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "tables"]
)  # those belong to blocks of rows
def test_rows_are_independent(name: str, kind: str) -> None:
    weight = weights()
    grid = grids(weight, 4)[kind]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    turned = dataclasses.replace(
        grid, scales=grid.scales[order], zeros=None if grid.zeros is None else grid.zeros[order]
    )
    assert torch.equal(pick(name, weight, grid)[0][order], pick(name, weight[order], turned)[0])


@EVERY_KIND
@pytest.mark.parametrize(
    "case", ["zero", "zero rows", "constant", "outlier", "one row", "one column", "one entry"]
)
def test_awkward_weights(name: str, kind: str, case: str) -> None:
    weight = weights()
    if case == "zero":
        weight = torch.zeros(6, INPUTS)
    elif case == "zero rows":
        weight[::2] = 0
    elif case == "constant":
        weight = torch.full((6, INPUTS), 0.3)
    elif case == "outlier":
        weight[2, 5] = 1e4
    elif case == "one row":
        weight = weight[:1]
    elif case == "one column":
        weight = weight[:, :1]
    elif case == "one entry":
        weight = weight[:1, :1]
    grid = grids(weight, min(4, weight.shape[1]))[kind]
    integers, found = pick(name, weight, grid)
    zero = (weight == 0).all(1)
    assert (found.values(integers)[zero] == 0).all()
    assert (found.scales * grid.scales > 0).all()


@EVERY_KIND
def test_strides_and_wider_floats_do_not_matter(name: str, kind: str) -> None:
    weight = weights()
    grid = grids(weight, 4)[kind]
    expected = pick(name, weight, grid)[0]
    assert torch.equal(pick(name, weight.T.contiguous().T, grid)[0], expected)
    assert torch.equal(pick(name, weight.double(), grid)[0], expected)
    assert torch.equal(pick(name, torch.nn.Parameter(weight), grid)[0], expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    weight = weights()
    grid = grids(weight, 4)["symmetric"]
    weight[1, 2] = bad
    with pytest.raises(ModelError, match=r"weights must be finite, got 1 of 72 values"):
        pick(name, weight, grid)


@pytest.mark.parametrize("group", [5, 8, 24])
def test_groups_that_do_not_divide_are_refused(name: str, group: int) -> None:
    grid = Grid(-7, 7, group, torch.ones(6, max(1, INPUTS // group)))
    with pytest.raises(UsageError, match="take a group that divides the inputs"):
        pick(name, weights(), grid)


def test_a_grid_of_other_channels_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="a grid must hold one scale"):
        pick(name, weights(), Grid(-7, 7, INPUTS, torch.ones(5, 1)))


@EVERY_KIND
@pytest.mark.parametrize(
    "case", ["zero", "one dead", "one sample", "two inputs alike", "huge", "tiny", "not positive"]
)
def test_awkward_inputs(name: str, kind: str, case: str) -> None:
    weight, matrix = weights(), gram(INPUTS)
    if case == "zero":
        matrix = torch.zeros(INPUTS, INPUTS)
    elif case == "one dead":
        matrix[3], matrix[:, 3] = 0, 0
    elif case == "one sample":
        matrix = gram(INPUTS, count=1)
    elif case == "two inputs alike":
        matrix[3] = matrix[4]
        matrix[:, 3] = matrix[:, 4]
    elif case == "huge":
        matrix *= 1e30
    elif case == "tiny":
        matrix *= 1e-30
    elif case == "not positive":
        matrix = matrix - 2 * matrix.diagonal().min() * torch.eye(INPUTS)
    pick(name, weight, grids(weight, 4)[kind], seen(matrix))


def test_what_was_seen_is_checked(name: str) -> None:
    weight = weights()
    grid = grids(weight, 4)["symmetric"]
    if method("roundings", name).NEEDS == "nothing":
        pick(name, weight, grid, Seen())
        return
    with pytest.raises(DataError, match=r"must be known, got none; give examples that reach the layer"):
        pick(name, weight, grid, Seen())
    with pytest.raises(DataError, match=r"must have the shape \(12, 12\), got \(11, 11\)"):
        pick(name, weight, grid, seen(gram(11)))
    broken = gram(INPUTS)
    broken[0, 1] = float("nan")
    with pytest.raises(DataError, match="must be finite, got 1 values NaN or infinite"):
        pick(name, weight, grid, seen(broken))


def test_scales_that_cannot_be_stored_otherwise_stay(name: str) -> None:
    weight = weights()
    powers = Grid(-7, 7, 4, torch.tensor([[0.25, 0.5, 0.125]]).repeat(6, 1))
    shared = Grid(-7, 7, 4, torch.full((6, 3), 0.3))
    palette = dataclasses.replace(tabled(weight), scales=torch.ones(6, 1))
    options = {"refit": True} if name == "coordinate" else {}
    for grid in (powers, shared, palette):
        assert torch.equal(pick(name, weight, grid, **options)[1].scales, grid.scales)
    half = Grid(-7, 7, 4, (weight.unflatten(1, (3, 4)).abs().amax(2) / 7).half().float())
    found = pick(name, weight, half, **options)[1].scales
    assert torch.equal(found.half().float(), found)
