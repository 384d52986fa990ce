"""What a choice of integers costs at the layer's output: the mean square of its error on the inputs seen."""

from __future__ import annotations

import torch

from flyweight.codes._grid import Grid


def output_error(change: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """(O,) mean squared change of each output when the weight changes by change (O, I), under gram (I, I)."""
    return ((change @ gram) * change).sum(1)


def better_rows(
    first: torch.Tensor, second: torch.Tensor, target: torch.Tensor, grid: Grid, gram: torch.Tensor
) -> torch.Tensor:
    """Integers (O, I): of each output channel the first's row, or the second's where its error to the target is smaller."""
    errors = [output_error(grid.values(one) - target, gram) for one in (first, second)]
    return torch.where((errors[1] < errors[0])[:, None], second, first)
