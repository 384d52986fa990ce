"""Half-quadratic rounding: the threshold by its formula, a fit against trying all zeros, and no group worse than nearest."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from roundings.samples import KINDS, asymmetric, decoded, grids, random, symmetric

from flyweight.codes import Grid
from flyweight.errors import DataError, UsageError
from flyweight.roundings import Seen, half_quadratic
from flyweight.roundings.half_quadratic import Options, shrink

pytestmark = pytest.mark.usefixtures("one_thread")


def group_errors(
    integers: torch.Tensor, grid: Grid, weight: torch.Tensor, energy: torch.Tensor
) -> torch.Tensor:
    """(O, G) squared errors weighed by energy, float64."""
    return (
        (energy.double() * (decoded(integers, grid) - weight.double()).square())
        .unflatten(1, (-1, grid.group))
        .sum(2)
    )


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([1, 2, 8]), st.integers(1, 3), st.booleans(),
    st.sampled_from([1, 4, 20]),
)  # fmt: skip
def test_no_group_is_worse_than_nearest(
    seed: int, kind: str, group: int, groups: int, weighed: bool, sweeps: int
) -> None:
    weight = torch.randn(4, group * groups, generator=random(seed)).pow(3)
    energy = torch.rand(group * groups, generator=random(seed + 1)) if weighed else torch.ones(group * groups)
    grid = grids(weight, group)[kind]
    found, after = half_quadratic.pick(weight, grid, Seen(energy=energy), Options(sweeps=sweeps))
    ours = group_errors(found, after, weight, energy)
    theirs = group_errors(grid.nearest(weight), grid, weight, energy)
    assert (ours <= theirs * (1 + 1e-4) + 1e-9).all()
    if after.zeros is not None:
        assert torch.equal(after.zeros, after.zeros.round().clamp(after.low, after.high))
    assert (after.zeros is None) == (grid.zeros is None)


@pytest.mark.parametrize(("fit", "share"), [(symmetric, 0.75), (asymmetric, 0.9)])
def test_it_is_better_than_nearest_where_there_are_outliers(fit: object, share: float) -> None:
    weight = torch.randn(16, 128, generator=random(1))
    weight[:, ::40] *= 4
    grid = fit(weight, 3, 64)  # type: ignore[operator]
    found, after = half_quadratic.pick(weight, grid, Seen(), Options())
    ours = group_errors(found, after, weight, torch.ones(128)).sum()
    theirs = group_errors(grid.nearest(weight), grid, weight, torch.ones(128)).sum()
    assert ours < share * theirs


def test_zeros_move_and_stay_integers_of_the_grid() -> None:
    weight = torch.randn(16, 64, generator=random(5))
    grid = asymmetric(weight, 3, 32)
    assert grid.zeros is not None
    grid = dataclasses.replace(grid, zeros=(grid.zeros - 2).clamp(min=0))
    _, after = half_quadratic.pick(weight, grid, Seen(), Options())
    assert after.zeros is not None
    assert not torch.equal(after.zeros, grid.zeros)
    assert torch.equal(after.zeros, after.zeros.round().clamp(0, 7))
    assert not torch.signbit(after.zeros).any()


def test_energy_is_heeded() -> None:
    weight, energy = torch.randn(8, 64, generator=random(2)), torch.full((64,), 0.01)
    energy[:8] = 100
    grid = symmetric(weight, 2)
    with_energy, plain = (
        half_quadratic.pick(weight, grid, what, Options()) for what in (Seen(energy=energy), Seen())
    )
    errors = [group_errors(*found, weight, energy).sum() for found in (with_energy, plain)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("sharpness", [1.0, 10.0])
def test_the_threshold_is_its_formula(sharpness: float) -> None:
    values = [-2.0, -0.5, -0.1, 0.0, 1e-4, 0.3, 1.0, 50.0]
    expected = [
        0.0 if x == 0 else (1 if x > 0 else -1) * max(0.0, abs(x) - abs(x) ** (0.7 - 1) / sharpness)
        for x in values
    ]
    assert shrink(torch.tensor(values), sharpness).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_without_threshold_it_ends_where_least_squares_stands_still() -> None:
    weight = torch.randn(8, 32, generator=random(3))
    grid = symmetric(weight, 3)
    found, after = half_quadratic.pick(weight, grid, Seen(), Options(sweeps=200))
    level = found.double()
    best = (level * weight).sum(1) / level.square().sum(1)
    assert torch.allclose(after.scales[:, 0].double(), best, rtol=1e-4)


@pytest.mark.parametrize("energy", [torch.zeros(8), torch.tensor([0.0] * 7 + [1.0])])
def test_inputs_without_energy_are_fine(energy: torch.Tensor) -> None:
    weight = torch.randn(4, 8, generator=random(4))
    grid = asymmetric(weight, 2, 4)
    found, after = half_quadratic.pick(weight, grid, Seen(energy=energy), Options())
    assert torch.isfinite(after.values(found)).all()
    assert torch.equal(after.scales[:, 0], grid.scales[:, 0])


def test_energy_is_checked() -> None:
    weight = torch.randn(4, 8)
    for energy, message in ((torch.ones(7), "shape"), (torch.full((8,), float("nan")), "finite")):
        with pytest.raises(DataError, match=f"the energy of the inputs must .*{message}"):
            half_quadratic.pick(weight, symmetric(weight), Seen(energy=energy), Options())


@pytest.mark.parametrize("sweeps", [0, 1001])
def test_options_are_checked(sweeps: int) -> None:
    with pytest.raises(UsageError, match="sweeps must be from 1 to 1000"):
        Options(sweeps=sweeps)
