"""Coordinate descent against trying every point of the grid; no row gets worse; at the end no single entry can do better."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from roundings.samples import KINDS, gram, grids, output_errors, random, seen, symmetric

from flyweight.codes import Grid
from flyweight.errors import UsageError
from flyweight.roundings import coordinate, error_feedback
from flyweight.roundings.coordinate import Options, sweep

pytestmark = pytest.mark.usefixtures("one_thread")


def slow_sweep(
    integers: torch.Tensor, target: torch.Tensor, grid: Grid, matrix: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sweep that tries every point for every entry, float64; and which rows never came near a tie."""
    found, clear = integers.clone(), torch.ones(len(integers), dtype=torch.bool)
    for k in range(integers.shape[1]):
        errors = []
        for integer in range(grid.low, grid.high + 1):
            trial = found.clone()
            trial[:, k] = integer
            errors.append(output_errors(trial, grid, target, matrix))
        table = torch.stack(errors, 1)
        two = table.sort(1).values[:, :2]
        clear &= two[:, 1] - two[:, 0] > 1e-3 * matrix[k, k] * grid.scales[:, k // grid.group] ** 2
        found[:, k] = (table.argmin(1) + grid.low).to(torch.int16)
    return found, clear


@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_tries_everything(kind: str) -> None:
    weight, matrix = torch.randn(24, 12, generator=random(1)), gram(12)
    grid = grids(weight * 0.8, 4)[kind]
    start = grid.nearest(weight)
    expected, clear = slow_sweep(start, weight, grid, matrix)
    assert clear.double().mean() > 0.8
    found = sweep(start, weight, grid, matrix)
    assert not torch.equal(found, start)
    assert torch.equal(found[clear], expected[clear])


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, matrix = torch.randn(8, 40, generator=random(2)), gram(40, count=100)
    grid = symmetric(weight, 3)
    found = []
    for block in (1, 7, 128):
        monkeypatch.setattr(coordinate, "_BLOCK", block)
        found.append(sweep(grid.nearest(weight), weight, grid, matrix))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([1, 4]), st.integers(1, 4), st.booleans(),
    st.sampled_from([1, 3, 100]),
)  # fmt: skip
def test_no_row_is_worse_than_error_feedback(
    seed: int, kind: str, group: int, groups: int, refit: bool, count: int
) -> None:
    inputs = group * groups
    weight, matrix = torch.randn(4, inputs, generator=random(seed)), gram(inputs, count, seed)
    grid = grids(weight * 0.8, group)[kind]
    start, _ = error_feedback.pick(weight, grid, seen(matrix), error_feedback.Options())
    found, after = coordinate.pick(weight, grid, seen(matrix), Options(refit=refit))
    ours, theirs = output_errors(found, after, weight, matrix), output_errors(start, grid, weight, matrix)
    assert (ours <= theirs * (1 + 1e-4) + 1e-6 * float(weight.square().sum() * matrix.trace())).all()
    assert refit or after is grid


def test_at_the_end_no_entry_can_do_better() -> None:
    weight, matrix = torch.randn(8, 16, generator=random(3)), gram(16)
    grid = symmetric(weight, 3)
    found, _ = coordinate.pick(weight, grid, seen(matrix), Options(sweeps=100))
    least = output_errors(found, grid, weight, matrix)
    for k in range(16):
        for integer in range(grid.low, grid.high + 1):
            trial = found.clone()
            trial[:, k] = integer
            assert (output_errors(trial, grid, weight, matrix) >= least * (1 - 1e-5)).all()


def test_it_is_better_than_error_feedback_and_refit_better_still() -> None:
    weight, matrix = torch.randn(32, 64, generator=random(4)), gram(64, count=256)
    grid = symmetric(weight, 2, 16)
    start, _ = error_feedback.pick(weight, grid, seen(matrix), error_feedback.Options())
    errors = [float(output_errors(start, grid, weight, matrix).sum())]
    for refit in (False, True):
        found, after = coordinate.pick(weight, grid, seen(matrix), Options(refit=refit))
        errors.append(float(output_errors(found, after, weight, matrix).sum()))
    assert errors[2] < 0.9 * errors[1] < 0.9 * 0.99 * errors[0]


@pytest.mark.parametrize("mean_square", [0.0, -1e-3])
def test_inputs_without_a_mean_square_stay(mean_square: float) -> None:
    weight, matrix = torch.randn(8, 16, generator=random(5)), gram(16)
    matrix[3, 3] = mean_square  # no matrix of real inputs has it below 0, but rounding may
    grid = symmetric(weight)
    found, _ = coordinate.pick(weight, grid, seen(matrix), Options())
    assert torch.equal(found[:, 3], grid.nearest(weight)[:, 3])


@pytest.mark.parametrize("wrong", [{"sweeps": 0}, {"sweeps": 101}, {"damping": 2}, {"drift": -1}])
def test_options_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="must be"):
        Options(**wrong)


def test_options_that_both_have_are_the_same() -> None:
    shared = error_feedback.Options.__dataclass_fields__
    assert all(Options.__dataclass_fields__[name].default == item.default for name, item in shared.items())
