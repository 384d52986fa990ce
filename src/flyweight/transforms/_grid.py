"""Integer grids: how a weight becomes packed integers with scales, and how a range of activations becomes one scale.

Shapes: O output channels, I inputs of one output channel (kernel elements included), G groups along I.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from flyweight.analysis.sites import Range

_SHRINKS = torch.linspace(1.0, 0.5, 26)
"""Factors tried on a range when searching the one with the least squared error."""


@dataclass(frozen=True)
class Grid:
    """The integers a weight may take: [low, high], one scale per output channel or per group of inputs."""

    bits: int
    group: int | None
    """Inputs that share a scale; None: all inputs of an output channel."""
    symmetric: bool
    low: int
    high: int


@dataclass(frozen=True)
class Encoded:
    """A weight as integers: weight = (codes - zeros) * scales."""

    codes: torch.Tensor  # (O, I) int8 when symmetric, else uint8
    scales: torch.Tensor  # (O, G) float32
    zeros: torch.Tensor | None  # (O, G) uint8; None when symmetric


def grid(bits: int, group: int | None, symmetric: bool, reduced: bool = False) -> Grid:
    """The grid of so many bits; reduced leaves out half of it, so that 8-bit products cannot saturate 16-bit sums."""
    if not symmetric:
        return Grid(bits, group, False, 0, 2**bits - 1)
    high = 2 ** (bits - 2) if reduced else 2 ** (bits - 1) - 1
    return Grid(bits, group, True, -high, high)


def encode(
    weight: torch.Tensor, on: Grid, energy: torch.Tensor | None = None, floor: torch.Tensor | None = None
) -> Encoded:
    """Round a weight (O, I) to the nearest points of a grid.

    The grid's group must divide I. Below 8 bits the scale of each group minimizes the squared error, weighted by the
    inputs' energy (I,) where given. No scale is below its channel's floor (O,). All-zero groups get scale 1 and decode to
    exact zeros.
    """
    groups = _grouped(weight.float(), on.group)  # (O, G, group)
    weights = None if energy is None else _grouped(energy.float()[None], on.group)  # (1, G, group)
    low, high = groups.amin(-1), groups.amax(-1)
    best = _fit(low, high, on)
    if on.bits < 8:
        error = _error(groups, best, on, weights)
        for shrink in _SHRINKS[1:]:
            candidate = _fit(low * shrink, high * shrink, on)
            its_error = _error(groups, candidate, on, weights)
            better = its_error < error
            best = (torch.where(better, candidate[0], best[0]), torch.where(better, candidate[1], best[1]))
            error = torch.where(better, its_error, error)
    scales, zeros = best
    if floor is not None:
        scales = torch.maximum(scales, floor[:, None])
    codes = _round(groups, scales, zeros, on).flatten(1)
    kind = torch.int8 if on.symmetric else torch.uint8
    return Encoded(codes.to(kind), scales, None if on.symmetric else zeros.to(torch.uint8))


def decode(encoded: Encoded) -> torch.Tensor:
    """The float32 weight (O, I) that the integers stand for."""
    codes: torch.Tensor = encoded.codes.float().unflatten(1, (encoded.scales.shape[1], -1))
    if encoded.zeros is not None:
        codes = codes - encoded.zeros[..., None].float()
    return (codes * encoded.scales[..., None]).flatten(1)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit integers (O, I) a byte, (O, ceil(I / 2)) uint8; the even input is in the low half."""
    nibbles = (codes.to(torch.int16) & 15).to(torch.uint8)
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack(packed: torch.Tensor, inputs: int, symmetric: bool) -> torch.Tensor:
    """The (O, inputs) integers of `pack`, int8 when symmetric, else uint8."""
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, :inputs]
    if not symmetric:
        return nibbles
    signed = nibbles.to(torch.int8)
    return torch.where(signed > 7, signed - 16, signed)


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


def _grouped(weight: torch.Tensor, group: int | None) -> torch.Tensor:
    """(O, I) -> (O, G, group)."""
    return weight[:, None] if group is None else weight.unflatten(1, (-1, group))


def _fit(low: torch.Tensor, high: torch.Tensor, on: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points (O, G) that cover [low, high] and hold zero exactly."""
    if on.symmetric:
        scales = torch.maximum(low.abs(), high.abs()) / on.high
        scales = torch.where(scales > 1e-30, scales, 1.0)
        return scales, torch.zeros_like(scales)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = (high - low) / on.high
    scales = torch.where(scales > 1e-30, scales, 1.0)
    return scales, (-low / scales).round().clamp(0, on.high)


def _round(groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, on: Grid) -> torch.Tensor:
    codes: torch.Tensor = groups / scales[..., None]
    return codes.round_().add_(zeros[..., None]).clamp_(on.low, on.high)


def _error(
    groups: torch.Tensor, fit: tuple[torch.Tensor, ...], on: Grid, weights: torch.Tensor | None
) -> torch.Tensor:
    scales, zeros = fit
    codes = _round(groups, scales, zeros, on)
    square = codes.sub_(zeros[..., None]).mul_(scales[..., None]).sub_(groups).square_()
    return (square if weights is None else square * weights).sum(-1)
