"""Coordinate descent: sweeps over the columns, each entry set to the nearest point of its optimum given all the others.

Behdin et al., "QuantEase: Optimization-based quantization for language models" (arXiv 2309.01885, 2023). It starts from the
result of error feedback, and no sweep makes the error tr((Q - W) G (Q - W)^T) of any output channel larger; with `refit`
least squares fits the scales anew after each sweep, which does not either. Where error feedback aims at another target
(drift), so does this. Weights of inputs that were always zero stay. Weights or matrices with NaN are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flyweight.codes._grid import Grid
from flyweight.codes._options import require
from flyweight.roundings import _vectors, error_feedback
from flyweight.roundings._checks import sound_gram
from flyweight.roundings._columns import columns, nearest_column
from flyweight.roundings._refit import refit
from flyweight.roundings._seen import Seen

NEEDS = "gram"

_BLOCK = 128
"""Columns between two large matrix products."""
_CLEAR = 1 - 1e-6
"""An entry moves only when that brings it nearer to its optimum by more than float32 can mistake."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How long to go on, and how error feedback begins."""

    sweeps: int = 4
    """Sweeps over all columns, 1 to 100; fewer when nothing changes any more."""
    refit: bool = False
    """Fit the scales anew after each sweep."""
    act_order: bool = True
    """Of error feedback: inputs with the largest mean square first."""
    damping: float = 0.01
    """Of error feedback: share of the mean diagonal added to the Gram matrix's diagonal, in [0, 1]."""
    drift: float = 0.5
    """Of error feedback: share of the earlier layers' changes that this layer makes up for, in [0, 1]."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(1 <= self.sweeps <= 100, "sweeps", "from 1 to 100", self.sweeps)
        _start(self)


def pick(weight: torch.Tensor, grid: Grid, seen: Seen, options: Options) -> tuple[torch.Tensor, Grid]:
    """The int16 integers (O, I) of a weight (O, I) by coordinate descent, and the grid, with other scales when refitted.

    Raises DataError when seen.gram is missing, or it or seen.cross is not finite or misshapen, ModelError or UsageError for a
    weight or grid that cannot be used.
    """
    integers, target = error_feedback.feed_back(weight, grid, seen, _start(options))
    gram = sound_gram(seen, target)
    for _ in range(options.sweeps):
        one = sweep if grid.width == 1 else _vectors.swept
        swept = one(integers, target, grid, gram)
        fitted = refit(target, swept, grid, gram) if options.refit else grid
        still = torch.equal(swept, integers) and torch.equal(fitted.scales, grid.scales)
        integers, grid = swept, fitted
        if still:
            break
    return integers, grid


def sweep(integers: torch.Tensor, target: torch.Tensor, grid: Grid, gram: torch.Tensor) -> torch.Tensor:
    """The int16 integers (O, I) after one sweep over the columns, first to last, towards a target (O, I)."""
    on, curves = columns(grid), gram.diagonal().tolist()
    found, values = integers.T.float().contiguous(), grid.values(integers).T.contiguous()  # (I, O)
    errors = values - target.T
    for start in range(0, len(curves), _BLOCK):
        end = min(start + _BLOCK, len(curves))
        slopes, steps = gram[start:end] @ errors, torch.zeros_like(errors[start:end])
        for k in range(start, end):
            if curves[k] <= 0:
                continue
            slope = slopes[k - start] + gram[k, start:k] @ steps[: k - start]
            wish = values[k] - slope / curves[k]
            at, value = nearest_column(on, wish, k)
            nearer = (value - wish).abs() < (values[k] - wish).abs() * _CLEAR
            moved = torch.where(nearer, value, values[k])
            steps[k - start], values[k] = moved - values[k], moved
            found[k] = torch.where(nearer, at, found[k])
        torch.sub(values[start:end], target.T[start:end], out=errors[start:end])
    return found.T.to(torch.int16).contiguous()


def _start(options: Options) -> error_feedback.Options:
    """The options that error feedback begins with; raises UsageError when one is out of range."""
    return error_feedback.Options(act_order=options.act_order, damping=options.damping, drift=options.drift)
