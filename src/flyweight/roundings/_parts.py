"""Layers whose output channels read different inputs (grouped and depthwise convolutions): a rounding, part by part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flyweight.codes._grid import Grid
from flyweight.errors import UsageError
from flyweight.roundings._seen import Seen


def pick_parts(
    pick: Callable[[torch.Tensor, Grid, Seen, Any], tuple[torch.Tensor, Grid]],
    weight: torch.Tensor,
    grid: Grid,
    seen: Sequence[Seen],
    options: Any,
) -> tuple[torch.Tensor, Grid]:
    """A rounding's answer for a weight (O, I) in equal parts of output channels, in order, each with its own inputs seen.

    Raises UsageError when the parts do not divide O or want factors of columns of their own, and what pick raises.
    """
    if not seen or len(weight) % len(seen):
        raise UsageError(
            "parts must divide the output channels", got=f"{len(seen)} parts of {len(weight)} channels"
        )
    step = len(weight) // len(seen)
    places = [slice(start, start + step) for start in range(0, len(weight), step)]
    found = [pick(weight[at], rows_of(grid, at), one, options) for at, one in zip(places, seen, strict=True)]
    _require_shared(grid, [part for _, part in found])
    scales = torch.cat([part.scales for _, part in found])
    zeros = [part.zeros for _, part in found if part.zeros is not None]
    masks = [part.mask for _, part in found if part.mask is not None]
    return torch.cat([integers for integers, _ in found]), dataclasses.replace(
        grid,
        scales=scales,
        zeros=torch.cat(zeros) if zeros else None,
        mask=torch.cat(masks) if masks else None,
    )


def _require_shared(grid: Grid, parts: Sequence[Grid]) -> None:
    """Raise UsageError where a part's columns have other factors than the whole grid's: there is one for each column."""
    for part in parts:
        same = part.columns is grid.columns or (
            part.columns is not None and grid.columns is not None and torch.equal(part.columns, grid.columns)
        )
        if not same:
            raise UsageError(
                "output channels that read different inputs cannot share factors of columns", got="others for each",
                way_out="take a rounding that leaves the grid's columns, such as error_feedback",
            )  # fmt: skip


def rows_of(grid: Grid, rows: slice) -> Grid:
    """The grid of some output channels."""
    table = grid.table
    if table is not None and len(table) > 1:
        table = table.repeat_interleave(len(grid.scales) // len(table), 0)[rows]
    zeros, offsets = (None if one is None else one[rows] for one in (grid.zeros, grid.offsets))
    mask = None if grid.mask is None else grid.mask[rows]
    return dataclasses.replace(
        grid, scales=grid.scales[rows], zeros=zeros, offsets=offsets, table=table, mask=mask
    )
