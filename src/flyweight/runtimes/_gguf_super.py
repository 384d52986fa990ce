"""Blocks of llama.cpp's k-quants and uneven types: what the codes `super_block` and `iq4_nl` store, laid out as ggml does.

Small integers lie in planes: fields of a few bits, a byte holding those of entries that are some way apart. Nothing is
rounded, either way. Shapes: a weight is (O, I); N blocks in all, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flyweight.codes import _packing, super_block
from flyweight.codes._super_fit import BLOCK as SUPER
from flyweight.codes._super_fit import Form
from flyweight.errors import ModelError
from flyweight.runtimes._gguf import BLOCK, Bytes, Type


class _Plane(NamedTuple):
    """Some bits of every entry of the integers, or of the multiples and lifts, one after the other."""

    shift: int
    """Their place in an entry."""
    bits: int
    apart: int
    """Entries between two neighbours in a byte; so many bytes, then the entries behind them."""
    small: bool = False
    """Of the multiples."""


@dataclass(frozen=True)
class Layout:
    """What a block holds, in order."""

    type: Type
    order: tuple[str | _Plane, ...]
    form: Form | None = None
    """The super-block; None: blocks have scales of their own."""

    def size(self, part: str | _Plane) -> int:
        """Bytes of a part."""
        if isinstance(part, str):
            return np.dtype(np.float16).itemsize
        return (self.smalls if part.small else self.type.length) * part.bits // 8

    @property
    def smalls(self) -> int:
        """Multiples and lifts in a block; those of 6 bits that share bytes count as the bytes."""
        if self.form is None:
            return 0
        if self.form.lifted and self.form.bits == 6:
            return 12
        return self.form.groups * (2 if self.form.lifted else 1)


def _super(name: str, number: int, size: int, *order: str | _Plane) -> Layout:
    bits, uneven = int(name.removeprefix("I")[1]), name.startswith("I")
    return Layout(Type(name, number, SUPER, size), order, super_block.FORMS[bits, uneven])


_BYTES = _Plane(0, 8, 1, small=True)
_LAYOUTS = (
    _super("Q2_K", 10, 84, _Plane(0, 4, 16, small=True), _Plane(0, 2, 32), "supers", "floors"),
    _super(
        "Q3_K", 11, 110, _Plane(2, 1, 32), _Plane(0, 2, 32),
        _Plane(0, 4, 8, small=True), _Plane(4, 2, 4, small=True), "supers",
    ),
    _super("Q4_K", 12, 144, "supers", "floors", _BYTES, _Plane(0, 4, 32)),
    _super("Q5_K", 13, 176, "supers", "floors", _BYTES, _Plane(4, 1, 32), _Plane(0, 4, 32)),
    _super("Q6_K", 14, 210, _Plane(0, 4, 64), _Plane(4, 2, 32), _BYTES, "supers"),
    _super(
        "IQ4_XS", 23, 136, "supers", _Plane(4, 2, 1, small=True), _Plane(0, 4, 1, small=True), _Plane(0, 4, 16)
    ),
    Layout(Type("IQ4_NL", 20, BLOCK, 18), ("scales", _Plane(0, 4, 16))),
)  # fmt: skip
LAYOUTS: Mapping[str, Layout] = MappingProxyType({layout.type.name: layout for layout in _LAYOUTS})
"""By the format's own names."""


def layout_of(code: str, options: Any) -> Layout | None:
    """The layout of what a code stores; None: it has no such blocks."""
    if code == "iq4_nl":
        return LAYOUTS["IQ4_NL"]
    if code == "super_block":
        return LAYOUTS["IQ4_XS" if options.uneven else f"Q{options.bits}_K"]
    return None


def pack(layout: Layout, stored: Mapping[str, torch.Tensor], columns: int) -> Bytes:
    """The rows (O, bytes) uint8 of what a code stores for a weight with so many inputs."""
    rows, count = len(stored["integers"]), len(stored["integers"]) * columns // layout.type.length
    integers = _counted(stored["integers"], _bits(layout), columns, _lowest(layout)).reshape(count, -1)
    smalls = _smalls(layout.form, stored, count) if layout.form else integers
    parts = []
    for part in layout.order:
        if isinstance(part, str):
            parts.append(stored[part].cpu().numpy().view(np.uint8).reshape(count, -1))
        else:
            parts.append(_folded(smalls if part.small else integers, part))
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def unpack(layout: Layout, packed: Bytes, columns: int) -> dict[str, torch.Tensor]:
    """What the code stores, from the rows (O, bytes) of `pack`; raises ModelError for rows of another length."""
    wanted = columns // layout.type.length * layout.type.bytes
    if columns % layout.type.length or packed.shape[1] != wanted:
        rule = f"rows of {columns} values of {layout.type.name} take {wanted} bytes"
        raise ModelError(rule, got=str(packed.shape[1]))
    blocks, start, found = packed.reshape(-1, layout.type.bytes), 0, {}
    integers = np.zeros((len(blocks), layout.type.length), np.uint8)
    smalls = np.zeros((len(blocks), layout.smalls), np.uint8)
    for part in layout.order:
        raw, start = blocks[:, start : start + layout.size(part)], start + layout.size(part)
        if isinstance(part, str):
            found[part] = _tensor(raw, len(packed)).view(torch.float16)
        else:
            (smalls if part.small else integers)[:] |= _spread(raw, part)
    whole = _tensor(integers, len(packed)).to(torch.int16) + _lowest(layout)
    found["integers"] = _packing.pack(whole, _bits(layout))
    return found | (_split(layout.form, smalls, len(packed)) if layout.form else {})


def _bits(layout: Layout) -> int:
    """Bits of an integer."""
    return sum(part.bits for part in layout.order if isinstance(part, _Plane) and not part.small)


def _lowest(layout: Layout) -> int:
    return layout.form.low if layout.form else 0


def _tensor(raw: Bytes, rows: int) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(raw).reshape(rows, -1))


def _counted(packed: torch.Tensor, bits: int, count: int, lowest: int) -> Bytes:
    """Packed integers (O, count), counted from 0."""
    unpacked = _packing.unpack(packed, bits, count, signed=lowest < 0)
    if bits == 8:  # of these the format has the bytes as they are
        return unpacked.to(torch.uint8).cpu().numpy()
    found: Bytes = (unpacked - lowest).to(torch.uint8).cpu().numpy()
    return found


def _smalls(form: Form, stored: Mapping[str, torch.Tensor], blocks: int) -> Bytes:
    """Multiples and lifts (N, ...) of blocks, counted from 0."""
    lowest = 0 if form.lifted else -form.most
    names = ("multiples", "lifts") if form.lifted else ("multiples",)
    count = stored["multiples"].shape[1] * 8 // form.bits
    each = [_counted(stored[name], form.bits, count, lowest).reshape(blocks, -1) for name in names]
    if len(each) == 1 or form.bits != 6:
        return np.concatenate(each, axis=1)
    first = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in each]
    return np.concatenate([*first, each[0][:, 4:] & 15 | each[1][:, 4:] << 4], axis=1)


def _split(form: Form, smalls: Bytes, rows: int) -> dict[str, torch.Tensor]:
    """The stored multiples and lifts of `_smalls`."""
    lowest = 0 if form.lifted or form.bits == 8 else -form.most
    each = [smalls]
    if form.lifted and form.bits == 6:
        low, high = smalls[:, 8:] & 15, smalls[:, 8:] >> 4
        each = [
            np.concatenate([first & 63, last | first >> 6 << 4], axis=1)
            for first, last in ((smalls[:, :4], low), (smalls[:, 4:8], high))
        ]
    elif form.lifted:
        each = np.split(smalls, 2, axis=1)
    return {
        name: _packing.pack(_tensor(part, rows).to(torch.int16) + lowest, form.bits)
        for name, part in zip(("multiples", "lifts"), each, strict=False)
    }


def _folded(entries: Bytes, plane: _Plane) -> Bytes:
    """A plane (N, bytes) of entries (N, n)."""
    each = 8 // plane.bits
    fields = (entries >> plane.shift & (1 << plane.bits) - 1).reshape(len(entries), -1, each, plane.apart)
    shifts = np.arange(0, 8, plane.bits, dtype=np.uint8)[:, None]
    found: Bytes = np.bitwise_or.reduce(fields << shifts, axis=2).reshape(len(entries), -1)
    return found


def _spread(raw: Bytes, plane: _Plane) -> NDArray[np.uint8]:
    """What a plane (N, bytes) says of its entries, (N, n)."""
    shifts = np.arange(0, 8, plane.bits, dtype=np.uint8)[:, None]
    fields = raw.reshape(len(raw), -1, 1, plane.apart) >> shifts & (1 << plane.bits) - 1
    found: Bytes = (fields << plane.shift).astype(np.uint8).reshape(len(raw), -1)
    return found
