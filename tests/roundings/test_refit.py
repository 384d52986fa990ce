"""Scales by least squares against a plain solve of each row; what storage would change stays."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from roundings.samples import KINDS, decoded, gram, grids, output_errors, random, symmetric

from flyweight.codes import Grid
from flyweight.roundings import _refit
from flyweight.roundings._refit import free_scales, refit, storable

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(
    row: int, target: torch.Tensor, integers: torch.Tensor, grid: Grid, matrix: torch.Tensor
) -> torch.Tensor:
    """(G,) the scales of one row by a least-squares solve of its outputs, float64."""
    unit = decoded(integers, dataclasses.replace(grid, scales=torch.ones_like(grid.scales)))[row]
    values, vectors = torch.linalg.eigh(matrix.double())
    root = vectors * values.clamp(min=0).sqrt()  # matrix = root root^T
    parts = [unit[k : k + grid.group] @ root[k : k + grid.group] for k in range(0, len(unit), grid.group)]
    return torch.linalg.lstsq(torch.stack(parts, 1), (target[row].double() @ root)[:, None]).solution[:, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [1, 1 << 24])
def test_it_is_the_least_squares_solution(kind: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_refit, "_ROOM", room)
    weight, matrix = torch.randn(8, 32, generator=random(1)), gram(32, count=200)
    grid = grids(weight, 8)[kind]
    integers = grid.nearest(weight)
    found = refit(weight, integers, grid, matrix)
    for row in range(8):
        expected = plain(row, weight, integers, grid, matrix).float()
        assert torch.allclose(found.scales[row], expected, rtol=1e-3)
    assert found.zeros is grid.zeros


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([1, 4]), st.integers(1, 4), st.booleans(),
    st.sampled_from([1, 3, 100]),
)  # fmt: skip
def test_no_row_gets_worse_and_signs_stay(
    seed: int, kind: str, group: int, groups: int, half: bool, count: int
) -> None:
    weight, matrix = torch.randn(4, group * groups, generator=random(seed)), gram(group * groups, count, seed)
    grid = grids(weight * 0.8, group)[kind]
    if half:
        grid = dataclasses.replace(grid, scales=grid.scales.half().float())
    integers = grid.nearest(weight)
    found = refit(weight, integers, grid, matrix)
    ours, theirs = (output_errors(integers, one, weight, matrix) for one in (found, grid))
    assert (ours <= theirs * (1 + 1e-4) + 1e-6 * float(weight.square().sum() * matrix.trace())).all()
    assert (found.scales * grid.scales > 0).all()
    assert not half or torch.equal(found.scales.half().float(), found.scales)


def test_groups_of_zeros_and_dead_inputs_keep_their_scales() -> None:
    weight, matrix = torch.randn(4, 12, generator=random(2)), gram(12)
    weight[1, 4:8] = 0
    matrix[8:], matrix[:, 8:] = 0, 0
    grid = symmetric(weight * 1.1, 3, 4)
    found = refit(weight, grid.nearest(weight), grid, matrix)
    assert found.scales[1, 1] == grid.scales[1, 1]
    assert torch.equal(found.scales[:, 2], grid.scales[:, 2])
    assert (found.scales[:, 0] != grid.scales[:, 0]).all()


@pytest.mark.parametrize(
    ("scales", "free"),
    [
        ([[1.0], [1.0]], False), ([[0.3], [0.3]], False), ([[0.5], [-4.0]], False), ([[0.3]], True),
        ([[0.3], [0.4]], True), ([[1.0], [0.4]], True), ([[1.0]], False),
    ],
)  # fmt: skip
def test_scales_tell_whether_they_are_free(scales: list[list[float]], free: bool) -> None:
    assert free_scales(Grid(-7, 7, 4, torch.tensor(scales))) is free


def test_float16_scales_stay_float16() -> None:
    before, after = torch.tensor([[0.25, 0.3]]), torch.tensor([[0.1, 0.2]])
    assert torch.equal(storable(after, before), after)
    assert torch.equal(storable(after, before.half().float()), after.half().float())


def test_channels_that_storage_would_make_worse_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, matrix = torch.randn(4, 8, generator=random(3)), gram(8)
    grid = symmetric(weight, 3, 4)
    factors = torch.tensor([[1.0], [1.5], [1.0], [float("inf")]])
    monkeypatch.setattr(_refit, "storable", lambda scales, before: scales * factors)
    found = refit(weight, grid.nearest(weight), grid, matrix)
    same = (found.scales == grid.scales).all(1)
    assert same.tolist() == [False, True, False, True]
