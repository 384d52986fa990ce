"""The values that the entries of a weight may take: what a code fits, and what a rounding picks from.

Shapes: a weight is (O, I), output channels by inputs of one of them; G groups of inputs share a scale; P tables serve
O / P output channels each, in order. Where v neighbouring inputs share an integer, as in a table of vectors, integers are
(O, I / v).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flyweight.codes import _vectors
from flyweight.codes._sparsity import Pattern


@dataclass(frozen=True, eq=False)
class Grid:
    """Every entry is an integer in [low, high], for (level - zero) * scale * column + offset; a table may hold the levels."""

    low: int
    high: int
    group: int
    """Inputs that share a scale: I / G."""
    scales: (
        torch.Tensor
    )  # (O, G) float32; below 0 too where low < -high; 0 only for zeros where no level is 0
    zeros: torch.Tensor | None = None  # (O, G) float32; None: 0
    table: torch.Tensor | None = None  # (P, high - low + 1) float32, ascending; None: the integers themselves
    # or (1, high - low + 1, v) in any order: v neighbouring inputs share an integer
    columns: torch.Tensor | None = None  # (I,) float32, above 0: a further factor of each input; None: 1
    offsets: torch.Tensor | None = None  # (O, G) float32, added last; None: 0
    fixed: bool = False
    """Whether scales and offsets are stored as multiples of others, so that a rounding must leave them as they are."""
    mask: torch.Tensor | None = (
        None  # (O, I) bool: where it is false the integer is 0, and so the value; None: true
    )
    pattern: Pattern | None = None
    """Of which kind the mask is: a rounding may choose another one of that kind."""

    @property
    def width(self) -> int:
        """Neighbouring inputs that share an integer."""
        return 1 if self.table is None or self.table.ndim == 2 else self.table.shape[2]

    def nearest(
        self, weight: torch.Tensor, start: int = 0, energy: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The int16 integers whose values are nearest to the columns start, start + 1, ... of a weight (O, n).

        Halves go to the even integer, in a table to the lower one. energy (n,): what the inputs that share an integer count.
        """
        scales, zeros, offsets = self._columns(start, weight.shape[1])
        levels = (weight.float() if offsets is None else weight.float() - offsets) / scales
        if self.columns is not None:
            levels = levels / self.columns[start : start + weight.shape[1]]
        if zeros is not None:
            levels = levels + zeros
        if self.table is None:
            found = levels.round().clamp(self.low, self.high).to(torch.int16)
            return found if self.mask is None else found * self.mask[:, start : start + found.shape[1]]
        if self.width > 1:
            counts = None if energy is None else energy.expand_as(levels).reshape(-1, self.width)
            found = _vectors.nearest(levels.reshape(-1, self.width), counts, self.table[0])
            return (found.view(len(levels), -1) + self.low).to(torch.int16)
        middles = (self.table[:, 1:] + self.table[:, :-1]) / 2
        found = torch.searchsorted(middles, levels.reshape(len(self.table), -1).contiguous())
        return (found.reshape(levels.shape) + self.low).to(torch.int16)

    def values(self, integers: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The float32 values (O, n) that integers in the columns start, start + 1, ... stand for."""
        scales, zeros, offsets = self._columns(start, integers.shape[1] * self.width)
        if self.table is None:
            levels = integers.float()
        elif self.width > 1:
            levels = self.table[0][integers.long() - self.low].flatten(1)
        else:
            index = (integers.long() - self.low).reshape(len(self.table), -1)
            levels = self.table.gather(1, index).reshape(integers.shape)
        found = (levels if zeros is None else levels - zeros) * scales
        if self.columns is not None:
            found = found * self.columns[start : start + found.shape[1]]
        return found if offsets is None else found + offsets

    def _columns(
        self, start: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Scales, zeros and offsets of the columns, (O, count)."""
        which = torch.arange(start, start + count) // self.group
        zeros, offsets = (None if one is None else one[:, which] for one in (self.zeros, self.offsets))
        return self.scales[:, which], zeros, offsets
