"""Most entries zero: a bit for each entry or block that says whether it stays, and the values of those that do.

What stays is what its input's root mean square makes large, |W| ||x||, as in Sun et al., "A simple and effective pruning
approach for large language models" (Wanda, arXiv 2306.11695, 2023), or what is large by itself. Roundings that carry errors
on make up for what went (Frantar & Alistarh, "SparseGPT", arXiv 2301.00774, 2023); `alternating` chooses anew what stays.
Patterns: any entries of a tensor, as many of each output channel, N of every M neighbouring inputs, or blocks of R output
channels by C inputs. Values are evenly spaced integers; those of 16 bits are as exact as half-precision floats, and leave
room for values to grow to four times the largest of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flyweight.codes import _packing, _sparsity, _stored, _weights, integer
from flyweight.codes._grid import Grid
from flyweight.codes._options import require, require_group, require_one_of
from flyweight.codes._search import usable
from flyweight.codes._sparsity import NAMED, Pattern
from flyweight.errors import ArtifactError, UsageError

COMPRESSED = True
"""Its bits are worth a Huffman coder on disk, the more of them are zeros."""
_WIDE = 16
_TOP = 2 ** (_WIDE - 1) - 2
_ROOM = 4.0
"""Times the largest entry of a weight that 16 bits reach."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What stays, and how its values are stored."""

    sparsity: float = 0.5
    """Share of entries that become zero, in (0, 1)."""
    pattern: str = "row"
    """Where: "row" the same share of each output channel, "tensor" anywhere, "N:M" N of every M neighbouring inputs stay,
    "RxC" in blocks of R output channels by C inputs."""
    score: str = "energy"
    """What stays: "energy" the largest by |W| times the input's root mean square where that is known, "magnitude" by |W|."""
    bits: int = 16
    """Bits of a value: 16, 8, 6, 5, 4, 3 or 2."""
    group: int | str | None = None
    """Inputs that share a scale: 16, 32, 64, 128 or 256; None: an output channel's; "tensor": all."""
    scale: str = "float32"
    """How scales are stored: "float32" or "float16"."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(0 < self.sparsity < 1, "sparsity", "in (0, 1)", self.sparsity)
        named = NAMED.fullmatch(self.pattern)
        require(bool(named), "pattern", '"row", "tensor", "N:M" or "RxC"', self.pattern)
        if among := self.keep.among:
            share = 1 - among[0] / among[1]
            require(share == self.sparsity, "sparsity", f"{share:g} with {self.pattern}", self.sparsity)
        require_one_of(self.score, "score", ("energy", "magnitude"))
        require_one_of(self.bits, "bits", (_WIDE, 8, 6, 5, 4, 3, 2))
        require_group(self.group)
        require_one_of(self.scale, "scale", ("float32", "float16"))
        require(self.bits < _WIDE or self.scale == "float32", "scale", "float32 with 16 bits", self.scale)

    @property
    def keep(self) -> Pattern:
        """The pattern of what stays."""
        return Pattern(self.pattern, self.sparsity)

    @property
    def values(self) -> integer.Options:
        """The integers of fewer than 16 bits that values are."""
        return integer.Options(bits=self.bits, group=self.group, scale=self.scale)

    @property
    def ends(self) -> tuple[int, int]:
        """The lowest and the highest integer."""
        return (-_TOP, _TOP) if self.bits == _WIDE else (self.values.low, self.values.high)


LEVELS = (
    Options(),
    Options(bits=8),
    Options(pattern="2:4", bits=8),
    Options(pattern="2:4", bits=4, group=64, scale="float16"),
    Options(pattern="tensor", sparsity=0.75, bits=4, group=64, scale="float16"),
    Options(pattern="16x16", sparsity=0.75, bits=4, group=64, scale="float16"),
    Options(pattern="8x1", sparsity=0.9, bits=8),
)


def refuse(rows: int, columns: int, options: Options) -> str | None:
    """Why the options do not fit a weight of that shape, or None."""
    reason = _weights.misfit(rows, columns, options.group) or options.keep.misfit(rows, columns)
    return reason or _weights.no_gain(rows, columns, nbytes(rows, columns, options))


def nbytes(rows: int, columns: int, options: Options) -> int:
    """Bytes of the stored weight in memory; on disk its bits are Huffman-coded."""
    pattern = options.keep
    high, wide = pattern.blocks(rows, columns)
    scale_rows, groups = _weights.scale_shape(rows, columns, options.group)
    scales = scale_rows * groups * _stored.DTYPES[options.scale].itemsize
    return _packing.packed_width(_count(rows, columns, pattern), options.bits) + high * -(-wide // 8) + scales


def fit(weight: torch.Tensor, options: Options, energy: torch.Tensor | None = None) -> Grid:
    """What stays of a weight (O, I) by its inputs' energy (I,), and the scales of its values.

    Raises what the contract in `flyweight.codes` says, and UsageError for scales beyond float16.
    """
    weight, energy = _weights.checked(weight, energy)
    _weights.require_fit(refuse(len(weight), weight.shape[1], options))
    scores = weight.double().square()
    if energy is not None and options.score == "energy":
        scores = scores * energy
    mask = options.keep.spread(options.keep.choose(scores))
    scales = _scales(weight * mask, options, energy)
    _stored.require_reach(scales, "scale")
    return _grid(mask, scales, options)


def storable(grid: Grid, options: Options) -> Grid:
    """The same grid with scales as they can be stored."""
    return _stored.with_scales(grid, options.scale)


def store(integers: torch.Tensor, grid: Grid, options: Options) -> dict[str, torch.Tensor]:
    """The packed integers of what stays, block after block, the mask's bits, and scales.

    Raises UsageError for what is not storable.
    """
    _stored.require_range(integers, grid)
    pattern, entries = options.keep, grid.mask
    if entries is None or bool(integers[~entries].any()):
        raise UsageError(
            "what does not stay must be 0", got="other integers", way_out="pick on the grid's mask"
        )
    mask = pattern.cut(entries)[..., 0]
    if int(mask.sum()) != pattern.kept(*integers.shape) or not torch.equal(pattern.spread(mask), entries):
        raise UsageError(f"a mask must be {pattern.name} with {pattern.sparsity:g} zeros", got="another one")
    return {
        "integers": _packing.pack(pattern.cut(integers)[mask].view(1, -1), options.bits),
        "mask": _sparsity.packed(mask),
        "scales": _stored.store_floats(grid.scales, options.scale, options.group == "tensor"),
    }


def restore(stored: Mapping[str, torch.Tensor], columns: int, options: Options) -> tuple[torch.Tensor, Grid]:
    """The integers (O, columns) and the grid that were stored; raises ArtifactError for tensors of another form."""
    pattern = options.keep
    rows = len(stored["mask"]) * pattern.height if "mask" in stored and stored["mask"].ndim else 0
    (high, wide), count = pattern.blocks(rows, columns), _count(rows, columns, pattern)
    forms = {
        "integers": (torch.uint8, (1, _packing.packed_width(count, options.bits))),
        "mask": (torch.uint8, (high, -(-wide // 8))),
        "scales": (_stored.DTYPES[options.scale], _weights.scale_shape(rows, columns, options.group)),
    }
    _stored.expected(stored, forms)
    mask = _sparsity.unpacked(stored["mask"], wide)
    if int(mask.sum()) != pattern.kept(rows, columns):
        raise ArtifactError(
            f"a mask must keep {pattern.kept(rows, columns)} blocks", got=str(int(mask.sum()))
        )
    found = _packing.unpack(stored["integers"], options.bits, count, signed=True)
    blocks = found.new_zeros(high, wide, pattern.height * pattern.width)
    blocks[mask] = found.view(-1, blocks.shape[2])
    scales = _stored.restore_scales(stored["scales"], rows)
    return pattern.joined(blocks), _grid(pattern.spread(mask), scales, options)


def _grid(mask: torch.Tensor, scales: torch.Tensor, options: Options) -> Grid:
    columns, pattern = mask.shape[1], options.keep
    group = _weights.group_length(columns, options.group)
    scales = _weights.spread(scales, len(mask))
    return Grid(*options.ends, group, scales, mask=mask, pattern=pattern)


def _count(rows: int, columns: int, pattern: Pattern) -> int:
    """Entries that stay of a weight of that shape."""
    return pattern.kept(rows, columns) * pattern.height * pattern.width


def _scales(kept: torch.Tensor, options: Options, energy: torch.Tensor | None) -> torch.Tensor:
    """Scales (A, G) for what is left of a weight (O, I)."""
    if options.bits < _WIDE:
        return integer.fit(kept, options.values, energy).scales
    groups, _ = _weights.grouped(kept, None, options.group)
    return usable(_ROOM / _TOP * groups.abs().amax(-1))
