"""The grid's nearest entries and values against a search through all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.codes import Grid


def slow_levels(grid: Grid, row: int, rows: int) -> torch.Tensor:
    """The levels that a row's integers stand for, ascending."""
    if grid.table is None:
        return torch.arange(grid.low, grid.high + 1, dtype=torch.float64)
    return grid.table[row // (rows // len(grid.table))].double()


GRIDS = {
    "even": Grid(-7, 7, 4, torch.tensor([[0.5, 0.1], [2.0, 0.3]])),
    "below nought": Grid(-2, 1, 4, torch.tensor([[-0.5, 0.25], [1.0, -2.0]])),
    "with zeros": Grid(0, 15, 4, torch.tensor([[0.5, 0.1], [0.7, 0.3]]), torch.tensor([[3.0, 0.0], [15.0, 8.0]])),
    "a table": Grid(0, 3, 8, torch.tensor([[1.0], [0.5]]), table=torch.tensor([[-1.0, 0.0, 0.5, 3.0]])),
    "columns": Grid(-7, 7, 4, torch.tensor([[0.5, 0.1], [2.0, 0.3]]), columns=torch.tensor([1, 2, 0.3, 1, 5, 1.7, 1, 0.1])),
    "two tables": Grid(-1, 1, 8, torch.ones(2, 1), table=torch.tensor([[-1.0, 0.1, 2.0], [0.0, 0.0, 5.0]])),
}  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
@given(entries=st.lists(st.floats(-8, 8, width=32), min_size=16, max_size=16))
@settings(max_examples=60, deadline=None)
def test_no_integer_is_nearer(name: str, entries: list[float]) -> None:
    grid, weight = GRIDS[name], torch.tensor(entries).view(2, 8)
    integers = grid.nearest(weight)
    values = grid.values(integers)
    assert integers.dtype == torch.int16
    for row in range(2):
        for column in range(8):
            factor = 1.0 if grid.columns is None else float(grid.columns[column])
            scale = float(grid.scales[row, column // grid.group]) * factor
            zero = 0.0 if grid.zeros is None else float(grid.zeros[row, column // grid.group])
            every = (slow_levels(grid, row, 2) - zero) * scale
            entry = float(weight[row, column])
            assert float(values[row, column]) == pytest.approx(
                float(every[int(integers[row, column]) - grid.low])
            )
            best = float((every - entry).abs().min())
            assert abs(float(values[row, column]) - entry) <= best + 1e-5


@pytest.mark.parametrize("name", GRIDS)
def test_columns_one_by_one_are_the_whole(name: str) -> None:
    grid = GRIDS[name]
    weight = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    whole = grid.nearest(weight)
    parts = [grid.nearest(weight[:, at : at + 1], at) for at in range(8)]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(
        torch.cat([grid.values(part, at) for at, part in enumerate(parts)], 1), grid.values(whole)
    )


def test_halves_go_where_it_says() -> None:
    halves = torch.tensor([[0.5, 1.5, -0.5, -1.5]])
    assert Grid(-3, 3, 4, torch.ones(1, 1)).nearest(halves).tolist() == [[0, 2, 0, -2]]
    table = Grid(0, 2, 4, torch.ones(1, 1), table=torch.tensor([[0.0, 1.0, 3.0]]))
    assert table.nearest(torch.tensor([[0.5, 2.0]])).tolist() == [[0, 1]]


@pytest.mark.parametrize("name", GRIDS)
def test_weights_of_any_floats_that_do_not_lie_together(name: str) -> None:
    weight = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = GRIDS[name].nearest(weight.float().t().contiguous())
    assert torch.equal(GRIDS[name].nearest(weight.t()), wanted)
    assert torch.equal(GRIDS[name].nearest(weight.double().t()), wanted)
