"""Floating-point numbers of 8 and 4 bits times a scale per tensor, channel or block of inputs.

e4m3 and e5m2 as in Micikevicius et al., "FP8 formats for deep learning" (arXiv 2209.05433, 2022); e2m1 in blocks of 32 with
powers of two as scales is MXFP4 (Rouhani et al., "Microscaling data formats", arXiv 2310.10537, 2023). An integer counts the
finite numbers of a format from zero, in both directions; its table is implied. What is stored are the format's own bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from flyweight.codes import _packing, _stored, _weights
from flyweight.codes._grid import Grid
from flyweight.codes._options import require_group, require_one_of
from flyweight.codes._search import Level, Scaling, best, searched, usable


@dataclass(frozen=True)
class _Format:
    """A sign, an exponent and a mantissa."""

    bits: int
    mantissa: int
    """Bits of the mantissa."""
    least: int
    """Exponent of the smallest normal number; smaller ones have its spacing."""
    count: int
    """Finite numbers above 0; the bits of the i-th are i."""

    def numbers(self) -> torch.Tensor:
        """0 and the finite numbers above it, ascending, float32."""
        index = torch.arange(self.count + 1)
        exponent, fraction = index >> self.mantissa, index & (2**self.mantissa - 1)
        whole = torch.where(exponent > 0, 2**self.mantissa, 0) + fraction
        return torch.ldexp(whole.double(), exponent.clamp(min=1) - 1 + self.least - self.mantissa).float()


_FORMATS: Mapping[str, _Format] = MappingProxyType(
    {
        "e4m3": _Format(bits=8, mantissa=3, least=-6, count=126),  # 127 is NaN
        "e5m2": _Format(bits=8, mantissa=2, least=-14, count=123),  # 124 is infinity
        "e2m1": _Format(bits=4, mantissa=1, least=0, count=7),
    }
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which numbers, and who shares a scale."""

    format: str = "e4m3"
    """"e4m3" or "e5m2" in 8 bits, "e2m1" in 4: bits of the exponent and of the mantissa."""
    group: int | str | None = None
    """Inputs that share a scale: 16, 32, 64, 128 or 256; None: an output channel's; "tensor": all."""
    range: str = "mse"
    """What a scale covers: "minmax" all of its group, "mse" as much as leaves the least squared error."""
    scale: str = "float32"
    """How scales are stored: "float32", "float16", or "e8m0", a power of two in a byte."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_one_of(self.format, "format", tuple(_FORMATS))
        require_group(self.group)
        require_one_of(self.range, "range", ("minmax", "mse"))
        require_one_of(self.scale, "scale", tuple(_stored.DTYPES))


LEVELS = (
    Options(),
    Options(format="e5m2"),
    Options(format="e2m1", group=16, scale="float16"),
    Options(format="e2m1", group=32, scale="float16"),
    Options(format="e2m1", group=32, scale="e8m0"),
)


def refuse(rows: int, columns: int, options: Options) -> str | None:
    """Why the options do not fit a weight of that shape, or None."""
    reason = _weights.misfit(rows, columns, options.group)
    return reason or _weights.no_gain(rows, columns, nbytes(rows, columns, options))


def nbytes(rows: int, columns: int, options: Options) -> int:
    """Bytes of the stored weight."""
    scale_rows, groups = _weights.scale_shape(rows, columns, options.group)
    scales = scale_rows * groups * _stored.DTYPES[options.scale].itemsize
    return rows * _packing.packed_width(columns, _FORMATS[options.format].bits) + scales


def fit(weight: torch.Tensor, options: Options, energy: torch.Tensor | None = None) -> Grid:
    """The numbers of a format and the scales for a weight (O, I).

    With range "mse" the squared error of rounding to nearest, weighed by the inputs' energy (I,), is never larger than with
    "minmax". Raises what the contract in `flyweight.codes` says, and UsageError for scales beyond float16.
    """
    weight, energy = _weights.checked(weight, energy)
    rows, columns = weight.shape
    _weights.require_fit(refuse(rows, columns, options))
    groups, counts = _weights.grouped(weight, energy, options.group)
    numbers = _FORMATS[options.format].numbers()
    peak = float(numbers[-1])
    level = _rounding(_FORMATS[options.format], peak)
    scales = torch.cat([_fit(part, counts, level, peak, options) for part in _weights.chunks(groups)])
    _stored.require_reach(scales, "scale")
    return _grid(_weights.spread(scales, rows), columns, options)


def storable(grid: Grid, options: Options) -> Grid:
    """The same grid with scales as they can be stored."""
    return _stored.with_scales(grid, options.scale)


def store(integers: torch.Tensor, grid: Grid, options: Options) -> dict[str, torch.Tensor]:
    """The numbers' own bits (O, I), packed, and the scales; raises UsageError for what is not storable."""
    _stored.require_range(integers, grid)
    bits = _FORMATS[options.format].bits
    signed = integers.abs() + (integers < 0) * 2 ** (bits - 1)
    return {
        "integers": _packing.pack(signed, bits),
        "scales": _stored.store_floats(grid.scales, options.scale, options.group == "tensor"),
    }


def restore(stored: Mapping[str, torch.Tensor], columns: int, options: Options) -> tuple[torch.Tensor, Grid]:
    """The integers (O, columns) and the grid that were stored.

    Raises ArtifactError for tensors of another form, and for bits that are no finite number.
    """
    form = _FORMATS[options.format]
    forms = {
        "integers": (torch.uint8, (-1, _packing.packed_width(columns, form.bits))),
        "scales": (_stored.DTYPES[options.scale], _weights.scale_shape(-1, columns, options.group)),
    }
    rows = _stored.expected(stored, forms)
    signed = _packing.unpack(stored["integers"], form.bits, columns, signed=False)
    sign = 2 ** (form.bits - 1)
    sizes = signed & (sign - 1)
    _stored.require_known(sizes, form.count)
    integers = torch.where(signed >= sign, -sizes, sizes)
    return integers, _grid(_stored.restore_scales(stored["scales"], rows), columns, options)


def _grid(scales: torch.Tensor, columns: int, options: Options) -> Grid:
    form = _FORMATS[options.format]
    numbers = form.numbers()
    table = torch.cat((-numbers[1:].flip(0), numbers))[None]
    length = _weights.group_length(columns, options.group)
    return Grid(-form.count, form.count, length, scales, table=table)


def _rounding(form: _Format, peak: float) -> Level:
    """Rounds to the numbers of a format; beyond the largest one, peak, to it."""

    def level(numbers: torch.Tensor) -> torch.Tensor:
        steps = _stored.power_below(numbers).clamp_(min=2.0**form.least).mul_(2.0**-form.mantissa)
        return numbers.div_(steps).round_().mul_(steps).clamp_(-peak, peak)

    return level


def _fit(
    groups: torch.Tensor, counts: torch.Tensor | None, level: Level, peak: float, options: Options
) -> torch.Tensor:
    """The scales (A, G) of groups (A, G, n), as they will be stored."""
    covering = usable(groups.abs().amax(-1) / peak)
    if options.scale == "e8m0":
        below = _stored.power_below(covering)
        covering = torch.where(covering > below, 2 * below, below)
        tried = [1.0, 2.0, 0.5, 0.25] if options.range == "mse" else [1.0]
        found = [Scaling(_stored.kept(covering * f, "e8m0")) for f in tried]
        return best(groups, counts, found, level).scales
    scales = [covering]
    if options.range == "mse":
        # beyond 1 as well: the spacing is uneven, and the largest entries may lie better on smaller numbers
        factors = torch.linspace(1.5, 0.5, 21).tolist()
        scales += [one.scales for one in searched(groups, counts, covering, factors, level)]
    return best(groups, counts, [Scaling(_stored.kept(one, options.scale)) for one in scales], level).scales
