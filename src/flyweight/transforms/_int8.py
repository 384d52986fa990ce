"""What the methods with 8-bit arithmetic share: integer weights per output channel, and scales of activations."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import nn

from flyweight.analysis.sites import Range
from flyweight.codes import integer
from flyweight.transforms._quantized import QuantizedLayer, is_transposed, rows

_SHRINKS = torch.linspace(1.0, 0.5, 26)
"""Factors tried on a range when searching the one with the least squared error."""


def misfit(module: nn.Module, kind: str) -> str | None:
    """Why a layer's weight cannot be 8-bit integers per output channel, or None."""
    outputs, inputs = rows(module, kind).shape
    return integer.refuse(outputs, inputs, integer.Options())


def int8(module: nn.Module, kind: str, *, reduced: bool, input_scale: float | None = None) -> QuantizedLayer:
    """A copy of a layer with its weight as 8-bit integers, one scale per output channel, which covers all of it.

    reduced: in [-64, 64]. input_scale: of static activations; no weight scale may then be so small that the bias overflows
    32-bit integers in units of their product.
    """
    options = integer.Options(reduced=reduced, range="minmax")
    weight = rows(module, kind).float()
    grid = integer.fit(weight, options)
    bias = getattr(module, "bias", None)
    if input_scale is not None and bias is not None:
        floor = bias.detach().float().abs() / (input_scale * 2**30)
        grid = dataclasses.replace(grid, scales=torch.maximum(grid.scales, floor[:, None]))
    encoded = (grid.nearest(weight), grid)
    return QuantizedLayer(module, "integer", options, encoded, transposed=is_transposed(module, kind))


@functools.lru_cache(maxsize=65536)
def activation_grid(seen: Range, method: str) -> tuple[float, int]:
    """(scale, zero point) of the unsigned 8-bit grid for a range; zero is always a point of it.

    method: "minmax" covers every value seen; "percentile" all but 1 in 10,000 at each end; "mse" the range with the least
    squared error on the sample. A range of 0 gets scale 1.
    """
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if method == "percentile" and seen.sample.numel():
        ends = torch.quantile(seen.sample, torch.tensor([1e-4, 1 - 1e-4]))
        low, high = min(float(ends[0]), 0.0), max(float(ends[1]), 0.0)
    elif method == "mse" and seen.sample.numel():
        errors = [_activation_error(seen.sample, low * float(s), high * float(s)) for s in _SHRINKS]
        shrink = float(_SHRINKS[errors.index(min(errors))])
        low, high = low * shrink, high * shrink
    return _affine(low, high)


def _affine(low: float, high: float) -> tuple[float, int]:
    scale = (high - low) / 255
    return (scale, min(255, max(0, round(-low / scale)))) if scale > 1e-30 else (1.0, 0)


def _activation_error(sample: torch.Tensor, low: float, high: float) -> float:
    scale, zero = _affine(low, high)
    codes = (sample / scale).round_().add_(zero).clamp_(0, 255)
    return float((codes.sub_(zero).mul_(scale) - sample).square_().mean())
