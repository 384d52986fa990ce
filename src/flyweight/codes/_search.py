"""Scales that leave little squared error, for any set of levels.

Shapes: (A, G, n) groups of entries that share a scale; (1, G, n) what each entry counts, or None; (A, G)
scales, zeros and errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch

Level: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""The nearest level of each number; it may work in place."""
TINY = 1e-30
"""Scales below it count as 0."""


class Scaling(NamedTuple):
    """One scale and zero per group: value = (level - zero) * scale."""

    scales: torch.Tensor  # (A, G)
    zeros: torch.Tensor | None = None  # (A, G)


def roots(weight: torch.Tensor) -> torch.Tensor:
    """The root of the mean square (O, 1) of each output channel of a weight (O, I), 1 where it is too small."""
    return usable(weight.double().square().mean(1, keepdim=True).sqrt().float())


def usable(scales: torch.Tensor) -> torch.Tensor:
    """The scales, and 1 where they are too small to divide by."""
    return torch.where(scales.abs() > TINY, scales, 1.0)


def error(groups: torch.Tensor, counts: torch.Tensor | None, scaling: Scaling, level: Level) -> torch.Tensor:
    """Weighted squared error (A, G) of rounding to the nearest level."""
    square = _levels(groups, scaling, level).mul_(scaling.scales[..., None]).sub_(groups).square_()
    return (square if counts is None else square.mul_(counts)).sum(-1)


def best(
    groups: torch.Tensor, counts: torch.Tensor | None, candidates: Sequence[Scaling], level: Level
) -> Scaling:
    """Each group's candidate with the least error; the first of equals."""
    found = candidates[0]
    if len(candidates) == 1:
        return found
    least = error(groups, counts, found, level)
    for candidate in candidates[1:]:
        its = error(groups, counts, candidate, level)
        better = its < least
        found, least = _mixed(better, candidate, found), torch.where(better, its, least)
    return found


def least_squares(
    groups: torch.Tensor, counts: torch.Tensor | None, candidates: Sequence[Scaling], level: Level
) -> Scaling:
    """Each group's candidate whose levels serve best, with the scale that is best for these levels."""
    weighted = groups if counts is None else groups * counts
    found, most = _refitted(groups, weighted, counts, candidates[0], level)
    for candidate in candidates[1:]:
        refitted, explained = _refitted(groups, weighted, counts, candidate, level)
        better = explained > most
        found, most = _mixed(better, refitted, found), torch.where(better, explained, most)
    return found


NEAR = (1.0, 0.97, 0.985, 1.015, 1.03)
"""Scales beside one that was found."""


def searched(
    groups: torch.Tensor,
    counts: torch.Tensor | None,
    covering: torch.Tensor,
    factors: Sequence[float],
    level: Level,
) -> tuple[Scaling, Scaling]:
    """Two scalings with little error, one after the other fitted: from scales (A, G) times factors, then times those near."""
    coarse = least_squares(groups, counts, [Scaling(covering * f) for f in factors], level)
    fine = least_squares(groups, counts, [Scaling(coarse.scales * f) for f in NEAR], level)
    return fine, least_squares(groups, counts, [fine], level)


def _refitted(
    groups: torch.Tensor,
    weighted: torch.Tensor,
    counts: torch.Tensor | None,
    candidate: Scaling,
    level: Level,
) -> tuple[Scaling, torch.Tensor]:
    """For levels q the best scale is t = sum(c q x) / sum(c q q); it explains t sum(c q x) of sum(c x x)."""
    levels = _levels(groups, candidate, level)
    along = (levels * weighted).sum(-1)
    square = levels.square_()
    length = (square if counts is None else square.mul_(counts)).sum(-1)
    scales = torch.where(length > 0, along / length.clamp(min=TINY), candidate.scales)
    return Scaling(usable(scales), candidate.zeros), scales * along


def _levels(groups: torch.Tensor, scaling: Scaling, level: Level) -> torch.Tensor:
    numbers = groups / scaling.scales[..., None]
    if scaling.zeros is None:
        return level(numbers)
    zeros = scaling.zeros[..., None]
    return level(numbers.add_(zeros)).sub_(zeros)


def _mixed(which: torch.Tensor, one: Scaling, other: Scaling) -> Scaling:
    zeros = None
    if one.zeros is not None and other.zeros is not None:
        zeros = torch.where(which, one.zeros, other.zeros)
    return Scaling(torch.where(which, one.scales, other.scales), zeros)
