"""What stays of a sparse weight, chosen together with what makes up for the rest, by alternating directions.

Two weights are drawn towards each other: one keeps the layer's output near the original's, the other has the zeros that the
pattern asks for, and is at each turn the nearest such weight (ADMM: Meng et al., "ALPS", arXiv 2406.07831, 2024; Boza, "Fast
and effective weight update for pruned large language models", arXiv 2401.02938, 2024). Scores of single entries,
as Wanda's and SparseGPT's, know nothing of each other. The pull grows until the two agree. Then the values that stay are
picked by `coordinate`, on scales that follow their size.

Grids without a pattern of zeros are refused, as are weights or matrices with NaN.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import cast

import torch

from flyweight.codes._grid import Grid
from flyweight.codes._options import require
from flyweight.codes._sparsity import Pattern
from flyweight.errors import UsageError
from flyweight.roundings import coordinate
from flyweight.roundings._checks import sound_gram, sound_weight
from flyweight.roundings._factor import factorize
from flyweight.roundings._refit import free_scales
from flyweight.roundings._seen import Seen
from flyweight.roundings.error_feedback import target_of

NEEDS = "gram"

_FIRST, _LAST = 0.03, 3.0
"""The pull at the first and the last turn, in mean squares of an input."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How many turns, and how the values are picked then."""

    turns: int = 20
    """Turns of the two weights, 2 to 1000."""
    sweeps: int = 4
    """Of `coordinate`: sweeps over all columns, 1 to 100."""
    refit: bool = False
    """Of `coordinate`: fit the scales anew after each sweep."""
    damping: float = 0.01
    """Share of the mean diagonal added to the Gram matrix's diagonal, in [0, 1]."""
    drift: float = 0.5
    """Share of the earlier layers' changes that this layer makes up for, in [0, 1]."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(2 <= self.turns <= 1000, "turns", "from 2 to 1000", self.turns)
        _values(self)


def pick(weight: torch.Tensor, grid: Grid, seen: Seen, options: Options) -> tuple[torch.Tensor, Grid]:
    """The int16 integers (O, I) of a weight (O, I), and the grid with another mask and other scales.

    Raises DataError when seen.gram is missing, or it or seen.cross is not finite or misshapen, ModelError or UsageError for a
    weight or grid that cannot be used.
    """
    if grid.pattern is None:
        raise UsageError(
            "alternating chooses what becomes zero", got="a code whose entries all stay",
            way_out="take the code sparse, or the rounding coordinate",
        )  # fmt: skip
    weight, gram = sound_weight(weight, grid), sound_gram(seen, weight)
    factor = factorize(gram, True, options.damping)
    if factor is not None:
        target = target_of(weight, gram, seen, factor, options.drift)
        grid = _on(*chosen(target, gram, grid.pattern, options), weight, grid)
    return coordinate.pick(weight, grid, seen, _values(options))


def chosen(
    target: torch.Tensor, gram: torch.Tensor, pattern: Pattern, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask (O, I) of what stays of a target (O, I) under gram (I, I), and what it becomes, zeros elsewhere."""
    diagonal = gram.diagonal()
    sizes = diagonal.clamp(min=options.damping * float(diagonal.mean())).sqrt()
    level = gram / sizes / sizes[:, None]  # all inputs alike, so that one pull serves them all
    curves, turned = torch.linalg.eigh(level + options.damping * torch.eye(len(level)).to(level))
    sparse, gap = target * sizes, torch.zeros_like(target)
    aim, mask = (sparse @ turned) * curves, gap > 0
    growth = (_LAST / _FIRST) ** (1 / (options.turns - 1))
    for turn in range(options.turns):
        pull = _FIRST * growth**turn
        full = ((aim + pull * (sparse - gap) @ turned) / (curves + pull)) @ turned.T
        mask = pattern.spread(pattern.choose((full + gap).square()))
        sparse = (full + gap) * mask
        gap = (full + gap - sparse) / growth  # in units of the pull, which grows
    return mask, sparse / sizes


def _on(mask: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor, grid: Grid) -> Grid:
    """The grid with another mask (O, I), and free scales as much larger as what stays, (O, I), has become."""
    grid, before = dataclasses.replace(grid, mask=mask), cast(torch.Tensor, grid.mask)
    if not free_scales(grid):
        return grid
    sizes = (one.unflatten(1, (-1, grid.group)).square().mean(2).sqrt() for one in (weight * before, kept))
    ratio = 1 / torch.div(*sizes)
    usable = ratio.isfinite() & (ratio > 0)
    return dataclasses.replace(grid, scales=grid.scales * torch.where(usable, ratio, 1.0))


def _values(options: Options) -> coordinate.Options:
    """The options that values are picked with; raises UsageError when one is out of range."""
    return coordinate.Options(
        sweeps=options.sweeps, refit=options.refit, damping=options.damping, drift=options.drift
    )
