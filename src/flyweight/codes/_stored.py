"""Stored tensors: scales in fewer bits, and the checks of what is written and of what is read.

Scales are kept as float32, float16, or e8m0: powers of two, the exponent plus 127 in a byte (Rouhani et al., "Microscaling
data formats", arXiv 2310.10537, 2023). Shapes: scales are (O, G).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import torch

from flyweight.codes._grid import Grid
from flyweight.errors import ArtifactError, UsageError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "float16": torch.float16, "e8m0": torch.uint8}
)
_LEAST_HALF = 2.0**-24
"""The smallest float16 above 0: no scale becomes 0."""


def kept(scales: torch.Tensor, kind: str) -> torch.Tensor:
    """The nearest scales that can be stored, in float32; infinite where float16 does not reach."""
    if kind == "float16":
        rounded = scales.half().float()
        return torch.where(rounded == 0, scales.sign() * _LEAST_HALF, rounded)
    if kind == "e8m0":
        below = power_below(scales)
        return torch.where(scales > below * 2**0.5, 2 * below, below).clamp(2.0**-126, 2.0**127)
    return scales


def power_below(numbers: torch.Tensor) -> torch.Tensor:
    """The largest powers of two that are not above float32 numbers' magnitudes; 0 for 0 and below 2^-126."""
    return (numbers.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)


def require_reach(values: torch.Tensor, name: str) -> None:
    """Raise UsageError where values that are stored as float16 became infinite."""
    if bool(torch.isinf(values).any()):
        raise UsageError(
            f"what is stored as float16 must be at most 65,504, and a {name} is not",
            where=name, way_out="choose float32",
        )  # fmt: skip


def with_scales(grid: Grid, kind: str) -> Grid:
    """The grid with the nearest scales that can be stored."""
    return dataclasses.replace(grid, scales=kept(grid.scales, kind))


def store_floats(values: torch.Tensor, kind: str, shared: bool = False) -> torch.Tensor:
    """Scales (O, G) or a table as they lie in the file; shared: one scale for the tensor, (1, 1).

    Raises UsageError where storing would change them.
    """
    found = values[:1, :1] if shared else values
    if not torch.equal(kept(found, kind).expand_as(values), values):
        form = f"{kind}, one for the whole tensor" if shared else kind
        raise UsageError(
            f"what is stored must be {form}", got="others", way_out="pass the grid through storable"
        )
    if kind == "e8m0":
        return (found.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return found.to(DTYPES[kind]).clone(memory_format=torch.contiguous_format)


def restore_scales(stored: torch.Tensor, rows: int) -> torch.Tensor:
    """The float32 scales (O, G) that were stored, (O, G) or (1, 1)."""
    exponents = stored.dtype == torch.uint8
    scales = (stored.to(torch.int32) << 23).view(torch.float32) if exponents else stored.float()
    return scales.expand(rows, -1).contiguous()


def expected(
    stored: Mapping[str, torch.Tensor], forms: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> int:
    """Rows of a stored weight, checked: exactly these tensors, by dtype and shape, where -1 is the number of rows.

    Raises ArtifactError.
    """
    if set(stored) != set(forms):
        raise ArtifactError(
            f"a weight of this code is stored as {', '.join(forms)}", got=", ".join(stored) or "nothing"
        )
    rows = int(stored["integers"].shape[0]) if stored["integers"].ndim else 0
    for name, (dtype, shape) in forms.items():
        wanted = tuple(rows if size == -1 else size for size in shape)
        if stored[name].dtype != dtype or stored[name].shape != wanted or not rows:
            raise ArtifactError(
                f"stored {name} must be {dtype} of shape {wanted}",
                got=f"{stored[name].dtype} {tuple(stored[name].shape)}", where=name,
            )  # fmt: skip
    return rows


def require_range(integers: torch.Tensor, grid: Grid) -> None:
    """Raise UsageError unless every integer is one of the grid's."""
    low, high = int(integers.min()), int(integers.max())
    if low < grid.low or high > grid.high:
        raise UsageError(f"integers must be in [{grid.low}, {grid.high}]", got=f"[{low}, {high}]")


def require_known(codes: torch.Tensor, highest: int) -> None:
    """Raise ArtifactError where stored codes are beyond the highest one."""
    wrong = int((codes > highest).sum())
    if wrong:
        raise ArtifactError(
            "stored numbers must be finite",
            got=f"{wrong:,} of {codes.numel():,} that are not",
            where="integers",
        )
