"""-1, 0 and 1 times a scale per tensor, channel or group of inputs; five entries a byte, 1.6 bits each.

As in Li et al., "Ternary weight networks" (arXiv 1605.04711, 2016), but with the exact optimum: whatever the scale s, the
entries with magnitudes above s / 2 are not zero, so that one of the n thresholds between sorted magnitudes is the best.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flyweight.codes import _packing, _stored, _weights
from flyweight.codes._grid import Grid
from flyweight.codes._options import require_group, require_one_of
from flyweight.codes._search import usable


@dataclass(frozen=True, kw_only=True)
class Options:
    """Who shares a scale."""

    group: int | str | None = None
    """Inputs that share a scale: 16, 32, 64, 128 or 256; None: an output channel's; "tensor": all."""
    scale: str = "float32"
    """How scales are stored: "float32" or "float16"."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_group(self.group)
        require_one_of(self.scale, "scale", ("float32", "float16"))


LEVELS = (
    Options(group=32, scale="float16"),
    Options(group=64, scale="float16"),
    Options(),
)


def refuse(rows: int, columns: int, options: Options) -> str | None:
    """Why the options do not fit a weight of that shape, or None."""
    reason = _weights.misfit(rows, columns, options.group)
    return reason or _weights.no_gain(rows, columns, nbytes(rows, columns, options))


def nbytes(rows: int, columns: int, options: Options) -> int:
    """Bytes of the stored weight."""
    scale_rows, groups = _weights.scale_shape(rows, columns, options.group)
    scales = scale_rows * groups * _stored.DTYPES[options.scale].itemsize
    return rows * _packing.ternary_width(columns) + scales


def fit(weight: torch.Tensor, options: Options, energy: torch.Tensor | None = None) -> Grid:
    """The scales with the least squared error of a weight (O, I), weighed by the inputs' energy (I,).

    Raises what the contract in `flyweight.codes` says, and UsageError for scales beyond float16.
    """
    weight, energy = _weights.checked(weight, energy)
    rows, columns = weight.shape
    _weights.require_fit(refuse(rows, columns, options))
    groups, counts = _weights.grouped(weight, energy, options.group)
    scales = torch.cat([_fit(part, counts) for part in _weights.chunks(groups)])
    scales = _stored.kept(scales, options.scale)
    _stored.require_reach(scales, "scale")
    return Grid(-1, 1, _weights.group_length(columns, options.group), _weights.spread(scales, rows))


def storable(grid: Grid, options: Options) -> Grid:
    """The same grid with scales as they can be stored."""
    return _stored.with_scales(grid, options.scale)


def store(integers: torch.Tensor, grid: Grid, options: Options) -> dict[str, torch.Tensor]:
    """The packed integers (O, I) and scales; raises UsageError for what is not storable."""
    _stored.require_range(integers, grid)
    return {
        "integers": _packing.pack_ternary(integers),
        "scales": _stored.store_floats(grid.scales, options.scale, options.group == "tensor"),
    }


def restore(stored: Mapping[str, torch.Tensor], columns: int, options: Options) -> tuple[torch.Tensor, Grid]:
    """The integers (O, columns) and the grid that were stored; raises ArtifactError for tensors of another form."""
    forms = {
        "integers": (torch.uint8, (-1, _packing.ternary_width(columns))),
        "scales": (_stored.DTYPES[options.scale], _weights.scale_shape(-1, columns, options.group)),
    }
    rows = _stored.expected(stored, forms)
    integers = _packing.unpack_ternary(stored["integers"], columns)
    scales = _stored.restore_scales(stored["scales"], rows)
    return integers, Grid(-1, 1, _weights.group_length(columns, options.group), scales)


def _fit(groups: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """The best scales (A, G) of groups (A, G, n).

    With the k largest magnitudes m not zero, the best scale is sum(c m) / sum(c); it explains sum(c m)^2 / sum(c).
    """
    magnitudes, order = groups.abs().sort(dim=-1, descending=True, stable=True)
    shares = torch.ones_like(groups) if counts is None else counts.expand_as(groups).gather(-1, order)
    along = (shares.double() * magnitudes).cumsum(-1)  # float64: long sums of numbers that differ little
    length = shares.double().cumsum(-1)
    explained = torch.where(length > 0, along.square() / length, 0.0)
    at = explained.argmax(-1, keepdim=True)
    return usable((along.gather(-1, at) / length.gather(-1, at).clamp(min=1e-300))[..., 0].float())
