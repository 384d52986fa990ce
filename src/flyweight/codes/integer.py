"""Evenly spaced integers of 2 to 8 bits, one scale per tensor, channel or group of inputs, with or without a zero point.

As in Jacob et al., "Quantization and training of neural networks" (arXiv 1712.05877, 2018) and Dettmers & Zettlemoyer,
"The case for 4-bit precision" (arXiv 2212.09720, 2023). A scale is
rounded as it is stored before anything is rounded with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flyweight.codes import _packing, _stored, _weights
from flyweight.codes._grid import Grid
from flyweight.codes._options import require, require_group, require_one_of
from flyweight.codes._search import Scaling, best, least_squares, usable

_FULL_BELOW = 4
"""Bits below which the lowest integer is worth a signed scale by itself."""
_PERCENT = 100.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which integers, who shares a scale, and how the scale is found."""

    bits: int = 8
    """8, 6, 5, 4, 3 or 2 bits an entry."""
    group: int | str | None = None
    """Inputs that share a scale: 16, 32, 64, 128 or 256; None: an output channel's; "tensor": all."""
    symmetric: bool = True
    """No zero point; False: one of as many bits as the entries, beside each scale."""
    full: bool | None = None
    """Use the lowest integer, -2^(bits - 1), too, under a scale of either sign; None: at 3 bits and fewer."""
    reduced: bool = False
    """Use half the integers, so that 8-bit products cannot saturate 16-bit sums."""
    range: str = "mse"
    """What a scale covers: "minmax" all of its group, "percentile" most, "mse" as much as leaves the least squared error."""
    percentile: float = 99.9
    """Percent of a group that range "percentile" covers: 50 to 100; of the magnitudes, or of each end with a zero point."""
    scale: str = "float32"
    """How scales are stored: "float32" or "float16"."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_one_of(self.bits, "bits", (8, 6, 5, 4, 3, 2))
        require_group(self.group)
        require(self.symmetric or not self.full, "full", "false with a zero point", self.full)
        require(not (self.reduced and self.full), "full", "false with reduced integers", self.full)
        require(self.symmetric or not self.reduced, "reduced", "false with a zero point", self.reduced)
        require_one_of(self.range, "range", ("minmax", "percentile", "mse"))
        require(50 <= self.percentile <= _PERCENT, "percentile", "in [50, 100]", self.percentile)
        require_one_of(self.scale, "scale", ("float32", "float16"))

    @property
    def low(self) -> int:
        """The lowest integer."""
        if not self.symmetric:
            return 0
        full = self.bits < _FULL_BELOW and not self.reduced if self.full is None else self.full
        return -(1 << self.bits - 1) if full else -self.high

    @property
    def high(self) -> int:
        """The highest integer."""
        if not self.symmetric:
            return (1 << self.bits) - 1
        return 1 << self.bits - 2 if self.reduced else (1 << self.bits - 1) - 1


LEVELS = (
    Options(),
    Options(bits=6),
    Options(bits=5, group=64, scale="float16"),
    Options(bits=4, group=32, symmetric=False, scale="float16"),
    Options(bits=4, group=64, scale="float16"),
    Options(bits=3, group=32, symmetric=False, scale="float16"),
    Options(bits=3, group=64, scale="float16"),
    Options(bits=2, group=32, symmetric=False, scale="float16"),
    Options(bits=2, group=64, scale="float16"),
)


def refuse(rows: int, columns: int, options: Options) -> str | None:
    """Why the options do not fit a weight of that shape, or None."""
    reason = _weights.misfit(rows, columns, options.group)
    return reason or _weights.no_gain(rows, columns, nbytes(rows, columns, options))


def nbytes(rows: int, columns: int, options: Options) -> int:
    """Bytes of the stored weight."""
    scale_rows, groups = _weights.scale_shape(rows, columns, options.group)
    integers = rows * _packing.packed_width(columns, options.bits)
    zeros = 0 if options.symmetric else scale_rows * _packing.packed_width(groups, options.bits)
    return integers + scale_rows * groups * _stored.DTYPES[options.scale].itemsize + zeros


def fit(weight: torch.Tensor, options: Options, energy: torch.Tensor | None = None) -> Grid:
    """The integers of a weight (O, I) and their scales.

    With range "mse" the squared error of rounding to nearest, weighed by the inputs' energy (I,), is never larger than with
    "minmax". Raises what the contract in `flyweight.codes` says, and UsageError for scales beyond float16.
    """
    weight, energy = _weights.checked(weight, energy)
    rows, columns = weight.shape
    _weights.require_fit(refuse(rows, columns, options))
    groups, counts = _weights.grouped(weight, energy, options.group)
    found = [_fit(part, counts, options) for part in _weights.chunks(groups)]
    scales = torch.cat([one.scales for one in found])
    zeros = [one.zeros for one in found if one.zeros is not None]
    _stored.require_reach(scales, "scale")
    return Grid(
        options.low,
        options.high,
        _weights.group_length(columns, options.group),
        _weights.spread(scales, rows),
        _weights.spread(torch.cat(zeros), rows) if zeros else None,
    )


def storable(grid: Grid, options: Options) -> Grid:
    """The same grid with scales as they can be stored."""
    return _stored.with_scales(grid, options.scale)


def store(integers: torch.Tensor, grid: Grid, options: Options) -> dict[str, torch.Tensor]:
    """The packed integers (O, I), scales, and zeros where there are any; raises UsageError for what is not storable."""
    _stored.require_range(integers, grid)
    shared = options.group == "tensor"
    stored = {
        "integers": _packing.pack(integers, options.bits),
        "scales": _stored.store_floats(grid.scales, options.scale, shared),
    }
    if grid.zeros is not None:
        stored["zeros"] = _packing.pack(grid.zeros[:1] if shared else grid.zeros, options.bits)
    return stored


def restore(stored: Mapping[str, torch.Tensor], columns: int, options: Options) -> tuple[torch.Tensor, Grid]:
    """The integers (O, columns) and the grid that were stored; raises ArtifactError for tensors of another form."""
    scale_rows, groups = _weights.scale_shape(-1, columns, options.group)
    width = _packing.packed_width(columns, options.bits)
    forms = {
        "integers": (torch.uint8, (-1, width)),
        "scales": (_stored.DTYPES[options.scale], (scale_rows, groups)),
    }
    if not options.symmetric:
        forms["zeros"] = (torch.uint8, (scale_rows, _packing.packed_width(groups, options.bits)))
    rows = _stored.expected(stored, forms)
    integers = _packing.unpack(stored["integers"], options.bits, columns, signed=options.symmetric)
    zeros = None
    if not options.symmetric:
        unpacked = _packing.unpack(stored["zeros"], options.bits, groups, signed=False)
        zeros = _weights.spread(unpacked.float(), rows)
    scales = _stored.restore_scales(stored["scales"], rows)
    return integers, Grid(
        options.low, options.high, _weights.group_length(columns, options.group), scales, zeros
    )


def _fit(groups: torch.Tensor, counts: torch.Tensor | None, options: Options) -> Scaling:
    """The scaling of groups (A, G, n), as it will be stored."""

    def level(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.round_().clamp_(options.low, options.high)

    low, high = _extent(groups, options)
    found = [_stored_scaling(one, options) for one in _covering(low, high, options)]
    if options.range == "mse":
        coarse = least_squares(groups, counts, _shrunk(low, high, options), level)
        fine = least_squares(groups, counts, _near(coarse, options), level)
        again = least_squares(groups, counts, [fine], level)
        found += [_stored_scaling(one, options) for one in (fine, again)]
    return best(groups, counts, found, level)


def _extent(groups: torch.Tensor, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """The ends (A, G) of what is to be covered; low <= 0 <= high."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if options.range != "percentile":
        return low, high
    count = groups.shape[-1]
    rank = max(1, math.ceil(options.percentile / _PERCENT * count))
    if options.symmetric:
        peak = groups.abs().kthvalue(rank).values
        ends = -peak, peak
    else:
        ends = (
            groups.kthvalue(count + 1 - rank).values.clamp(max=0),
            groups.kthvalue(rank).values.clamp(min=0),
        )
    nothing = ends[0] == ends[1]  # all but outliers are 0: cover the outliers
    return torch.where(nothing, low, ends[0]), torch.where(nothing, high, ends[1])


def _covering(low: torch.Tensor, high: torch.Tensor, options: Options) -> list[Scaling]:
    """Scalings whose integers reach from low to high; with the full range also one whose lowest is the larger end."""
    if not options.symmetric:
        scales = usable(high / options.high - low / options.high)
        return [Scaling(scales, (-low / scales).round().clamp(0, options.high))]
    found = [Scaling(usable(torch.maximum(-low, high) / options.high))]
    if options.low < -options.high:
        found.append(Scaling(usable(torch.where(high >= -low, high, low) / options.low)))
    return found


def _shrunk(low: torch.Tensor, high: torch.Tensor, options: Options) -> list[Scaling]:
    """Scalings that cover parts of a range."""
    factors = torch.linspace(1.0, 0.5 if options.bits > 3 else 0.25, 9).tolist()
    if options.symmetric:
        found = [Scaling(one.scales * f) for one in _covering(low, high, options) for f in factors]
        return found + [Scaling(-one.scales) for one in found if options.low < -options.high]
    parts = [(f, f) for f in factors] + [part for f in factors[2::2] for part in ((1.0, f), (f, 1.0))]
    return [one for a, b in parts for one in _covering(low * a, high * b, options)]


def _near(scaling: Scaling, options: Options) -> list[Scaling]:
    """The scaling and its neighbours; with a zero point also those of the next zero points."""
    factors = (1.0, 0.94, 0.96, 0.98, 1.02, 1.04, 1.06)
    scales = [scaling.scales * f for f in factors]
    if scaling.zeros is None:
        return [Scaling(one) for one in scales]
    zeros = [(scaling.zeros + step).clamp(0, options.high) for step in (0, -1, 1)]
    return [Scaling(one, zero) for zero in zeros for one in scales]


def _stored_scaling(scaling: Scaling, options: Options) -> Scaling:
    return Scaling(_stored.kept(scaling.scales, options.scale), scaling.zeros)
