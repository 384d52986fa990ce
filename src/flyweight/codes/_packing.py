"""Integers of 1 to 8 and of 16 bits and ternary digits in bytes, row by row, without a gap inside a row.

Bits run from the lowest of the first byte upwards, so that the first of two 4-bit integers is in the low half, as in ONNX.
Shapes: O rows of I integers.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad as padded

_PLACES = (1, 3, 9, 27, 81)
"""What each of the five ternary digits of a byte counts."""


def packed_width(count: int, bits: int) -> int:
    """Bytes of a row of so many integers."""
    return -(-count * bits // 8)


def pack(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """The lowest bits of integers (O, I), (O, ceil(I * bits / 8)) uint8; negative ones in two's complement."""
    rows, count = integers.shape
    if bits == 16:
        return integers.to(torch.int16, copy=True, memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return integers.to(torch.int16).to(torch.uint8).clone(memory_format=torch.contiguous_format)
    low = (integers.to(torch.int16) & (2**bits - 1)).to(torch.uint8)
    fields = padded(low, (0, -count % 8)).view(rows, -1, 8)
    found = fields.new_zeros(rows, fields.shape[1], bits)
    for place in range(8):  # eight integers fill `bits` bytes
        byte, shift = divmod(place * bits, 8)
        found[..., byte] |= fields[..., place] << shift
        if shift + bits > 8:
            found[..., byte + 1] |= fields[..., place] >> (8 - shift)
    return found.flatten(1)[:, : packed_width(count, bits)].clone(memory_format=torch.contiguous_format)


def unpack(packed: torch.Tensor, bits: int, count: int, signed: bool) -> torch.Tensor:
    """The (O, count) int16 integers of `pack`; signed: they may be negative."""
    rows, width = packed.shape
    if bits == 16:
        return packed.contiguous().view(torch.int16).clone()
    if bits == 8:
        return (packed.view(torch.int8) if signed else packed).to(torch.int16)
    words = padded(packed, (0, -width % bits)).view(rows, -1, bits)
    fields = words.new_empty(rows, words.shape[1], 8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        field = words[..., byte] >> shift
        if shift + bits > 8:
            field = field | (words[..., byte + 1] << (8 - shift))
        fields[..., place] = field
    found: torch.Tensor = (fields.flatten(1)[:, :count] & (2**bits - 1)).to(torch.int16)
    sign = 2 ** (bits - 1)
    return (found ^ sign) - sign if signed else found


def ternary_width(count: int) -> int:
    """Bytes of a row of so many ternary digits."""
    return -(-count // 5)


def pack_ternary(integers: torch.Tensor) -> torch.Tensor:
    """Five of -1, 0, 1 (O, I) a byte, (O, ceil(I / 5)) uint8, the first in the lowest place of base 3."""
    digits = padded((integers + 1).to(torch.uint8), (0, -integers.shape[1] % 5)).unflatten(1, (-1, 5))
    found: torch.Tensor = (digits * _places()).sum(-1, dtype=torch.uint8)
    return found


def unpack_ternary(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The (O, count) int16 integers of `pack_ternary`."""
    digits = packed[..., None] // _places() % 3
    found: torch.Tensor = digits.flatten(1)[:, :count].to(torch.int16) - 1
    return found


def _places() -> torch.Tensor:
    return torch.tensor(_PLACES, dtype=torch.uint8)
