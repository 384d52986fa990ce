"""A weight and its inputs' energy as codes take them: checked, in float32, split into what shares a scale.

Shapes: (O, I) a weight; (A, G, n) its groups: n entries share a scale, G groups lie in a row. A is O, or 1 where the whole
tensor shares one scale.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flyweight.errors import DataError, ModelError, UsageError

LIMIT = 1e30
"""Entries beyond it could leave float32 when they are multiplied with scales."""
_CHUNK = 2**16
"""Entries that are worked on at a time: they stay in a core's cache."""


def checked(weight: torch.Tensor, energy: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight (O, I) in float32, and its inputs' energy (I,) with a mean of 1; None where that says nothing.

    Raises ModelError and DataError for what is not finite or has another shape.
    """
    if weight.ndim != 2:
        raise ModelError("a weight must have two dimensions", got=f"shape {tuple(weight.shape)}")
    found = weight.detach().float().contiguous()
    wrong = int((~(found.abs() <= LIMIT)).sum())
    if wrong:
        raise ModelError(
            "weights must be finite and at most 1e30", got=f"{wrong:,} of {found.numel():,} that are not"
        )
    return found, None if energy is None else _energy(energy, found.shape[1])


def _energy(energy: torch.Tensor, columns: int) -> torch.Tensor | None:
    if energy.shape != (columns,):
        raise DataError(f"the energy of {columns} inputs must have that shape", got=str(tuple(energy.shape)))
    found = energy.detach().double()
    if not bool((torch.isfinite(found) & (found >= 0)).all()):
        raise DataError("the energy of inputs must be finite and not negative")
    mean = found.mean()
    return (found / mean).float() if float(mean) > 0 else None


def require_fit(reason: str | None) -> None:
    """Raise UsageError with the reason why a code does not fit a weight, if there is one."""
    if reason:
        raise UsageError("the code must fit the weight", got=reason)


def misfit(rows: int, columns: int, group: int | str | None) -> str | None:
    """Why a weight of that shape cannot be split into groups, or None."""
    if rows < 1 or columns < 1:
        return "the weight has no entries"
    if isinstance(group, int) and columns % group:
        return f"its {columns} inputs do not divide into groups of {group}"
    if group is None and columns == 1:
        return "its channels have one input each, and every entry would get a scale of its own"
    return None


def no_gain(rows: int, columns: int, taken: int) -> str | None:
    """Why so many bytes do not pay for a weight of that shape, or None."""
    plain = 4 * rows * columns
    return f"it would take {taken:,} bytes, as float32 it takes {plain:,}" if taken >= plain else None


def scale_shape(rows: int, columns: int, group: int | str | None) -> tuple[int, int]:
    """Rows and columns of the scales that are stored."""
    if group == "tensor":
        return 1, 1
    return rows, columns // group if isinstance(group, int) else 1


def grouped(
    weight: torch.Tensor, energy: torch.Tensor | None, group: int | str | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The groups (A, G, n) of a weight (O, I), and what each entry counts: (1, G, n), or None where all count the same.

    A group without any energy counts evenly.
    """
    if group == "tensor":
        groups = weight.reshape(1, 1, -1)
        counts = None if energy is None else energy.repeat(len(weight))[None, None]
    else:
        length = group if isinstance(group, int) else weight.shape[1]
        groups = weight.unflatten(1, (-1, length))
        counts = None if energy is None else energy.view(1, -1, length)
    if counts is not None:
        counts = torch.where((counts == 0).all(-1, keepdim=True), 1.0, counts)
    return groups, counts


def chunks(groups: torch.Tensor) -> Iterator[torch.Tensor]:
    """Groups (A, G, n) in pieces of few rows, (a, G, n) each."""
    return iter(groups.split(max(1, _CHUNK // groups[0].numel())))


def spread(found: torch.Tensor, rows: int) -> torch.Tensor:
    """Scales or zeros (A, G) as a grid holds them: (O, G)."""
    return found.expand(rows, -1).contiguous()


def group_length(columns: int, group: int | str | None) -> int:
    """Inputs of one row that share a scale."""
    return group if isinstance(group, int) else columns
