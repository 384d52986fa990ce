"""Reads weights.safetensors strictly: the header is doubted before anything is allocated by its word.

`scan` and `load` take any file of tensors one behind the other, by its reader of headers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from flyweight.artifact._files import Sink, Stream, passed
from flyweight.artifact._strict import damaged, parse, shown
from flyweight.artifact.manifest import DTYPES, MAX_TENSORS, WEIGHTS, StoredTensor

MAX_HEADER = 2**20
"""Bytes. As for the manifest, which says more about each tensor than the header does."""
MAX_DIMENSIONS = 32
_LENGTH_BYTES = 8
_NAMES = {code: name for name, code in DTYPES.items()}


@dataclass(frozen=True)
class Extent:
    """Where a tensor lies: bytes [begin, end) of the buffer that follows the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    file: str = WEIGHTS
    padding: int = 0
    """Zero bytes behind it."""

    @property
    def place(self) -> str:
        """The file and the tensor, to show."""
        return _place(self.name, self.file)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A weights file as read from its first to its last byte."""

    sha256: str
    tensors: tuple[StoredTensor, ...]
    buffer: range
    """The bytes of the file that hold tensors."""


Header: TypeAlias = "Callable[[Any, int], tuple[bytes, tuple[Extent, ...]]]"
"""From a stream and its size to the bytes before the tensors and where each lies; the stream is then behind them."""


def scan(stream: Stream, size: int, sinks: Sequence[Sink], header: Header) -> Scan:
    """Digest a file of tensors of `size` bytes, whole and by tensor, in one pass; each piece goes to the sinks.

    Raises ArtifactError when the header is not strict or the file ends early.
    """
    head, extents = header(stream, size)
    whole = hashlib.sha256()
    sinks = [whole.update, *sinks]
    for sink in sinks:
        sink(head)
    tensors = []
    for extent in extents:
        part = hashlib.sha256()
        passed(stream, extent.end - extent.begin, [part.update, *sinks], extent.place)
        _pass_padding(stream, extent, sinks)
        tensors.append(_stored(extent, part.hexdigest()))
    return Scan(sha256=whole.hexdigest(), tensors=tuple(tensors), buffer=range(len(head), size))


def load(
    stream: Stream, size: int, expected: Sequence[StoredTensor], header: Header
) -> dict[str, torch.Tensor]:
    """The tensors, each in memory of its own, in the order of the file; the peak is the size of the file.

    Raises ArtifactError when one differs from what is expected.
    """
    found, loaded = [], {}
    extents = header(stream, size)[1]
    for extent in extents:
        data = bytearray(extent.end - extent.begin)
        _read_into(stream, data, extent.place)
        _pass_padding(stream, extent, [])
        found.append(_stored(extent, hashlib.sha256(data).hexdigest()))
        loaded[extent.name] = _tensor(extent, data)
    check_same(found, expected, extents[0].file if extents else WEIGHTS)
    return loaded


def check_same(found: Sequence[StoredTensor], expected: Sequence[StoredTensor], file: str) -> None:
    """Raise ArtifactError that names the first tensor which is not as expected, one too many or not there."""
    wanted = {tensor.name: tensor for tensor in expected}
    for tensor in found:
        other = wanted.pop(tensor.name, None)
        if other is None:
            raise damaged(
                "the manifest must list every tensor", got="one more", where=_place(tensor.name, file)
            )
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            raise damaged(
                f"the manifest lists {other.dtype} {shown(list(other.shape))}",
                got=f"{tensor.dtype} {shown(list(tensor.shape))}",
                where=_place(tensor.name, file),
            )
        if tensor.sha256 != other.sha256:
            raise damaged(
                f"the tensor's bytes must have the digest {other.sha256[:16]}...",
                got=f"{tensor.sha256[:16]}...",
                where=_place(tensor.name, file),
            )
    for name in wanted:
        raise damaged(
            "every tensor of the manifest must be there", got="no such tensor", where=_place(name, file)
        )


def read_header(stream: Stream, size: int, file: str = WEIGHTS) -> tuple[bytes, tuple[Extent, ...]]:
    """The bytes before the buffer, and where each tensor lies in it; raises ArtifactError, with the file, on any oddity."""
    start = stream.read(_LENGTH_BYTES)
    length = int.from_bytes(start, "little")
    if len(start) < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
        got = f"{size} bytes" if size else "an empty file"
        raise damaged("the file must hold its length and its header", got=got, where=file)
    if length > MAX_HEADER:
        raise damaged(f"a header may have {MAX_HEADER} bytes", got=f"{length}", where=file)
    header = stream.read(length)
    if len(header) < length or not header.startswith(b"{") or not header.rstrip(b" ").endswith(b"}"):
        got = shown(header[:20])
        raise damaged("the header must be an object, padded with spaces", got=got, where=file)
    document = parse(header, f"{file}, header")
    return start + header, _extents(document, size - _LENGTH_BYTES - length, file)


def _extents(document: dict[str, Any], buffer: int, file: str) -> tuple[Extent, ...]:
    _check_metadata(document.pop("__metadata__", {}), file)
    if len(document) > MAX_TENSORS:
        raise damaged(f"a file may hold {MAX_TENSORS} tensors", got=f"{len(document)}", where=file)
    extents = [_extent(name, value, file) for name, value in document.items()]
    extents.sort(key=lambda one: (one.begin, one.end, one.name))
    at = 0
    for extent in extents:
        if extent.begin != at:
            what = "a hole" if extent.begin > at else "an overlap"
            raise damaged("tensors must lie one behind the other", got=what, where=extent.place)
        at = extent.end
    if at != buffer:
        raise damaged(f"the tensors must fill the file, {at} bytes", got=f"{buffer} bytes", where=file)
    return tuple(extents)


def _check_metadata(value: Any, file: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise damaged("metadata must be texts", got=shown(value), where=f"{file}, __metadata__")


def _extent(name: str, value: Any, file: str) -> Extent:
    place = _place(name, file)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise damaged("a tensor has dtype, shape and data_offsets", got=shown(value), where=place)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _NAMES:
        raise damaged(f"a tensor's dtype is one of {', '.join(_NAMES)}", got=shown(dtype), where=place)
    if not _are_lengths(shape) or len(shape) > MAX_DIMENSIONS:
        raise damaged(f"a shape has at most {MAX_DIMENSIONS} lengths", got=shown(shape), where=place)
    if not _are_lengths(offsets) or len(offsets) != 2:
        raise damaged("data_offsets are two numbers", got=shown(offsets), where=place)
    needed = math.prod(shape) * _torch_dtype(_NAMES[dtype]).itemsize
    if offsets[1] - offsets[0] != needed:
        rule = f"{dtype} {shown(shape)} takes {needed} bytes"
        raise damaged(rule, got=f"{offsets[1] - offsets[0]}", where=place)
    return Extent(name, _NAMES[dtype], tuple(shape), offsets[0], offsets[1], file)


def _are_lengths(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _pass_padding(stream: Stream, extent: Extent, sinks: Sequence[Sink]) -> None:
    seen = bytearray()
    passed(stream, extent.padding, [seen.extend, *sinks], extent.place)
    if any(seen):
        raise damaged("what fills up must be zeros", got="other bytes", where=f"{extent.place}, padding")


def _read_into(stream: Stream, data: bytearray, place: str) -> None:
    view = memoryview(data)
    while view:  # one read moves at most 2 GiB
        count = stream.readinto(view)
        if not count:
            raise damaged(f"the file must have {len(view)} bytes more", got="its end", where=place)
        view = view[count:]


def _tensor(extent: Extent, data: bytearray) -> torch.Tensor:
    dtype = _torch_dtype(extent.dtype)
    if not data:
        return torch.empty(extent.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(extent.shape)


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)  # name comes from DTYPES, not from a file
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch.{name} is no dtype")
    return dtype


def _stored(extent: Extent, sha256: str) -> StoredTensor:
    return StoredTensor(name=extent.name, dtype=extent.dtype, shape=extent.shape, sha256=sha256)


def _place(name: str, file: str) -> str:
    return f"{file}, tensor {shown(name)}"
