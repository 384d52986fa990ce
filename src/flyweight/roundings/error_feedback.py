"""Column after column, each column's error carried into the columns that follow: GPTQ.

Frantar et al., "GPTQ: Accurate post-training quantization for generative pre-trained transformers" (arXiv 2210.17323, 2022),
in the form that needs no inverse (see _factor.py), on a grid fitted beforehand, so that columns may come in any order.
Of each output channel the better of this and plain rounding is kept, by the error tr((Q - W) G (Q - W)^T) on the inputs seen:
the result is never worse than `nearest` there.

With `drift` the aim is not the weight itself but what makes up for the change of the layer's inputs by the layers before it:
the least-squares weight from the new inputs to the original outputs, held near the weight by the damping, as in Li et al.,
"GPTAQ" (arXiv 2504.02692, 2025), and Zhang et al., "Qronos" (arXiv 2505.11695, 2025).

Inputs that were always zero have their weights rounded to nearest. Weights or matrices with NaN are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from flyweight.codes._grid import Grid
from flyweight.codes._options import require
from flyweight.roundings import _vectors
from flyweight.roundings._checks import sound_cross, sound_gram, sound_weight
from flyweight.roundings._columns import Columns, columns, nearest_column
from flyweight.roundings._factor import Factor, carried, factorize, solve
from flyweight.roundings._objective import better_rows
from flyweight.roundings._seen import Seen

NEEDS = "gram"

_BLOCK = 128
"""Columns between two large matrix products."""

Choose: TypeAlias = Callable[[Columns, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""Integers (O,) as floats and their values (O,) for a grid, a wish (O,) and a column, as `nearest_column`."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """In which order, how careful, and towards what."""

    act_order: bool = True
    """Inputs with the largest mean square first, while most columns are left to make up for them."""
    damping: float = 0.01
    """Added to the Gram matrix's diagonal, as a share of its mean, in [0, 1]; more where the matrix is singular."""
    drift: float = 0.5
    """Share of the earlier layers' changes that this layer makes up for, in [0, 1], where Seen.cross tells of them."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(0 <= self.damping <= 1, "damping", "in [0, 1]", self.damping)
        require(0 <= self.drift <= 1, "drift", "in [0, 1]", self.drift)


def pick(weight: torch.Tensor, grid: Grid, seen: Seen, options: Options) -> tuple[torch.Tensor, Grid]:
    """The int16 integers (O, I) of a weight (O, I) by error feedback, and the grid as it came.

    Raises DataError when seen.gram is missing, or it or seen.cross is not finite or misshapen, ModelError or UsageError for a
    weight or grid that cannot be used.
    """
    return feed_back(weight, grid, seen, options)[0], grid


def feed_back(
    weight: torch.Tensor, grid: Grid, seen: Seen, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers of `pick`, and the float32 weight (O, I) that they aim at; raises as `pick` does."""
    weight = sound_weight(weight, grid)
    gram = sound_gram(seen, weight)
    simple = grid.nearest(weight, energy=gram.diagonal())
    factor = factorize(gram, options.act_order, options.damping, grid.width)
    if factor is None:
        return simple, weight
    target = target_of(weight, gram, seen, factor, options.drift)
    found = fed(target, grid, factor) if grid.width == 1 else _vectors.fed(target, grid, factor)
    return better_rows(found, simple, target, grid, gram), target


def target_of(
    weight: torch.Tensor, gram: torch.Tensor, seen: Seen, factor: Factor, drift: float
) -> torch.Tensor:
    """What a weight (O, I) is rounded towards: itself, or with drift what makes up for changes before the layer.

    Raises DataError when there is drift and seen.cross is misshapen or not finite.
    """
    if drift <= 0 or seen.cross is None:
        return weight
    return weight + drift * _correction(weight, gram, sound_cross(seen, weight), factor)


def _correction(
    weight: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor, factor: Factor
) -> torch.Tensor:
    """T - W (O, I), where T is the least-squares weight from new inputs to original outputs, drawn towards W by the damping.

    T minimizes E|W x_original - T x|^2 + damping |T - W|^2, so T (gram + damping) = W (cross + damping).
    """
    pull = weight @ (cross - gram)
    pull[:, gram.diagonal() <= 0] = 0.0
    return solve(factor, pull)


def fed(target: torch.Tensor, grid: Grid, factor: Factor, choose: Choose = nearest_column) -> torch.Tensor:
    """The int16 integers (O, I): each column is the target plus its share of all errors before it, rounded by `choose`."""
    on, order, shares = columns(grid), factor.order, carried(factor).to(target)
    aims = target.T[order].contiguous()  # (I, O): a column of the weight lies together in memory
    errors, integers = torch.empty_like(aims), torch.empty_like(aims)
    places = order.tolist()
    for start in range(0, len(places), _BLOCK):
        end = min(start + _BLOCK, len(places))
        wishes = aims[start:end] + shares[start:end, :start] @ errors[:start]
        for k in range(start, end):
            wish = wishes[k - start] + shares[k, start:k] @ errors[start:k]
            integers[k], values = choose(on, wish, places[k])
            torch.sub(aims[k], values, out=errors[k])
    found = torch.empty_like(integers, dtype=torch.int16)
    found[order] = integers.to(torch.int16)
    return found.T.contiguous()
