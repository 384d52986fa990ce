"""Steps that follow how the inputs go together, and error feedback on them: the bits go where they tell.

Lifar et al., "WaterSIC: information-theoretically (near) optimal linear layer quantization" (arXiv 2603.04956, 2026). With an
entropy code an entry may have any step; its error then comes out at the layer's output times the diagonal R_ii of the
triangular factor of the Gram matrix (see _factor.py), once error feedback has made up for the rest. Equal shares of the
output's error, which cost the fewest bits, so need the step level / R_ii in column i. Where it is known how much each output
channel counts for the model's own output (Seen.rows, the mean squared slope f of the log-likelihood), the step
of a channel is one over the root of that too. Then an entry adds about level^2 / 24 to the model's Kullback-Leibler
divergence, in any layer: one level for a whole model spends the bits where they count, which is reverse waterfilling.

Small integers cost fewer bits, so that a little more error may pay: least is error + lambda * bits, lambda being what a
bit is worth on an even grid, 2 ln 2 / 12 of a squared step (Sullivan & Wiegand, "Rate-distortion optimization for video
compression", IEEE Signal Processing Magazine 1998). For normal entries with a standard deviation of s steps that is the
integer nearest to the entry divided by 1 + 1 / (12 s^2); error feedback makes up for what this leaves.

Only for the code `entropy`, whose grids have factors of columns. Inputs that were always zero get the coarsest step of all.
A weight of zeros, or a layer whose inputs are all always zero, is rounded to nearest on the grid as it came. Weights or
matrices with NaN are refused.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from flyweight.codes._grid import Grid
from flyweight.codes._options import require
from flyweight.codes.entropy import LIMIT, covering, file_bits, level
from flyweight.errors import DataError, UsageError
from flyweight.roundings._checks import sound_gram, sound_weight
from flyweight.roundings._columns import Columns, nearest_column
from flyweight.roundings._factor import Factor, factorize
from flyweight.roundings._parts import rows_of
from flyweight.roundings._seen import Seen
from flyweight.roundings.error_feedback import fed, target_of

NEEDS = "gram"
WHOLE = True
"""It takes layers whose output channels all read the same inputs: there is one factor for a column."""
TABLES = True
"""It takes embeddings too, by what their lookups count."""
ROWS = True
"""It has use for Seen.rows."""

_PULL = 1 / 12
"""What a bit is worth: how far entries are pulled to 0 where they spread over one step."""
_QUIET = 0.05
"""Share of the mean importance that is added to each channel's, as little is known of it."""
_ROOM = LIMIT - 7
"""The largest integer of a weight before errors are carried into it."""
_SAMPLE = 128
"""Output channels on which a level is tried."""
_NEAR = 0.02
"""Bits an entry by which a layer may be smaller than asked."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How fine, by size or by damage; neither: as many bits as rounding to nearest takes on the given grid."""

    bits: float | None = None
    """Bits an entry in the file, scales and factors included, in [1.25, 7]; what cannot be met is come near to."""
    level: float | None = None
    """The water level, above 0: an entry adds about level^2 / 24 to the loss, or to each output's error without Seen.rows."""
    act_order: bool = True
    """Inputs with the largest mean square first."""
    damping: float = 0.03
    """Added to the Gram matrix's diagonal, as a share of its mean, in [0, 1]; more where the matrix is singular."""
    drift: float = 0.0
    """Share of the earlier layers' changes that this layer makes up for, in [0, 1]; without Seen.cross there are none."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.bits is None or 1.25 <= self.bits <= 7, "bits", "in [1.25, 7], or None", self.bits)
        positive = self.level is None or 0 < self.level < math.inf
        require(positive, "level", "above 0, or None", self.level)
        require(self.bits is None or self.level is None, "level", "None when bits are given", self.level)
        require(0 <= self.damping <= 1, "damping", "in [0, 1]", self.damping)
        require(0 <= self.drift <= 1, "drift", "in [0, 1]", self.drift)


@dataclass(frozen=True, eq=False)
class _Task:
    """A layer's target, and the shape of its steps: step = water level * rows * columns * unit."""

    target: torch.Tensor  # (O, I)
    grid: Grid
    factor: Factor
    rows: torch.Tensor  # (O, 1)
    columns: torch.Tensor  # (I,) with a geometric mean of 1
    unit: float


def pick(weight: torch.Tensor, grid: Grid, seen: Seen, options: Options) -> tuple[torch.Tensor, Grid]:
    """The int16 integers (O, I) of a weight (O, I), on a grid with scales and factors of its own.

    Raises DataError when what was seen is missing, not finite or negative, UsageError for a grid of another code than
    entropy, ModelError or UsageError for a weight or grid that cannot be used.
    """
    weight = sound_weight(weight, grid)
    if grid.columns is None:
        raise UsageError(
            "waterfilling needs a code whose columns have factors", got="a grid without them",
            way_out="take the code entropy, or the rounding error_feedback",
        )  # fmt: skip
    gram, rows = sound_gram(seen, weight), _row_steps(seen, weight)
    factor = factorize(gram, options.act_order, options.damping)
    if factor is None or not bool(weight.any()):
        return grid.nearest(weight), grid
    target = target_of(weight, gram, seen, factor, options.drift)
    columns, unit = level(_column_steps(factor, gram.diagonal() <= 0))
    task = _Task(target, grid, factor, rows, columns, unit)
    if options.level is not None:
        return _at(task, options.level)
    wanted = file_bits(grid.nearest(weight)) / weight.numel()
    if options.bits is not None:
        wanted = max(1.05, options.bits - _overhead(grid))
    return _sized(task, wanted)


def _row_steps(seen: Seen, weight: torch.Tensor) -> torch.Tensor:
    """(O, 1) one over the root of each output channel's importance; ones where that is not known."""
    if seen.rows is None:
        return weight.new_ones(len(weight), 1)
    found = seen.rows.double()
    if found.shape != (len(weight),) or not bool((torch.isfinite(found) & (found >= 0)).all()):
        raise DataError(
            f"the importance of output channels must be ({len(weight)},), finite and not negative",
            got=f"{tuple(found.shape)}",
        )
    if not bool(found.any()):
        return weight.new_ones(len(weight), 1)
    return (found + _QUIET * found.mean()).rsqrt().float()[:, None]


def _column_steps(factor: Factor, dead: torch.Tensor) -> torch.Tensor:
    """(I,) float64: one over each input's part of the output, 1 / R_ii, the largest of all for dead inputs (I,)."""
    found = torch.empty_like(dead, dtype=torch.float64)
    found[factor.order] = 1 / (factor.root.diagonal().flip(0).double() * factor.scale**0.5)
    found[dead] = found[~dead].max()
    return found


def _overhead(grid: Grid) -> float:
    """Bits an entry that scales and factors take."""
    rows, columns = len(grid.scales), grid.group
    return 16 * ((1 if _in_halves(grid) else 2) * rows + columns) / (rows * columns)


def _in_halves(grid: Grid) -> bool:
    """Whether scales are stored as float16: a code's fit gave none that is not."""
    return bool((grid.scales.half().float() == grid.scales).all())


def _grid(task: _Task, water: float) -> Grid:
    """The grid at a water level."""
    scales = task.rows.double() * (water * task.unit)
    if len(scales) > task.grid.group:  # else a few large channels would make a column's steps coarser for all
        needed = (task.target / task.columns).abs().amax(1, keepdim=True) / _ROOM
        scales = torch.maximum(scales, needed.double())
    if _in_halves(task.grid):
        scales = scales.clamp(2.0**-24, 65504).half()
    scales = scales.float().clamp(1e-30, 1e30)
    factors = covering(task.target, scales, task.columns, _ROOM)
    return dataclasses.replace(task.grid, scales=scales, columns=factors)


def _at(task: _Task, water: float) -> tuple[torch.Tensor, Grid]:
    """The integers and the grid at a water level."""
    grid = _grid(task, water)
    return fed(task.target, grid, task.factor, _cheap_column), grid


def _cheap_column(on: Columns, wish: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers (O,) with the least of error and bits for a wish (O,), as floats, and their values (O,)."""
    step = 1.0 if on.factors is None else on.factors[column]
    spread = float((wish / on.scales[0]).square().mean()) / step**2
    return nearest_column(on, wish * (spread / (spread + _PULL)), column)


def _sized(task: _Task, wanted: float) -> tuple[torch.Tensor, Grid]:
    """The integers and the grid whose integers take so many bits an entry in the file, or hardly fewer."""
    water = _tried(task, wanted)
    for _ in range(5):
        integers, grid = _at(task, water)
        over = file_bits(integers) / integers.numel() - wanted
        if -_NEAR <= over <= 0:
            break
        water *= 2 ** (over + _NEAR / 2)  # half the step is one bit more
    return integers, grid


def _tried(task: _Task, wanted: float) -> float:
    """A water level that gives about so many bits an entry, found on some output channels."""
    rows = slice(None, None, -(-len(task.target) // _SAMPLE))
    part = dataclasses.replace(
        task, target=task.target[rows], grid=rows_of(task.grid, rows), rows=task.rows[rows]
    )
    sizes = (part.target / part.rows / (part.columns * part.unit)).double().square().mean(1).sqrt()
    sizes = sizes[sizes > 0]
    water = float(sizes.log().mean().exp()) * 2 ** (2.1 - wanted) if len(sizes) else 1.0
    if len(part.target) == len(task.target):
        return water
    for _ in range(4):
        over = file_bits(_at(part, water)[0]) / part.target.numel() - wanted
        if abs(over) < _NEAR:
            break
        water *= 2 ** max(-3.0, min(3.0, over))
    return water
