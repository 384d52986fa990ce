"""A grouped layer part by part is each part by itself."""

from __future__ import annotations

import pytest
import torch
from roundings.samples import KINDS, gram, grids, random, seen, tabled

from flyweight.errors import UsageError
from flyweight.roundings import coordinate, half_quadratic, pick_parts
from flyweight.roundings._parts import rows_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 3, 6])
def test_parts_are_picked_one_by_one(kind: str, parts: int) -> None:
    weight = torch.randn(6, 8, generator=random(1))
    grid, what = grids(weight, 4)[kind], [seen(gram(8, seed=k)) for k in range(parts)]
    options = coordinate.Options(refit=True)
    integers, found = pick_parts(coordinate.pick, weight, grid, what, options)
    assert found.table is grid.table
    step = 6 // parts
    for k in range(parts):
        rows = slice(k * step, (k + 1) * step)
        part, its = coordinate.pick(weight[rows], rows_of(grid, rows), what[k], options)
        assert torch.equal(integers[rows], part)
        assert torch.equal(found.values(integers)[rows], its.values(part))


def test_new_zeros_come_back_too() -> None:
    weight = torch.randn(6, 8, generator=random(2))
    grid = grids(weight, 4)["asymmetric"]
    what = [seen(gram(8, seed=k)) for k in range(3)]
    _, found = pick_parts(half_quadratic.pick, weight, grid, what, half_quadratic.Options())
    assert found.zeros is not None
    assert found.zeros.shape == (6, 2)


def test_rows_of_a_grid_decode_as_they_did() -> None:
    weight = torch.randn(8, 4, generator=random(3))
    grid = tabled(weight, 2, 4)
    integers = grid.nearest(weight)
    assert torch.equal(rows_of(grid, slice(3, 6)).values(integers[3:6]), grid.values(integers)[3:6])


@pytest.mark.parametrize("parts", [0, 4])
def test_parts_must_divide_the_channels(parts: int) -> None:
    weight = torch.randn(6, 8)
    with pytest.raises(
        UsageError, match=f"parts must divide the output channels, got {parts} parts of 6 channels"
    ):
        pick_parts(
            coordinate.pick, weight, grids(weight)["symmetric"], [seen(gram(8))] * parts, coordinate.Options()
        )
