"""Vectors that share an integer, rounded with regard to the others: against each choice tried and the rest solved for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from roundings.samples import ROUNDINGS, gram, random, seen

from flyweight.codes import Grid
from flyweight.discover import method
from flyweight.roundings import _vectors, error_feedback, pick_parts

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = pytest.mark.parametrize("name", ROUNDINGS)


def vectors(rows: int, inputs: int, wide: int = 2, entries: int = 9) -> Grid:
    table = torch.randn(1, entries, wide, generator=random(5))
    table[0, 0] = 0
    return Grid(0, entries - 1, inputs, torch.linspace(0.5, 2, rows)[:, None], table=table)


def pick(name: str, weight: torch.Tensor, grid: Grid, matrix: torch.Tensor, **options: Any) -> torch.Tensor:
    module = method("roundings", name)
    integers, found = module.pick(weight, grid, seen(matrix), module.Options(**options))
    assert integers.shape == (len(weight), weight.shape[1] // grid.width)
    assert torch.equal(found.table, grid.table)
    found_error = error(found.values(integers) - weight, matrix)
    assert torch.isfinite(found_error).all()
    return integers


def error(change: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return torch.stack([row.double() @ matrix.double() @ row.double() for row in change])


def slow_fed(weight: torch.Tensor, grid: Grid, matrix: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Vector after vector the one that costs least when all inputs after it make up for it as well as they can."""
    assert grid.table is not None
    wide, whole = grid.width, matrix.double()
    found = torch.zeros(len(weight), weight.shape[1] // wide, dtype=torch.int16)
    for row in range(len(weight)):
        errors, done = torch.zeros(0, dtype=torch.float64), list[int]()
        for vector in order:
            done += range(vector * wide, (vector + 1) * wide)
            rest = [at for at in range(len(whole)) if at not in done]
            inner = whole[done][:, done]
            if rest:
                across = whole[done][:, rest]
                inner = inner - across @ torch.linalg.solve(whole[rest][:, rest], across.T)
            every = grid.table[0].double() * grid.scales[row].double() - weight[row, done[-wide:]].double()
            tried = torch.cat((errors.expand(len(every), -1), every), 1)
            best = int(((tried @ inner) * tried).sum(1).argmin())
            found[row, vector], errors = best, tried[best]
    return found


@pytest.mark.parametrize("wide", [2, 4])
@pytest.mark.parametrize("by_size", [False, True])
def test_error_feedback_takes_the_best_vector_of_each_step(wide: int, by_size: bool) -> None:
    weight, matrix, grid = torch.randn(5, 16, generator=random(1)), gram(16), vectors(5, 16, wide)
    damped = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(16)
    sizes = matrix.diagonal().view(-1, wide).sum(1)
    order = sizes.argsort(descending=True).tolist() if by_size else list(range(16 // wide))
    factor = error_feedback.factorize(matrix, by_size, 0.01, wide)
    assert factor is not None
    assert torch.equal(_vectors.fed(weight, grid, factor), slow_fed(weight, grid, damped, order))


def test_blocks_of_columns_are_the_whole() -> None:
    weight, matrix, grid = torch.randn(2, 140, generator=random(1)), gram(140, 600), vectors(2, 140)
    damped = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(140)
    factor = error_feedback.factorize(matrix, False, 0.01, 2)
    assert factor is not None
    assert torch.equal(_vectors.fed(weight, grid, factor), slow_fed(weight, grid, damped, list(range(70))))


def test_no_row_gets_worse_from_one_rounding_to_the_next() -> None:
    weight, matrix, grid = torch.randn(24, 32, generator=random(1)), gram(32), vectors(24, 32, 4, 30)
    names = ("nearest", "error_feedback", "coordinate")
    errors = [error(grid.values(pick(name, weight, grid, matrix)) - weight, matrix) for name in names]
    assert (errors[1] <= errors[0]).all()
    assert (errors[2] <= errors[1] * (1 + 1e-6)).all()
    assert float(errors[1].sum()) < 0.8 * float(errors[0].sum())
    assert float(errors[2].sum()) < 0.95 * float(errors[1].sum())


def test_after_the_sweeps_no_other_vector_does_better_by_itself() -> None:
    weight, matrix, grid = torch.randn(4, 12, generator=random(1)), gram(12), vectors(4, 12)
    integers = pick("coordinate", weight, grid, matrix, sweeps=50)
    least = error(grid.values(integers) - weight, matrix)
    for vector in range(6):
        for other in range(9):
            changed = integers.clone()
            changed[:, vector] = other
            assert (error(grid.values(changed) - weight, matrix) >= least * (1 - 1e-4)).all()


@EVERY
def test_what_lies_on_the_grid_stays_and_nothing_given_changes(name: str) -> None:
    grid, matrix = vectors(6, 12), gram(12)
    integers = torch.randint(0, 9, (6, 6), generator=random(2)).to(torch.int16)
    weight = grid.values(integers)
    kept = weight.clone()
    assert torch.equal(pick(name, weight, grid, matrix), integers)
    assert torch.equal(weight, kept)


@EVERY
@pytest.mark.parametrize("case", ["zero", "one dead", "dead vector", "one sample", "huge", "not positive"])
def test_awkward_inputs(name: str, case: str) -> None:
    weight, matrix, grid = torch.randn(6, 12, generator=random(1)), gram(12), vectors(6, 12)
    weight[2] = 0
    if case == "zero":
        matrix = torch.zeros(12, 12)
    elif case in ("one dead", "dead vector"):
        dead = slice(4, 5 if case == "one dead" else 6)
        matrix[dead], matrix[:, dead] = 0, 0
    elif case == "one sample":
        matrix = gram(12, count=1)
    elif case == "huge":
        matrix *= 1e20
    elif case == "not positive":
        matrix = matrix - 2 * matrix.diagonal().min() * torch.eye(12)
        matrix.diagonal().clamp_(min=0)
    assert not grid.values(pick(name, weight, grid, matrix))[2].any()


def test_inputs_that_count_more_are_met_better_by_nearest() -> None:
    weight, grid, matrix = torch.randn(64, 12, generator=random(1)), vectors(64, 12), torch.eye(12)
    matrix[::2] *= 100
    plain, weighed = (pick("nearest", weight, grid, one) for one in (torch.eye(12), matrix))
    errors = [error(grid.values(one) - weight, matrix).sum() for one in (plain, weighed)]
    assert float(errors[1]) < 0.6 * float(errors[0])


@EVERY
def test_parts_with_inputs_of_their_own(name: str) -> None:
    weight, grid, module = torch.randn(6, 12, generator=random(1)), vectors(6, 12), method("roundings", name)
    known = [seen(gram(12, seed=at)) for at in range(2)]
    whole, _ = pick_parts(module.pick, weight, grid, known, module.Options())
    for at, one in enumerate(known):
        rows = slice(3 * at, 3 * at + 3)
        own = Grid(0, 8, 12, grid.scales[rows], table=grid.table)
        assert torch.equal(whole[rows], module.pick(weight[rows], own, one, module.Options())[0])
