"""One column at a time gives exactly what the whole grid gives."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from roundings.samples import KINDS, grids, random

from flyweight.roundings._columns import columns, nearest_column


@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([1, 3, 4]), st.integers(1, 3))
@settings(deadline=None)
def test_a_column_is_what_the_grid_says(seed: int, kind: str, group: int, groups: int) -> None:
    weight = torch.randn(6, group * groups, generator=random(seed)) * 10.0 ** (seed % 7 - 3)
    grid = grids(weight * 0.7, group)[kind]
    on, integers = columns(grid), grid.nearest(weight)
    for column in range(weight.shape[1]):
        found, values = nearest_column(on, weight[:, column].clone(), column)
        assert torch.equal(found.to(torch.int16), integers[:, column])
        assert torch.equal(values, grid.values(integers)[:, column])
