"""Which entries of a weight stay when the others become zero: the patterns, and their bits.

A weight (O, I) is cut into blocks of `height` output channels by `width` inputs, (O / height, I / width) of them; single
entries are blocks of one. A mask says of each block whether it stays.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from flyweight.codes._packing import pack, unpack

NAMED = re.compile(r"row|tensor|[1-9]\d{0,2}:[1-9]\d{0,2}|[1-9]\d{0,2}x[1-9]\d{0,2}")


@dataclass(frozen=True)
class Pattern:
    """How many blocks stay, and among which of them they are chosen."""

    name: str
    """"row": as many of each output channel; "tensor": any; "2:4": two of each four inputs; "16x16": blocks, any."""
    sparsity: float
    """Share of blocks that become zero, in (0, 1)."""

    @property
    def height(self) -> int:
        """Output channels of a block."""
        return int(self.name.split("x")[0]) if "x" in self.name else 1

    @property
    def width(self) -> int:
        """Inputs of a block."""
        return int(self.name.split("x")[1]) if "x" in self.name else 1

    @property
    def among(self) -> tuple[int, int] | None:
        """N and M where N of each M neighbouring inputs stay."""
        found = self.name.split(":")
        return (int(found[0]), int(found[1])) if len(found) == 2 else None

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why a weight of that shape cannot be cut so, or None."""
        length = self.among[1] if self.among else self.width
        if rows % self.height or columns % length:
            return f"its {rows} output channels of {columns} inputs do not divide into {self.name}"
        return None

    def blocks(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of the mask."""
        return rows // self.height, columns // self.width

    def kept(self, rows: int, columns: int) -> int:
        """Blocks that stay of a weight of that shape; at least one of those that they are chosen among."""
        high, wide = self.blocks(rows, columns)
        if self.among:
            return high * wide // self.among[1] * self.among[0]
        choices, each = (high, wide) if self.name == "row" else (1, high * wide)
        return choices * max(1, each - round(self.sparsity * each))

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """The mask of the blocks of scores (O, I) with the largest sums; of equals the first ones stay."""
        sums = self.cut(scores).sum(2)
        high, wide = sums.shape
        each = self.among[1] if self.among else wide if self.name == "row" else high * wide
        rivals = sums.reshape(-1, each)
        count = self.kept(*scores.shape) // len(rivals)
        best = torch.sort(rivals, dim=1, descending=True, stable=True).indices[:, :count]
        return torch.zeros_like(rivals, dtype=torch.bool).scatter_(1, best, True).view(high, wide)

    def cut(self, weight: torch.Tensor) -> torch.Tensor:
        """The blocks of a weight (O, I): (O / height, I / width, entries), row by row inside a block."""
        high, wide = self.blocks(*weight.shape)
        return weight.reshape(high, self.height, wide, self.width).transpose(1, 2).flatten(2)

    def joined(self, blocks: torch.Tensor) -> torch.Tensor:
        """The weight (O, I) of blocks as `cut` gives them."""
        high, wide = blocks.shape[:2]
        parts = blocks.view(high, wide, self.height, self.width).transpose(1, 2)
        return parts.reshape(high * self.height, wide * self.width)

    def spread(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask of blocks as one of entries, (O, I)."""
        return mask.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1)


def packed(mask: torch.Tensor) -> torch.Tensor:
    """A mask (R, C) as bits, (R, ceil(C / 8)) uint8, the first in the lowest place."""
    return pack(mask.to(torch.int16), 1)


def unpacked(bits: torch.Tensor, count: int) -> torch.Tensor:
    """The mask (R, count) of bits."""
    return unpack(bits, 1, count, signed=False) > 0
