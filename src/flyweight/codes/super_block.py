"""llama.cpp's k-quants: super-blocks of 256 inputs, groups' scales and offsets being small multiples of two half floats.

What the layouts block_q2_K .. block_q6_K and block_iq4_xs of ggml hold, to the bit (pull requests 1684 and 5747 of
llama.cpp by Kawrakow, 2023): value = level * (super * multiple) - floor * lift. Both products are exact in float32.
`_super_fit` searches the scales for the least squared error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from flyweight.codes import _packing, _stored, _weights
from flyweight.codes._grid import Grid
from flyweight.codes._options import require, require_one_of
from flyweight.codes._search import Level
from flyweight.codes._super_fit import BLOCK, Form, factored, fitted
from flyweight.codes.iq4_nl import TABLE, to_table
from flyweight.errors import UsageError

FORMS: Mapping[tuple[int, bool], Form] = MappingProxyType(
    {
        (6, False): Form(-32, 31, 16, 8),
        (5, False): Form(0, 31, 32, 6, lifted=True),
        (4, False): Form(0, 15, 32, 6, lifted=True),
        (4, True): Form(0, 15, 32, 6),
        (3, False): Form(-4, 3, 16, 6),
        (2, False): Form(0, 3, 16, 4, lifted=True),
    }
)
"""By bits and unevenness."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which of the super-blocks."""

    bits: int = 4
    """Bits of an entry: 6, 5, 4, 3, 2 (Q6_K to Q2_K); with scales 6.5625, 5.5, 4.5, 3.4375 and 2.625."""
    uneven: bool = False
    """4 bits on the uneven table of `iq4_nl`, without offsets: IQ4_XS, 4.25 bits with scales."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_one_of(self.bits, "bits", (6, 5, 4, 3, 2))
        require(not self.uneven or self.bits == 4, "uneven", "false but at 4 bits", self.uneven)

    @property
    def form(self) -> Form:
        """What its super-blocks hold."""
        return FORMS[self.bits, self.uneven]


LEVELS = (
    Options(bits=6),
    Options(bits=5),
    Options(bits=4),
    Options(bits=4, uneven=True),
    Options(bits=3),
    Options(bits=2),
)


def refuse(rows: int, columns: int, options: Options) -> str | None:
    """Why the options do not fit a weight of that shape, or None."""
    return _weights.misfit(rows, columns, BLOCK)


def nbytes(rows: int, columns: int, options: Options) -> int:
    """Bytes of the stored weight."""
    return sum(kind.itemsize * wide * rows for kind, (_, wide) in _forms(columns, options).values())


def fit(weight: torch.Tensor, options: Options, energy: torch.Tensor | None = None) -> Grid:
    """The scales and offsets of a weight (O, I), with little squared error, weighed by the inputs' energy (I,).

    Raises what the contract in `flyweight.codes` says, and UsageError for super-scales beyond float16.
    """
    weight, energy = _weights.checked(weight, energy)
    _weights.require_fit(refuse(weight.shape[0], weight.shape[1], options))
    form = options.form
    groups, counts = _weights.grouped(weight, energy, form.group)
    level = to_table if options.uneven else _rounding(form)
    found = [fitted(part, counts, form, level) for part in _weights.chunks(groups)]
    scales, floors = torch.cat([one for one, _ in found]), [other for _, other in found if other is not None]
    if options.uneven:  # the table has no 0
        scales *= (groups != 0).any(-1)
    _stored.require_reach(scales, "scale")
    return _grid(scales, -torch.cat(floors) if floors else None, options)


def storable(grid: Grid, options: Options) -> Grid:
    """The same grid with scales and offsets that super-blocks can hold: as they are, or near them."""
    form = options.form
    scales = _product(*factored(grid.scales, form, zero=options.uneven)[:2])
    offsets = None if grid.offsets is None else -_product(*factored(-grid.offsets, form, zero=True)[:2])
    return _grid(scales, offsets, options)


def store(integers: torch.Tensor, grid: Grid, options: Options) -> dict[str, torch.Tensor]:
    """The packed integers (O, I), multiples, and super-scales; raises UsageError for what is not storable."""
    _stored.require_range(integers, grid)
    form = options.form
    stored = {"integers": _packing.pack(integers, options.bits)}
    pairs = [("multiples", "supers", grid.scales)]
    if grid.offsets is not None:
        pairs.append(("lifts", "floors", -grid.offsets))
    for small, large, values in pairs:
        supers, multiples, exact = factored(values, form, zero=options.uneven or small == "lifts")
        if not bool(exact.all()):
            raise UsageError(
                f"{'scales' if values is grid.scales else 'offsets'} of a super-block must be multiples of a half float",
                got="others", way_out="pass the grid through storable",
            )  # fmt: skip
        stored[small] = _packing.pack(multiples.flatten(1), form.bits)
        stored[large] = supers.half()
    return stored


def restore(stored: Mapping[str, torch.Tensor], columns: int, options: Options) -> tuple[torch.Tensor, Grid]:
    """The integers (O, columns) and the grid that were stored; raises ArtifactError for tensors of another form."""
    _stored.expected(stored, _forms(columns, options))
    form = options.form
    integers = _packing.unpack(stored["integers"], options.bits, columns, signed=form.low < 0)
    scales = _restored(stored["multiples"], stored["supers"], columns, form)
    offsets = -_restored(stored["lifts"], stored["floors"], columns, form) if form.lifted else None
    return integers, _grid(scales, offsets, options)


def _forms(columns: int, options: Options) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
    """The stored tensors' dtypes and shapes; -1 is the number of rows."""
    form, blocks = options.form, columns // BLOCK
    multiples = (torch.uint8, (-1, columns // form.group * form.bits // 8))
    found = {"integers": (torch.uint8, (-1, columns * options.bits // 8)), "multiples": multiples}
    found["supers"] = (torch.float16, (-1, blocks))
    return found | ({"lifts": multiples, "floors": found["supers"]} if form.lifted else {})


def _rounding(form: Form) -> Level:
    def level(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.round_().clamp_(form.low, form.high)

    return level


def _grid(scales: torch.Tensor, offsets: torch.Tensor | None, options: Options) -> Grid:
    form = options.form
    table = TABLE[None] if options.uneven else None
    return Grid(form.low, form.high, form.group, scales, table=table, offsets=offsets, fixed=True)


def _restored(multiples: torch.Tensor, supers: torch.Tensor, columns: int, form: Form) -> torch.Tensor:
    unpacked = _packing.unpack(multiples, form.bits, columns // form.group, signed=not form.lifted)
    return _product(supers.float(), unpacked.float().unflatten(1, (supers.shape[1], -1)))


def _product(supers: torch.Tensor, multiples: torch.Tensor) -> torch.Tensor:
    """(O, G) of super-scales (O, S) and multiples (O, S, G / S)."""
    return (supers[..., None] * multiples).flatten(1)
