"""Weights, grids and Gram matrices for the roundings' tests, and what an integer stands for, told slowly."""

from __future__ import annotations

import dataclasses

import torch

from flyweight.codes import Grid
from flyweight.discover import methods
from flyweight.roundings import Seen

ROUNDINGS = tuple(name for name in methods("roundings") if name not in ("waterfilling", "alternating"))
"""Those that work with every code."""


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symmetric(weight: torch.Tensor, bits: int = 4, group: int | None = None) -> Grid:
    group = group or weight.shape[1]
    high = 2 ** (bits - 1) - 1
    largest = weight.unflatten(1, (-1, group)).abs().amax(2)
    return Grid(-high, high, group, torch.where(largest > 0, largest / high, 1.0))


def asymmetric(weight: torch.Tensor, bits: int = 3, group: int | None = None) -> Grid:
    group, high = group or weight.shape[1], 2**bits - 1
    groups = weight.unflatten(1, (-1, group))
    low = groups.amin(2).clamp(max=0)
    scales = (groups.amax(2).clamp(min=0) - low) / high
    scales = torch.where(scales > 0, scales, 1.0)
    return Grid(0, high, group, scales, (-low / scales).round().clamp(0, high))


def signed(weight: torch.Tensor, bits: int = 3, group: int | None = None) -> Grid:
    """Every second output channel has negative scales."""
    grid = symmetric(weight, bits, group)
    signs = torch.ones(len(weight), 1)
    signs[1::2] = -1
    return dataclasses.replace(grid, low=grid.low - 1, scales=grid.scales * signs)


def tabled(weight: torch.Tensor, group: int | None = None, tables: int = 1) -> Grid:
    """Uneven levels, another table for each block of channels."""
    table = torch.tensor([-1.0, -0.55, -0.25, -0.1, 0.0, 0.125, 0.3, 0.7])
    grid = symmetric(weight, 2, group)
    return dataclasses.replace(
        grid, low=0, high=7, table=torch.stack([table * (k + 1) for k in range(tables)])
    )


def factored(weight: torch.Tensor, group: int | None = None) -> Grid:
    """Every column has a factor of its own."""
    factors = torch.exp(torch.linspace(-0.5, 0.5, weight.shape[1]))
    return dataclasses.replace(symmetric(weight / factors, 4, group), columns=factors)


def grids(weight: torch.Tensor, group: int | None = None) -> dict[str, Grid]:
    """One grid of each kind for a weight (O, I)."""
    return {
        "symmetric": symmetric(weight, 4, group),
        "asymmetric": asymmetric(weight, 3, group),
        "signed": signed(weight, 3, group),
        "table": tabled(weight, group),
        "tables": tabled(weight, group, 2 if len(weight) % 2 == 0 else 1),
        "columns": factored(weight, group),
    }


KINDS = tuple(grids(torch.ones(2, 2)))


def gram(inputs: int, count: int = 64, seed: int = 0) -> torch.Tensor:
    """(I, I) of inputs that go together and differ in size."""
    found = random(seed)
    mix = torch.eye(inputs) + torch.randn(inputs, inputs, generator=found) / inputs**0.5
    x = (
        torch.randn(count, inputs, generator=found)
        @ mix
        * torch.exp(torch.randn(inputs, generator=found) / 2)
    )
    return x.T @ x / count


def seen(matrix: torch.Tensor) -> Seen:
    return Seen(energy=matrix.diagonal(), gram=matrix)


def points(grid: Grid, column: int) -> torch.Tensor:
    """(O, n) float64: all values that a column's entries may take, by the definition, for integers low, low + 1, ..."""
    rows, group = len(grid.scales), column // grid.group
    levels = torch.arange(grid.low, grid.high + 1).double().expand(rows, -1)
    if grid.table is not None:
        levels = grid.table.double().repeat_interleave(rows // len(grid.table), 0)
    zeros = 0.0 if grid.zeros is None else grid.zeros[:, group, None].double()
    factor = 1.0 if grid.columns is None else float(grid.columns[column])
    return (levels - zeros) * grid.scales[:, group, None].double() * factor


def decoded(integers: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(O, I) float64 values of integers, column by column."""
    return torch.stack(
        [
            points(grid, k).gather(1, (integers[:, k, None].long() - grid.low))[:, 0]
            for k in range(integers.shape[1])
        ],
        1,
    )


def output_errors(
    integers: torch.Tensor, grid: Grid, target: torch.Tensor, matrix: torch.Tensor
) -> torch.Tensor:
    """(O,) float64: (q - t) G (q - t)^T of each row."""
    change = decoded(integers, grid) - target.double()
    return torch.stack([row @ matrix.double() @ row for row in change])
