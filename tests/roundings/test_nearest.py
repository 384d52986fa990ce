"""Nearest: no other point of the grid is nearer, and halves go where the grid says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from roundings.samples import KINDS, decoded, grids, points, random

from flyweight.codes import Grid
from flyweight.roundings import Seen, nearest


@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_no_other_point_is_nearer(seed: int, kind: str, group: int, groups: int) -> None:
    weight = torch.randn(4, group * groups, generator=random(seed))
    grid = grids(weight * 0.8, group)[kind]
    integers, same = nearest.pick(weight, grid, Seen(), nearest.Options())
    assert same is grid
    apart = (decoded(integers, grid) - weight).abs()
    for column in range(weight.shape[1]):
        least = (points(grid, column) - weight[:, column, None]).abs().amin(1)
        assert (apart[:, column] <= least + 1e-6).all()


@pytest.mark.parametrize(
    ("value", "integer"), [(0.5, 0), (1.5, 2), (-0.5, 0), (-2.5, -2), (9.0, 3), (-9.0, -3)]
)
def test_halves_go_to_the_even_integer_and_ends_hold(value: float, integer: int) -> None:
    grid = Grid(-3, 3, 1, torch.ones(1, 1))
    assert nearest.pick(torch.tensor([[value]]), grid, Seen(), nearest.Options())[0].item() == integer
