"""Each entry by itself: the nearest point of the grid.

As in Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference"
(arXiv 1712.05877, 2018). Halves go where Grid.nearest says. Weights with NaN or infinite entries are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flyweight.codes._grid import Grid
from flyweight.roundings._checks import sound_energy, sound_weight
from flyweight.roundings._seen import Seen

NEEDS = "nothing"


@dataclass(frozen=True, kw_only=True)
class Options:
    """There is nothing to choose."""


def pick(weight: torch.Tensor, grid: Grid, seen: Seen, options: Options) -> tuple[torch.Tensor, Grid]:
    """The int16 integers (O, I) nearest to a weight (O, I), and the grid as it came.

    Inputs that share an integer count by seen.energy where it is known. Raises ModelError for a weight that is not finite,
    UsageError for a grid that does not fit it, DataError for such an energy of another shape or not finite.
    """
    weight = sound_weight(weight, grid)
    energy = sound_energy(seen, weight) if grid.width > 1 else None
    return grid.nearest(weight, energy=energy), grid
