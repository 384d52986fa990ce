"""llama.cpp's IQ4_NL: 16 uneven values for all weights alike, times a half-precision scale for 32 inputs; 4.5 bits.

The table is ggml's, finer around 0 (pull request 5590 of llama.cpp by Kawrakow, 2024): at the same bytes as evenly
spaced integers it leaves less error on weights that are spread like a bell, and it fits widths that super-blocks of 256 do
not divide. None of the values is 0, so a group of zeros has the scale 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flyweight.codes import _packing, _stored, _weights
from flyweight.codes._grid import Grid
from flyweight.codes._search import Scaling, best, searched, usable

BLOCK = 32
"""Inputs that share a scale."""
TABLE = torch.tensor([-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
_REACH = 256
_NEAREST = TABLE[torch.bucketize(torch.arange(-_REACH, _REACH + 1) / 2, (TABLE[1:] + TABLE[:-1]) / 2)]
"""The value nearest to each multiple of a half from -128 to 128."""
FACTORS = tuple(sign * factor for factor in torch.linspace(1.3, 0.6, 11).tolist() for sign in (1.0, -1.0))
"""Scales that are tried, as shares of the one that covers the largest magnitude by 127."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """There is nothing to choose."""


LEVELS = (Options(),)


def refuse(rows: int, columns: int, options: Options) -> str | None:
    """Why the options do not fit a weight of that shape, or None."""
    return _weights.misfit(rows, columns, BLOCK)


def nbytes(rows: int, columns: int, options: Options) -> int:
    """Bytes of the stored weight."""
    return rows * (columns // 2 + columns // BLOCK * torch.float16.itemsize)


def fit(weight: torch.Tensor, options: Options, energy: torch.Tensor | None = None) -> Grid:
    """The scales of a weight (O, I), with little squared error, weighed by the inputs' energy (I,).

    Raises what the contract in `flyweight.codes` says, and UsageError for scales beyond float16.
    """
    weight, energy = _weights.checked(weight, energy)
    _weights.require_fit(refuse(weight.shape[0], weight.shape[1], options))
    groups, counts = _weights.grouped(weight, energy, BLOCK)
    scales = torch.cat([_fit(part, counts) for part in _weights.chunks(groups)])
    _stored.require_reach(scales, "scale")
    return _grid(scales)


def storable(grid: Grid, options: Options) -> Grid:
    """The same grid with scales as they can be stored."""
    return _stored.with_scales(grid, "float16")


def store(integers: torch.Tensor, grid: Grid, options: Options) -> dict[str, torch.Tensor]:
    """The packed places in the table (O, I), and the scales; raises UsageError for what is not storable."""
    _stored.require_range(integers, grid)
    return {
        "integers": _packing.pack(integers, 4),
        "scales": _stored.store_floats(grid.scales, "float16"),
    }


def restore(stored: Mapping[str, torch.Tensor], columns: int, options: Options) -> tuple[torch.Tensor, Grid]:
    """The places (O, columns) and the grid that were stored; raises ArtifactError for tensors of another form."""
    forms = {
        "integers": (torch.uint8, (-1, columns // 2)),
        "scales": (torch.float16, (-1, columns // BLOCK)),
    }
    _stored.expected(stored, forms)
    return _packing.unpack(stored["integers"], 4, columns, signed=False), _grid(stored["scales"].float())


def to_table(numbers: torch.Tensor) -> torch.Tensor:
    """The values of the table nearest to numbers, which are rounded to halves before; in place of them."""
    places = numbers.mul_(2).round_().clamp_(-_REACH, _REACH).add_(_REACH).int()
    return _NEAREST.index_select(0, places.view(-1)).view(places.shape)


def _grid(scales: torch.Tensor) -> Grid:
    return Grid(0, len(TABLE) - 1, BLOCK, scales, table=TABLE[None])


def _fit(groups: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """The scales (A, G) of groups (A, G, 32), as they will be stored."""
    covering = usable(groups.abs().amax(-1) / -float(TABLE[0]))
    found = searched(groups, counts, covering, FACTORS, to_table)
    kept = [Scaling(_stored.kept(one.scales, "float16")) for one in (Scaling(covering), *found)]
    return best(groups, counts, kept, to_table).scales * (groups != 0).any(-1)
