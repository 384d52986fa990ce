"""What the methods with 8-bit arithmetic share: integer weights per output channel, and scales of activations."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import nn

from flyweight.analysis.sites import Range
from flyweight.codes import integer
from flyweight.codes._options import require_one_of
from flyweight.transforms._quantized import QuantizedLayer, is_transposed, rows

BIASES = ("keep", "correct", "add")
"""What `corrected` knows to do with a bias."""
_SHRINKS: tuple[float, ...] = tuple(torch.linspace(1.0, 0.5, 26).tolist())
"""Factors tried on a range when searching the one with the least squared error."""
_DEEPER: tuple[float, ...] = tuple(torch.linspace(1.0, 0.1, 46).tolist())
"""The same for fewer than 8 bits, where cutting off more pays."""


def misfit(module: nn.Module, kind: str) -> str | None:
    """Why a layer's weight cannot be 8-bit integers per output channel, or None."""
    outputs, inputs = rows(module, kind).shape
    return integer.refuse(outputs, inputs, integer.Options())


def cannot_add(module: nn.Module, bias: str) -> str | None:
    """Why a layer cannot be given a bias if it has none, or None."""
    return "its class has no place for a bias" if bias == "add" and not hasattr(module, "bias") else None


def corrected(
    layer: QuantizedLayer, module: nn.Module, kind: str, mean: torch.Tensor | None, bias: str
) -> QuantizedLayer:
    """The layer, its bias changed by the mean of what its output loses by the rounding of its weight.

    As in Nagel et al., "Data-free quantization through weight equalization and bias correction" (arXiv 1906.04721, 2019),
    with the mean of the inputs as seen: E[(W - W') x] = (W - W') E[x]. mean: (P, I), see SiteStatistics; None: not known,
    nothing is corrected. bias: "keep" it, "correct" it where there is one, or "add" one where there is none.
    """
    if bias == "keep" or (bias == "correct" and layer.bias is None):
        return layer
    weight = rows(module, kind)
    old = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
    lost = torch.zeros(len(weight), dtype=torch.float64)
    if mean is not None:
        integers, grid = layer.encoded()
        gaps = weight.double() - grid.values(integers).double()
        lost = (gaps.unflatten(0, (len(mean), -1)) @ mean.double()[..., None]).flatten()
    learns = layer.bias is None or layer.bias.requires_grad
    new = (old.double() + lost).to(old.dtype)
    layer.inner.register_parameter("bias", nn.Parameter(new, requires_grad=learns))
    return layer


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


def require_bias(bias: str) -> None:
    """Raise UsageError unless it says what happens to a bias."""
    require_one_of(bias, "bias", BIASES)


@functools.lru_cache(maxsize=65536)
def activation_grid(seen: Range, method: str, top: int = 255) -> tuple[float, int]:
    """(scale, zero point) of the unsigned grid 0 to top for a range; zero is always a point of it.

    method: "minmax" covers every value seen; "percentile" all but 1 in 10,000 at each end; "mse" the range with the least
    squared error on the sample. A range of 0 gets scale 1.
    """
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if method == "percentile" and seen.sample.numel():
        ends = torch.quantile(seen.sample, torch.tensor([1e-4, 1 - 1e-4]))
        low, high = min(float(ends[0]), 0.0), max(float(ends[1]), 0.0)
    elif method == "mse" and seen.sample.numel():
        shrinks = _SHRINKS if top == 255 else _DEEPER
        errors = [_activation_error(seen.sample, low * s, high * s, top) for s in shrinks]
        shrink = shrinks[errors.index(min(errors))]
        low, high = low * shrink, high * shrink
    return affine(low, high, top)


def affine(low: float, high: float, top: int = 255) -> tuple[float, int]:
    """(scale, zero point) of the unsigned grid 0 to top that reaches from low <= 0 to high >= 0; (1, 0) for no range."""
    scale = (high - low) / top
    return (scale, min(top, max(0, round(-low / scale)))) if scale > 1e-30 else (1.0, 0)


def _activation_error(sample: torch.Tensor, low: float, high: float, top: int) -> float:
    scale, zero = affine(low, high, top)
    codes = (sample / scale).round_().add_(zero).clamp_(0, top)
    return float((codes.sub_(zero).mul_(scale) - sample).square_().mean())
