"""Integers on an even grid, a byte each, of which a Huffman coder makes few bits on disk: no fixed width, no groups.

Once integers are entropy-coded, an even grid is within a quarter of a bit of the best code there is, and a small
step costs only what its information weighs (Gish & Pierce, "Asymptotically efficient quantizing", IEEE Transactions on
Information Theory, 1968). The least squared error at a given size then has one step for the whole tensor: large entries get
more bits by being rarer. Where the inputs' energy is known, the step of a column is one over its root. The rounding
`waterfilling` finds better steps, from how the inputs go together.

A value is integer * scale * factor: a scale for each output channel, a factor for each input. Integers are stored column
after column, (I, O), so that a coder that adapts as it goes sees one input's statistics at a time. Half the step is one bit
more: a step of 1 takes about 2.2 bits an entry of a normal weight, of 1/2 3.1, of 1/4 4.1.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from flyweight.codes import _stored, _weights
from flyweight.codes._grid import Grid
from flyweight.codes._options import require, require_one_of
from flyweight.codes._search import TINY
from flyweight.errors import ArtifactError

COMPRESSED = True
"""Its stored integers are worth a Huffman coder on disk."""
LIMIT = 127
"""The largest integer."""
_QUIET = 0.01
"""Share of the mean energy that is added to each input's: nothing is known well enough to be left out."""
_NARROW, _WIDE = 2.0**-14, 2.0**15
"""Factors are kept where float16 has its full precision."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How fine."""

    step: float = 0.5
    """Distance of neighbouring values, in geometric means of the output channels' root mean squares; in [1/64, 8]."""
    scale: str = "float16"
    """How scales are stored: "float16" or "float32"."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(1 / 64 <= self.step <= 8, "step", "in [1/64, 8]", self.step)
        require_one_of(self.scale, "scale", ("float16", "float32"))


LEVELS = (Options(step=0.125), Options(step=0.25), Options(), Options(step=1.0))


def refuse(rows: int, columns: int, options: Options) -> str | None:
    """Why the options do not fit a weight of that shape, or None."""
    reason = _weights.misfit(rows, columns, None)
    return reason or _weights.no_gain(rows, columns, nbytes(rows, columns, options))


def nbytes(rows: int, columns: int, options: Options) -> int:
    """Bytes of the stored weight in memory; on disk it is smaller, see `file_bits`."""
    return rows * columns + rows * _stored.DTYPES[options.scale].itemsize + columns * 2


def file_bits(integers: torch.Tensor) -> int:
    """Bits that integers (O, I) in [-128, 127] take in a file: raw deflate of their bytes, Huffman coding alone."""
    raw = integers.T.to(torch.int8).contiguous().cpu().numpy().tobytes()
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return 8 * (len(coder.compress(raw)) + len(coder.flush()))


def fit(weight: torch.Tensor, options: Options, energy: torch.Tensor | None = None) -> Grid:
    """One scale for all of a weight (O, I), and a factor of each input by its energy (I,).

    A column whose largest entry would be beyond the largest integer gets a larger factor. Raises what the contract in
    `flyweight.codes` says, and UsageError for scales beyond float16.
    """
    weight, energy = _weights.checked(weight, energy)
    rows, columns = weight.shape
    _weights.require_fit(refuse(rows, columns, options))
    factors = torch.ones(columns) if energy is None else level(energy.double().add(_QUIET).rsqrt())[0]
    scales = _stored.kept(torch.full((rows, 1), options.step * _unit(weight)), options.scale)
    _stored.require_reach(scales, "scale")
    return Grid(-LIMIT, LIMIT, columns, scales, columns=covering(weight, scales, factors))


def level(sizes: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Sizes (I,) above 0 as factors, float16 numbers in float32, and their geometric mean, which was taken out."""
    mean = float(sizes.double().log().mean().exp())
    return (sizes / mean).clamp(_NARROW, _WIDE).half().float(), mean


def covering(
    weight: torch.Tensor, scales: torch.Tensor, factors: torch.Tensor, limit: int = LIMIT
) -> torch.Tensor:
    """Factors (I,), larger where the entries of a weight (O, I) under scales (O, 1) would be beyond a limit."""
    needed = (weight / scales).abs().amax(0) / limit
    raised = torch.maximum(factors, needed).clamp(_NARROW, _WIDE)
    halves = raised.half().float()
    return torch.where(halves < needed, (halves * (1 + 2.0**-10)).clamp(max=_WIDE).half().float(), halves)


def storable(grid: Grid, options: Options) -> Grid:
    """The same grid with scales and factors as they can be stored; raises UsageError for scales beyond float16."""
    found = _stored.with_scales(grid, options.scale)
    _stored.require_reach(found.scales, "scale")
    return replace(found, columns=_factors(grid).clamp(_NARROW, _WIDE).half().float())


def store(integers: torch.Tensor, grid: Grid, options: Options) -> dict[str, torch.Tensor]:
    """The integers as bytes (I, O), scales (O, 1) and factors (1, I); raises UsageError for what is not storable."""
    _stored.require_range(integers, grid)
    return {
        "integers": integers.T.to(torch.int8).clone(memory_format=torch.contiguous_format),
        "scales": _stored.store_floats(grid.scales, options.scale),
        "factors": _stored.store_floats(_factors(grid)[None], "float16"),
    }


def restore(stored: Mapping[str, torch.Tensor], columns: int, options: Options) -> tuple[torch.Tensor, Grid]:
    """The integers (O, columns) and the grid that were stored; raises ArtifactError for tensors of another form."""
    forms = {
        "integers": (torch.int8, (-1, columns)),
        "scales": (_stored.DTYPES[options.scale], (-1, 1)),
        "factors": (torch.float16, (1, columns)),
    }
    turned = {name: one.mT if name == "integers" and one.ndim == 2 else one for name, one in stored.items()}
    rows = _stored.expected(turned, forms)
    integers = turned["integers"].to(torch.int16).contiguous()
    if int(integers.min()) < -LIMIT:
        raise ArtifactError(f"stored integers must be in [{-LIMIT}, {LIMIT}]", got="-128", where="integers")
    scales = _stored.restore_scales(stored["scales"], rows)
    return integers, Grid(-LIMIT, LIMIT, columns, scales, columns=stored["factors"][0].float())


def _factors(grid: Grid) -> torch.Tensor:
    """The grid's factors of columns, ones where it has none."""
    return torch.ones(grid.group) if grid.columns is None else grid.columns


def _unit(weight: torch.Tensor) -> float:
    """The geometric mean of the output channels' root mean squares, channels of zeros left aside; 1 where all are."""
    squares = [one for one in weight.double().square().mean(1).tolist() if one > TINY * TINY]
    if not squares:
        return 1.0
    return math.exp(math.fsum(math.log(one) for one in squares) / len(squares) / 2)  # exact in any order
