"""A table of up to 4096 small vectors: 2, 4 or 8 neighbouring inputs share a place in it, and each channel has a scale.

As in van Baalen et al., "GPTVQ: The blessing of dimensionality for LLM quantization" (arXiv 2402.15319, 2024): k-means of the
weight's own vectors, each entry weighed by its input's energy and its channel's squared scale. Of large weights a sample is
taken. Table entries are rounded as they are stored before anything is rounded to them. A table for channels of which one is
all zeros holds a vector of zeros, so that such a channel decodes to exact zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flyweight.codes import _packing, _stored, _vectors, _weights
from flyweight.codes._grid import Grid
from flyweight.codes._options import require, require_one_of
from flyweight.codes._search import roots
from flyweight.errors import UsageError

_MOST = 12
"""Bits of the largest table's places."""
_SAMPLE = 2**16
"""Vectors that k-means works on."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How many inputs share a place, and how large the table is: 2 to the power of bits times width."""

    bits: int = 2
    """1 to 6 bits an entry."""
    width: int = 4
    """Neighbouring inputs that share a place: 2, 4 or 8; bits times width is at most 12."""
    table: str = "float16"
    """How table entries, and scales, are stored: "float16" or "float32"."""
    seed: int = 0
    """Seeds the sample and where k-means starts, in [0, 2**32)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(type(self.bits) is int and 1 <= self.bits <= 6, "bits", "in [1, 6]", self.bits)
        require_one_of(self.width, "width", (2, 4, 8))
        rule = f"at most {_MOST} when multiplied with width {self.width}"
        require(self.bits * self.width <= _MOST, "bits", rule, self.bits)
        require_one_of(self.table, "table", ("float16", "float32"))
        require(type(self.seed) is int and 0 <= self.seed < 2**32, "seed", "in [0, 2**32)", self.seed)


LEVELS = (
    Options(bits=4, width=2),
    Options(bits=3, width=2),
    Options(bits=2, width=4),
    Options(bits=1, width=8),
)


def refuse(rows: int, columns: int, options: Options) -> str | None:
    """Why the options do not fit a weight of that shape, or None."""
    if columns % options.width:
        return f"its {columns} inputs do not divide into vectors of {options.width}"
    reason = _weights.misfit(rows, columns, None)
    return reason or _weights.no_gain(rows, columns, nbytes(rows, columns, options))


def nbytes(rows: int, columns: int, options: Options) -> int:
    """Bytes of the stored weight."""
    numbers = (options.width << options.bits * options.width) + rows
    return (
        rows * _packing.packed_width(columns, options.bits) + numbers * _stored.DTYPES[options.table].itemsize
    )


def fit(weight: torch.Tensor, options: Options, energy: torch.Tensor | None = None) -> Grid:
    """The table for a weight (O, I), with little squared error, weighed by the inputs' energy (I,).

    Raises what the contract in `flyweight.codes` says, and UsageError for values beyond float16.
    """
    weight, energy = _weights.checked(weight, energy)
    rows, columns = weight.shape
    _weights.require_fit(refuse(rows, columns, options))
    scales = _stored.kept(roots(weight), options.table)
    _stored.require_reach(scales, "scale")
    points, counts = _sample(weight / scales, scales, energy, options)
    found = _vectors.centres(points, counts, 1 << options.bits * options.width, options.seed)
    table = found.to(_stored.DTYPES[options.table]).float()
    if bool((weight == 0).all(1).any()):
        table[table.square().sum(1).argmin()] = 0.0
    return Grid(0, len(table) - 1, columns, scales, table=table[None])


def storable(grid: Grid, options: Options) -> Grid:
    """The same grid with scales and table as they can be stored."""
    table = None if grid.table is None else _stored.kept(grid.table, options.table)
    return dataclasses.replace(_stored.with_scales(grid, options.table), table=table)


def store(integers: torch.Tensor, grid: Grid, options: Options) -> dict[str, torch.Tensor]:
    """The packed places (O, I / width), table and scales; raises UsageError for what is not storable."""
    _stored.require_range(integers, grid)
    if grid.table is None or grid.width != options.width:
        raise UsageError(
            f"a vector palette must have a table of vectors of {options.width}", got="a grid without one"
        )
    shifts = torch.arange(options.width) * options.bits
    digits = (integers.int()[..., None] >> shifts) & (
        2**options.bits - 1
    )  # as many as inputs: no bit is lost
    return {
        "integers": _packing.pack(digits.flatten(1), options.bits),
        "table": _stored.store_floats(grid.table[0], options.table),
        "scales": _stored.store_floats(grid.scales, options.table),
    }


def restore(stored: Mapping[str, torch.Tensor], columns: int, options: Options) -> tuple[torch.Tensor, Grid]:
    """The integers (O, columns / width) and the grid that were stored; raises ArtifactError for tensors of another form."""
    kind, entries = _stored.DTYPES[options.table], 1 << options.bits * options.width
    forms = {
        "integers": (torch.uint8, (-1, _packing.packed_width(columns, options.bits))),
        "table": (kind, (entries, options.width)),
        "scales": (kind, (-1, 1)),
    }
    rows = _stored.expected(stored, forms)
    digits = _packing.unpack(stored["integers"], options.bits, columns, signed=False)
    shifts = torch.arange(options.width) * options.bits
    integers = (digits.unflatten(1, (-1, options.width)).int() << shifts).sum(2).to(torch.int16)
    scales = _stored.restore_scales(stored["scales"], rows)
    return integers, Grid(0, entries - 1, columns, scales, table=stored["table"].float()[None])


def _sample(
    levels: torch.Tensor, scales: torch.Tensor, energy: torch.Tensor | None, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors (n, v) of levels (O, I), and what each coordinate counts (n, v), at most 1.

    Channels are put in order first, so that what is found does not depend on the order that they came in.
    """
    whole = scales.double().square() * (torch.ones(levels.shape[1]) if energy is None else energy)
    order = torch.unique(levels, dim=0, return_inverse=True)[1].argsort(stable=True)
    points, counts = (one[order].view(-1, options.width) for one in (levels, (whole / whole.max()).float()))
    if len(points) > _SAMPLE:
        drawn = torch.randperm(len(points), generator=torch.Generator().manual_seed(options.seed))[:_SAMPLE]
        points, counts = points[drawn], counts[drawn]
    return points, counts
