"""Refuses what no rounding can work with, at the border: weights, grids and statistics."""

from __future__ import annotations

import torch

from flyweight.codes._grid import Grid
from flyweight.errors import DataError, ModelError, UsageError
from flyweight.roundings._seen import Seen


def sound_weight(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The weight (O, I) as contiguous float32; raises ModelError unless finite, UsageError unless the grid fits it."""
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise ModelError(
            "weights must be finite",
            got=f"{bad} of {weight.numel()} values NaN or infinite",
            way_out="repair or retrain the model",
        )
    fitting = weight.ndim == 2 and grid.scales.ndim == 2 and len(grid.scales) == len(weight)
    if not fitting or grid.scales.shape[1] * grid.group != weight.shape[1]:
        raise UsageError(
            "a grid must hold one scale for each group of inputs of each output channel",
            got=f"scales {tuple(grid.scales.shape)} in groups of {grid.group} for a weight {tuple(weight.shape)}",
            way_out="take a group that divides the inputs",
        )
    return weight.detach().float().contiguous()


def sound_gram(seen: Seen, weight: torch.Tensor) -> torch.Tensor:
    """The Gram matrix (I, I) as float32 beside the weight (O, I); raises DataError when missing, misshapen or not finite."""
    return _square(seen.gram, weight, "the Gram matrix of the inputs")


def sound_cross(seen: Seen, weight: torch.Tensor) -> torch.Tensor:
    """The cross matrix (I, I) as float32 beside the weight (O, I); raises DataError when missing, misshapen or not finite."""
    return _square(seen.cross, weight, "the cross matrix of original and new inputs")


def sound_energy(seen: Seen, weight: torch.Tensor) -> torch.Tensor:
    """The energy (I,) as float32 beside the weight (O, I), ones where unknown; raises DataError when it cannot be used."""
    inputs = weight.shape[1]
    if seen.energy is None:
        return weight.new_ones(inputs)
    _check_shape(seen.energy, (inputs,), "the energy of the inputs")
    return seen.energy.to(weight)


def _square(matrix: torch.Tensor | None, weight: torch.Tensor, name: str) -> torch.Tensor:
    if matrix is None:
        raise DataError(
            f"{name} must be known",
            got="none",
            way_out="give examples that reach the layer, or take the rounding nearest",
        )
    _check_shape(matrix, (weight.shape[1],) * 2, name)
    return matrix.to(weight)


def _check_shape(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(tensor.shape) != shape:
        raise DataError(f"{name} must have the shape {shape}", got=str(tuple(tensor.shape)))
    if not bool(torch.isfinite(tensor).all()):
        raise DataError(
            f"{name} must be finite",
            got=f"{int((~torch.isfinite(tensor)).sum())} values NaN or infinite",
            way_out="check the examples and the layers before this one",
        )
