"""Writes GGUF, the file of llama.cpp: blocks of 32 packed integers with half-precision scales, and the file around them.

A file is a header (metadata, then name, shape, type and place of every tensor) and the tensors' bytes, each at a multiple
of ALIGNMENT. It is data: nothing in it is ever executed.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flyweight.errors import ModelError

Value: TypeAlias = "bool | int | float | str | list[int] | list[float] | list[str]"
"""What metadata may hold: integers are written with 32 bits, unsigned outside lists; numbers as float32."""
Bytes: TypeAlias = "NDArray[np.uint8]"
ALIGNMENT, BLOCK = 32, 32
_MAGIC, _VERSION = b"GGUF", 3
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True)
class Type:
    """How a tensor's values lie in the file, in blocks along its last dimension."""

    name: str
    number: int
    """The format's own number for it."""
    length: int
    """Values of a block."""
    bytes: int
    """Bytes of a block."""
    low: int = 0
    high: int = 0
    """The integers it holds, when it holds integers."""
    minimum: bool = False
    """Whether a block has a minimum: value = integer * scale + minimum, otherwise integer * scale."""


F32, F16 = Type("F32", 0, 1, 4), Type("F16", 1, 1, 2)
Q4_0, Q4_1 = Type("Q4_0", 2, BLOCK, 18, -8, 7), Type("Q4_1", 3, BLOCK, 20, 0, 15, True)
Q5_0, Q5_1 = Type("Q5_0", 6, BLOCK, 22, -16, 15), Type("Q5_1", 7, BLOCK, 24, 0, 31, True)
Q8_0 = Type("Q8_0", 8, BLOCK, 34, -128, 127)
INTEGERS = (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0)
"""The types that hold integers, smallest first."""


@dataclass(frozen=True)
class Tensor:
    """A tensor to write."""

    name: str
    type: Type
    shape: tuple[int, ...]
    """As in PyTorch: the last dimension is the one whose values are neighbours."""
    make: Callable[[], NDArray[Any]]
    """Makes its bytes when they are written, so that one tensor at a time is in memory."""

    @property
    def bytes(self) -> int:
        """Its bytes in the file, without padding."""
        return math.prod(self.shape) // self.type.length * self.type.bytes


def fitting(low: int, high: int, minimum: bool) -> Type | None:
    """The smallest type for integers in [low, high], which count from 0 where there is a minimum; None: there is none."""
    span = (0, high - low) if minimum else (low, high)
    able = (t for t in INTEGERS if t.minimum == minimum and t.low <= span[0] and span[1] <= t.high)
    return next(able, None)


def pack(
    kind: Type,
    integers: NDArray[Any],
    scales: NDArray[np.float32],
    minima: NDArray[np.float32] | None = None,
) -> Bytes:
    """The rows (O, bytes) uint8 of integers (O, I) with scales and minima (O, G), whose groups are whole blocks.

    Decoded, they give exactly integer * scale + minimum. Raises ModelError when an integer is not of the type or when a
    scale or minimum is no half-precision number; `halved` rounds them.
    """
    rows, columns = integers.shape
    _check_groups(columns, scales.shape[1])
    if integers.size and not (kind.low <= integers.min() and integers.max() <= kind.high):
        got = f"{integers.min()} to {integers.max()}"
        raise ModelError(f"{kind.name} holds integers from {kind.low} to {kind.high}", got=got)
    if (minima is not None) != kind.minimum:
        raise ModelError(f"{kind.name} takes scales{' and minima' if kind.minimum else ' alone'}")
    blocks = integers.reshape(rows, columns // BLOCK, BLOCK)
    halves = [_halves(each, columns // BLOCK) for each in (scales, minima) if each is not None]
    return np.concatenate([*halves, *_quants(kind, blocks)], axis=-1).reshape(rows, -1)


def unpack(
    packed: Bytes, columns: int
) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.float32] | None]:
    """The integers (O, columns), scales and minima (O, columns / 32) of `pack`; the type is told by the bytes of a block.

    Raises ModelError when no type has blocks of so many bytes.
    """
    count = columns // BLOCK
    kind = next((t for t in INTEGERS if count and packed.shape[1] == count * t.bytes), None)
    if kind is None or columns % BLOCK:
        rule = f"rows of {columns} values take whole blocks of a known type"
        raise ModelError(rule, got=f"{packed.shape[1]} bytes")
    blocks = np.ascontiguousarray(packed).reshape(len(packed), count, kind.bytes)
    ends = 4 if kind.minimum else 2
    halves = np.ascontiguousarray(blocks[..., :ends]).view("<f2").astype(np.float32)
    integers = _integers(kind, blocks[..., ends:]) + np.int16(kind.low)
    return integers.reshape(len(packed), columns), halves[..., 0], halves[..., 1] if kind.minimum else None


def halved(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest half-precision numbers, as float32; raises ModelError beyond their range, which ends at 65,504."""
    with np.errstate(over="ignore"):
        found = values.astype(np.float16).astype(np.float32)
    if not np.isfinite(found).all():
        raise ModelError(
            "scales in a GGUF are half-precision numbers, at most 65504",
            got=f"{np.abs(values).max():.3g}",
            way_out="leave this layer as it is",
        )
    return found


def plain(kind: Type, values: NDArray[np.float32]) -> NDArray[Any]:
    """The bytes of floats as F32 or F16."""
    return np.ascontiguousarray(values, dtype="<f4" if kind is F32 else "<f2")


def lossless_half(values: NDArray[np.float32]) -> bool:
    """Whether half precision holds every value exactly."""
    with np.errstate(over="ignore"):
        return bool((values.astype(np.float16).astype(np.float32) == values).all())


def write(path: Path, metadata: Mapping[str, Value], tensors: Sequence[Tensor]) -> None:
    """Write a file, tensor by tensor, beside its place, and put it there whole; OSError when the disk does not take it.

    Raises ModelError when two tensors have one name, or a row is no whole number of blocks.
    """
    head = _header(metadata, tensors)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(head)
            for tensor in tensors:
                data = tensor.make()
                if data.nbytes != tensor.bytes:
                    raise ModelError(f"{tensor.name} takes {tensor.bytes} bytes", got=str(data.nbytes))
                np.ascontiguousarray(data).tofile(file)
                file.write(bytes(-tensor.bytes % ALIGNMENT))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _check_groups(columns: int, groups: int) -> None:
    if not columns or not groups or columns % BLOCK or columns % groups or columns // groups % BLOCK:
        raise ModelError(
            f"groups that share a scale must be multiples of {BLOCK} inputs in a GGUF",
            got=f"{columns} inputs in {groups} groups",
            way_out=f"use groups of {BLOCK}",
        )


def _halves(values: NDArray[np.float32], blocks: int) -> Bytes:
    """(O, G) as the bytes (O, blocks, 2) of half-precision numbers, one a block."""
    if not (halved(values) == values).all():
        raise ModelError("scales and minima in a GGUF are half-precision numbers", got="finer ones")
    spread = np.repeat(values.astype("<f2"), blocks // values.shape[1], axis=1)
    return np.ascontiguousarray(spread)[..., None].view(np.uint8)


def _quants(kind: Type, blocks: NDArray[Any]) -> list[Bytes]:
    """The bytes of the integers (O, blocks, 32): fifth bits first, then halves of 16 in the low and the high nibble."""
    if kind is Q8_0:
        return [blocks.astype(np.int8).view(np.uint8)]
    codes = (blocks.astype(np.int16) - kind.low).astype(np.uint8)
    nibbles = ((codes[..., :16] & 15) | (codes[..., 16:] & 15) << 4).astype(np.uint8)
    if kind in (Q4_0, Q4_1):
        return [nibbles]
    return [np.packbits((codes >> 4).astype(np.uint8), axis=-1, bitorder="little"), nibbles]


def _integers(kind: Type, quants: Bytes) -> NDArray[np.int16]:
    """The integers of `_quants`, counted from the type's lowest."""
    if kind is Q8_0:
        return np.ascontiguousarray(quants).view(np.int8).astype(np.int16) - np.int16(kind.low)
    nibbles = quants[..., -16:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).astype(np.int16)
    if kind in (Q5_0, Q5_1):
        codes += np.unpackbits(quants[..., :4], axis=-1, bitorder="little").astype(np.int16) << 4
    return codes


def _header(metadata: Mapping[str, Value], tensors: Sequence[Tensor]) -> bytes:
    names = [tensor.name for tensor in tensors]
    if len(set(names)) < len(names):
        raise ModelError("tensors of a GGUF must have different names", got=", ".join(names))
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(value)]
    offset = 0
    for tensor in tensors:
        if tensor.shape[-1] % tensor.type.length:
            raise ModelError(f"rows of {tensor.type.name} have whole blocks", got=str(tensor.shape[-1]))
        parts += [_string(tensor.name), struct.pack("<I", len(tensor.shape))]
        parts += [struct.pack("<Q", length) for length in reversed(tensor.shape)]
        parts += [struct.pack("<IQ", tensor.type.number, offset)]
        offset += tensor.bytes + -tensor.bytes % ALIGNMENT
    head = b"".join(parts)
    return head + bytes(-len(head) % ALIGNMENT)


def _value(value: Value) -> bytes:
    """A value's type and bytes."""
    if isinstance(value, list):
        one = value[0] if value else 0
        kind = _STRING if isinstance(one, str) else _FLOAT32 if isinstance(one, float) else _INT32
        head = struct.pack("<IIQ", _ARRAY, kind, len(value))
        if kind == _STRING:
            return head + b"".join(_string(str(item)) for item in value)
        return head + np.array(value, "<f4" if kind == _FLOAT32 else "<i4").tobytes()
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    return struct.pack("<I", _STRING) + _string(value)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
