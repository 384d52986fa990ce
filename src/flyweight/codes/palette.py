"""A table of 2 to 256 values and the place of each entry in it: the k-means centres of the weight's own values.

As in Han et al., "Deep compression" (arXiv 1510.00149, 2016), each entry weighed by its input's energy, as in Kim et al.,
"SqueezeLLM" (arXiv 2306.07629, 2024). Table entries are rounded as they are stored before anything is rounded to them. A
table over channels of which one is all zeros holds 0, so that such a channel decodes to exact zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flyweight.codes import _kmeans, _packing, _stored, _weights
from flyweight.codes._grid import Grid
from flyweight.codes._options import require, require_one_of
from flyweight.codes._search import roots
from flyweight.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Options:
    """How large the table is, and who shares one."""

    bits: int = 4
    """1 to 8 bits an entry: a table of 2, 4, ..., 256 values."""
    rows: int | None = None
    """Neighbouring output channels that share a table; None: all."""
    scaled: bool = False
    """Divide each output channel by the root of its mean square first, and store that."""
    table: str = "float16"
    """How table entries, and scales, are stored: "float16" or "float32"."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(type(self.bits) is int and 1 <= self.bits <= 8, "bits", "in [1, 8]", self.bits)
        require(self.rows is None or self.rows >= 1, "rows", "at least 1, or None", self.rows)
        require_one_of(self.table, "table", ("float16", "float32"))


LEVELS = (
    Options(bits=8),
    Options(bits=6),
    Options(bits=5),
    Options(bits=4, scaled=True),
    Options(bits=3, scaled=True),
    Options(bits=2, scaled=True),
    Options(bits=1, scaled=True),
)


def refuse(rows: int, columns: int, options: Options) -> str | None:
    """Why the options do not fit a weight of that shape, or None."""
    if options.rows is not None and rows % options.rows:
        return f"its {rows} output channels do not divide into blocks of {options.rows}"
    reason = _weights.misfit(rows, columns, None if options.scaled else "tensor")
    return reason or _weights.no_gain(rows, columns, nbytes(rows, columns, options))


def nbytes(rows: int, columns: int, options: Options) -> int:
    """Bytes of the stored weight."""
    tables = rows // (options.rows or rows) << options.bits
    numbers = tables + (rows if options.scaled else 0)
    return (
        rows * _packing.packed_width(columns, options.bits) + numbers * _stored.DTYPES[options.table].itemsize
    )


def fit(weight: torch.Tensor, options: Options, energy: torch.Tensor | None = None) -> Grid:
    """The tables for a weight (O, I), with little squared error, weighed by the inputs' energy (I,).

    Raises what the contract in `flyweight.codes` says, and UsageError for values beyond float16.
    """
    weight, energy = _weights.checked(weight, energy)
    rows, columns = weight.shape
    _weights.require_fit(refuse(rows, columns, options))
    scales = torch.ones(rows, 1)
    if options.scaled:
        scales = _stored.kept(roots(weight), options.table)
        _stored.require_reach(scales, "scale")
    levels = weight / scales
    share = options.rows or rows
    table = _tables(levels.reshape(-1, share * columns), _counts(scales, energy, levels, share), options)
    empty = (weight == 0).all(1).view(-1, share).any(1)
    return Grid(0, 2**options.bits - 1, columns, scales, table=_with_zero(table, empty))


def storable(grid: Grid, options: Options) -> Grid:
    """The same grid with scales and tables as they can be stored."""
    table = None if grid.table is None else _stored.kept(grid.table, options.table)
    return dataclasses.replace(_stored.with_scales(grid, options.table), table=table)


def store(integers: torch.Tensor, grid: Grid, options: Options) -> dict[str, torch.Tensor]:
    """The packed integers (O, I), tables, and scales if `scaled`; raises UsageError for what is not storable."""
    _stored.require_range(integers, grid)
    if grid.table is None:
        raise UsageError("a palette must have a table", got="a grid without one")
    stored = {
        "integers": _packing.pack(integers, options.bits),
        "table": _stored.store_floats(grid.table, options.table),
    }
    if options.scaled:
        stored["scales"] = _stored.store_floats(grid.scales, options.table)
    elif not bool((grid.scales == 1).all()):
        raise UsageError(
            "scales of a palette that is not scaled must be 1", got="others", way_out="choose scaled"
        )
    return stored


def restore(stored: Mapping[str, torch.Tensor], columns: int, options: Options) -> tuple[torch.Tensor, Grid]:
    """The integers (O, columns) and the grid that were stored; raises ArtifactError for tensors of another form."""
    kind = _stored.DTYPES[options.table]
    packed = stored.get("integers", torch.empty(0))
    tables = len(packed) // options.rows if options.rows else 1
    forms = {
        "integers": (torch.uint8, (-1, _packing.packed_width(columns, options.bits))),
        "table": (kind, (tables, 2**options.bits)),
    }
    if options.scaled:
        forms["scales"] = (kind, (-1, 1))
    rows = _stored.expected(stored, forms)
    integers = _packing.unpack(packed, options.bits, columns, signed=False)
    scales = _stored.restore_scales(stored["scales"], rows) if options.scaled else torch.ones(rows, 1)
    return integers, Grid(0, 2**options.bits - 1, columns, scales, table=stored["table"].float())


def _counts(
    scales: torch.Tensor, energy: torch.Tensor | None, levels: torch.Tensor, share: int
) -> torch.Tensor | None:
    """What each entry counts, (P, share * I): its input's energy, times its channel's squared scale."""
    if energy is None and bool((scales == 1).all()):
        return None
    channels = scales.double().square()
    counts = channels.expand_as(levels) if energy is None else channels * energy
    return counts.reshape(-1, share * levels.shape[1])


def _tables(values: torch.Tensor, counts: torch.Tensor | None, options: Options) -> torch.Tensor:
    """Tables (P, entries) float32 of values (P, n), as they will be stored."""
    unit = _stored.power_below(values.abs().amax(1, keepdim=True))  # exact, so that only relative sizes count
    unit = torch.where(unit > 0, unit, 1.0)
    found = _kmeans.centres(values / unit, counts, 2**options.bits) * unit
    table = found.to(_stored.DTYPES[options.table]).float()
    _stored.require_reach(table, "value")
    return table


def _with_zero(table: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
    """The tables (P, entries) with the entry nearest to 0 made 0 where that is needed (P,)."""
    nearest = table.abs().argmin(1, keepdim=True)
    return torch.where(needed[:, None], table.scatter(1, nearest, 0.0), table)
