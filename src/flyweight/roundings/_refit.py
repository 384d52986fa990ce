"""Scales fitted anew to integers that were picked, where the grid's storage leaves them free.

A code may store scales with fewer bits than float32, or not at all; what `store` would change must not be changed here.
The scales themselves tell: see `free_scales` and `storable`.
"""

from __future__ import annotations

import dataclasses

import torch

from flyweight.codes._grid import Grid
from flyweight.roundings._objective import output_error

_ROOM = 1 << 24
"""Entries of the (G, G) systems that are solved at once."""


def free_scales(grid: Grid) -> bool:
    """Whether scales may change one by one: not when the grid is fixed, all are one number, or all are powers of two."""
    shared = grid.scales.numel() > 1 and bool((grid.scales == grid.scales[0, 0]).all())
    powers = bool((torch.frexp(grid.scales).mantissa.abs() == 0.5).all())
    return not (grid.fixed or shared or powers)


def storable(scales: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The scales as they can be stored: rounded to float16 where all scales before were float16 numbers."""
    return scales.half().float() if bool((before.half().float() == before).all()) else scales


def units(integers: torch.Tensor, grid: Grid) -> torch.Tensor:
    """What integers (O, I) stand for before they are scaled: (O, I), level minus zero, times the column's factor."""
    return dataclasses.replace(grid, scales=torch.ones_like(grid.scales)).values(integers)


def steps(grid: Grid) -> torch.Tensor:
    """(O, I) what one level of each entry counts: its scale, times its column's factor."""
    wide = grid.scales.repeat_interleave(grid.group, 1)
    return wide if grid.columns is None else wide * grid.columns


def refit(target: torch.Tensor, integers: torch.Tensor, grid: Grid, gram: torch.Tensor) -> Grid:
    """The grid with each output channel's scales by least squares, its integers (O, I) kept, under gram (I, I).

    The error tr((Q - T) G (Q - T)^T) to the target T (O, I) falls or stays in every row; zeros and signs stay. Channels that
    cannot be bettered, and grids whose scales are not free, stay as they are.
    """
    if not free_scales(grid):
        return grid
    unit, pulled = units(integers, grid), target @ gram
    step = max(1, _ROOM // grid.scales.shape[1] ** 2)
    solved = [
        _solved(unit[rows], pulled[rows], grid.scales[rows], gram)
        for rows in (slice(start, start + step) for start in range(0, len(target), step))
    ]
    return dataclasses.replace(grid, scales=_accepted(torch.cat(solved), unit, target, grid, gram))


def _solved(
    unit: torch.Tensor, pulled: torch.Tensor, scales: torch.Tensor, gram: torch.Tensor
) -> torch.Tensor:
    """Least-squares scales (o, G) of some rows: for each row a small system (G, G), solved for the change of its scales."""
    groups = scales.shape[1]
    group = unit.shape[1] // groups
    system = torch.stack(
        [
            ((part @ matrix) * unit).unflatten(1, (groups, group)).sum(2)
            for part, matrix in zip(unit.split(group, 1), gram.split(group), strict=True)
        ],
        1,
    ).double()  # (o, G, G)
    right = (unit * pulled).unflatten(1, (groups, group)).sum(2).double()
    right -= (system @ scales.double()[..., None])[..., 0]
    diagonal = system.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0  # all units zero, or all inputs dead: any scale will do
    diagonal.mul_(1 + 1e-6).add_(empty)
    right[empty] = 0.0
    root, failed = torch.linalg.cholesky_ex(system)
    change = torch.cholesky_solve(right[..., None], root)[..., 0]
    return (scales + torch.where(failed[:, None] == 0, change, 0.0)).float()


def _accepted(
    scales: torch.Tensor, unit: torch.Tensor, target: torch.Tensor, grid: Grid, gram: torch.Tensor
) -> torch.Tensor:
    """Scales (O, G) as they can be stored, of the channels where they lower the error; the grid's own elsewhere."""
    before = grid.scales
    after = storable(scales, before)
    changes = [unit * one.repeat_interleave(grid.group, 1) - target for one in (before, after)]
    errors = [output_error(change, gram) for change in changes]
    better = (errors[1] < errors[0]) & (after * before > 0).all(1) & after.isfinite().all(1)
    return torch.where(better[:, None], after, before)
