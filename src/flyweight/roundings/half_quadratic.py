"""Scales and zeros that leave rare large errors aside, found without data by half-quadratic splitting.

Badri & Shaji, "Half-quadratic quantization of large machine learning models" (mobiusml.github.io/hqq_blog, 2023): the error
of the nearest integers is split by a generalized soft threshold (p = 0.7) into rare large parts, which are left aside, and
the rest, to which the grid is fitted anew; and again. Three things differ. Zeros are stored as integers, so a sweep moves
either the zeros, by whole steps, or the scales, by least squares. Errors are measured in steps of the grid, so that
the result does not depend on the weight's unit. And the p-norm only proposes: of all grids met, each group keeps the one with
the least squared error, weighed by the inputs' energy where that is known, because the layer's output sees squares (with
uncorrelated inputs its mean squared error is exactly that sum). The last half of the sweeps goes on from the best without
the threshold. So no group is ever worse than `nearest` by that error.

Grids whose scales are not free (shared by the whole tensor, or powers of two) stay, and their entries are rounded to nearest.
All-zero and constant groups are fine; weights with NaN or infinite entries are refused.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from flyweight.codes._grid import Grid
from flyweight.codes._options import require
from flyweight.roundings._checks import sound_energy, sound_weight
from flyweight.roundings._refit import free_scales, steps, storable, units
from flyweight.roundings._seen import Seen

NEEDS = "nothing"

_NORM = 0.7
_SHARPNESS, _GROWTH = 10.0, 1.01
"""How little is left aside (beta of the paper, in steps of the grid), and its growth with each sweep."""
_EVERY = 4
"""Sweeps from one move of the zeros to the next; the others fit the scales to them."""
_STILL = 0.02
"""A zero that is pulled by less, in steps of the grid, stays."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How long to go on."""

    sweeps: int = 20
    """Times the grid is fitted anew, 1 to 1000."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(1 <= self.sweeps <= 1000, "sweeps", "from 1 to 1000", self.sweeps)


def pick(weight: torch.Tensor, grid: Grid, seen: Seen, options: Options) -> tuple[torch.Tensor, Grid]:
    """The int16 integers (O, I) nearest to a weight (O, I) on a grid fitted anew, and that grid.

    Uses seen.energy where it is known. Raises ModelError for a weight that is not finite, UsageError for a grid that does not
    fit it, DataError for an energy of another shape or not finite.
    """
    weight = sound_weight(weight, grid)
    energy = sound_energy(seen, weight)
    if not free_scales(grid):
        return grid.nearest(weight, energy=energy), grid
    best, least, trial = grid, _errors(weight, grid, energy), grid
    for number in range(options.sweeps):
        splitting = number < (options.sweeps + 1) // 2
        sharpness = _SHARPNESS * _GROWTH**number if splitting else None
        moving = number % _EVERY == 0
        trial = _fitted(weight, trial if splitting else best, sharpness, energy, moving)
        errors = _errors(weight, trial, energy)
        best = _chosen(errors < least, trial, best)
        least = torch.fmin(errors, least)
    return best.nearest(weight, energy=energy), best


def shrink(error: torch.Tensor, sharpness: float) -> torch.Tensor:
    """The generalized soft threshold: sign(x) max(0, |x| - |x|^(p - 1) / sharpness), zero at zero."""
    size = error.abs()
    left = (size - size.pow(_NORM - 1) / sharpness).clamp(min=0)
    return error.sign() * left


def _fitted(
    weight: torch.Tensor, grid: Grid, sharpness: float | None, energy: torch.Tensor, moving: bool
) -> Grid:
    """The grid fitted anew to the weight less its rare large errors, or to all of it without sharpness.

    Moving, its zeros are fitted if it has any, and else its scales: integers picked with one zero tell no scale for another.
    """
    integers = grid.nearest(weight, energy=energy)
    aim = weight
    if sharpness is not None:
        wide = steps(grid)
        aim = weight - wide * shrink((weight - grid.values(integers)) / wide, sharpness)
    if moving and grid.zeros is not None:
        return dataclasses.replace(grid, zeros=_zeros(aim, integers, grid, grid.zeros, energy))
    unit = units(integers, grid)
    scales = storable(_sums(energy * unit * aim, grid) / _sums(energy * unit * unit, grid), grid.scales)
    sound = scales.isfinite() & (scales * grid.scales > 0)
    return dataclasses.replace(grid, scales=torch.where(sound, scales, grid.scales))


def _zeros(
    aim: torch.Tensor, integers: torch.Tensor, grid: Grid, before: torch.Tensor, energy: torch.Tensor
) -> torch.Tensor:
    """(O, G) the zeros, integers in [low, high], a step towards the best for the grid's scales.

    The integers were rounded with the old zeros and follow them: only what was clipped pulls. So the pull is rounded up.
    """
    levels = units(integers, dataclasses.replace(grid, zeros=None, columns=None))
    apart = levels - aim / steps(grid)
    drift = _sums(energy * apart, grid) / _sums(energy.expand_as(apart), grid) - before
    step = drift.sign() * drift.abs().ceil() * (drift.abs() > _STILL)
    after = (before + step).clamp(grid.low, grid.high) + 0.0  # -0.0 becomes 0.0, as it comes back from a file
    return torch.where(after.isfinite(), after, before)


def _errors(weight: torch.Tensor, grid: Grid, energy: torch.Tensor) -> torch.Tensor:
    """(O, G) squared error of rounding to nearest, weighed by energy (I,)."""
    return _sums(energy * (grid.values(grid.nearest(weight, energy=energy)) - weight).square(), grid)


def _sums(entries: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(O, I) -> (O, G)."""
    return entries.view(len(entries), -1, grid.group).sum(2)


def _chosen(first: torch.Tensor, one: Grid, other: Grid) -> Grid:
    """The scales and zeros of one grid where first (O, G) holds, of the other elsewhere."""
    zeros = None
    if one.zeros is not None and other.zeros is not None:
        zeros = torch.where(first, one.zeros, other.zeros)
    return dataclasses.replace(other, scales=torch.where(first, one.scales, other.scales), zeros=zeros)
