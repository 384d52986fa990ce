"""Reads the tensors of a Hugging Face folder one by one, by seeking and reading: nothing is mapped, no shard is held.

The headers of all shards are doubted as those of artifacts are, before a byte of a tensor is read. A name in the index is
the name of a file in the folder; a link is followed, since caches are made of links.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flyweight.artifact._files import PIECE, disk_errors
from flyweight.artifact._strict import damaged, parse, shown
from flyweight.artifact._weights import Extent, read_header
from flyweight.artifact.manifest import WEIGHTS
from flyweight.errors import ArtifactError, ModelError

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
MAX_INDEX = 2**26
"""Bytes."""
MAX_SHARDS = 10_000
_AGAIN = "get an undamaged copy of the folder"


@dataclass(frozen=True)
class Source:
    """A folder's tensors by name. Their extents are places in whole files, headers included."""

    folder: Path
    tensors: Mapping[str, Extent]
    digest: str
    """Of the configuration and of each shard's name, size and header, in hex: not of the tensors' bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(extent.end - extent.begin for extent in self.tensors.values())


def opened(folder: Path) -> Source:
    """The tensors of a folder, none of them read yet.

    Raises ArtifactError for a missing shard or one whose header is not strict, MachineError when a file cannot be read.
    """
    found = hashlib.sha256(_bytes(folder, CONFIG, MAX_INDEX))
    index = _index(folder)
    tensors: dict[str, Extent] = {}
    for shard in sorted(set(index.values())) if index is not None else [SINGLE]:
        extents, mark = header(folder, shard)
        found.update(f"{shard} {mark}\n".encode())
        for extent in extents:
            if extent.name in tensors:
                raise _refused("a tensor must lie in one shard", "it twice", extent.place)
            tensors[extent.name] = extent
    for name, shard in (index or {}).items():
        if name not in tensors or tensors[name].file != shard:
            raise _refused(f"the index places {shown(name)} there", "no such tensor", shown(shard))
    return Source(folder, tensors, found.hexdigest())


def header(folder: Path, shard: str) -> tuple[list[Extent], str]:
    """Where each tensor of a shard lies, as a place in the whole file; and the shard's size with the digest of its header.

    Raises ArtifactError for a header that is not strict.
    """
    with _stream(folder, shard) as (stream, size):
        try:
            head, extents = read_header(stream, size)
        except ArtifactError as error:
            where = error.where.replace(WEIGHTS, shown(shard))
            raise damaged(error.rule, got=error.got, where=where, way_out=_AGAIN) from None
    start = len(head)
    placed = [
        dataclasses.replace(one, begin=one.begin + start, end=one.end + start, file=shard) for one in extents
    ]
    return placed, f"{size} {hashlib.sha256(head).hexdigest()}"


def loaded(folder: Path, shard: str) -> dict[str, torch.Tensor]:
    """All tensors of a file of our own, whatever their values."""
    return {
        extent.name: _tensor(_raw(folder, extent), extent.dtype).reshape(extent.shape)
        for extent in header(folder, shard)[0]
    }


def read(source: Source, name: str) -> torch.Tensor:
    """A tensor in memory of its own, in its own type.

    Raises ModelError where a value is NaN or infinite, ArtifactError where the file ends early.
    """
    extent = source.tensors[name]
    tensor = _tensor(_raw(source.folder, extent), extent.dtype).reshape(extent.shape)
    _require_finite(tensor, extent)
    return tensor


def rows(source: Source, name: str, places: Sequence[int]) -> torch.Tensor:
    """Some rows of a tensor, (len(places), ...), without reading the others; raises as `read` does."""
    extent = source.tensors[name]
    width = (extent.end - extent.begin) // extent.shape[0]
    data = bytearray(width * len(places))
    with _stream(source.folder, extent.file) as (stream, _):
        for number, place in enumerate(places):
            view = memoryview(data)[number * width : (number + 1) * width]
            _fill(stream, extent.begin + place * width, view, extent)
    tensor = _tensor(data, extent.dtype).reshape(len(places), *extent.shape[1:])
    _require_finite(tensor, extent)
    return tensor


def pieces(source: Source, name: str) -> Iterator[bytes]:
    """A tensor's bytes, piece by piece; raises as `read` does."""
    extent = source.tensors[name]
    with _stream(source.folder, extent.file) as (stream, _):
        for begin in range(extent.begin, extent.end, PIECE):
            piece = bytearray(
                min(PIECE, extent.end - begin)
            )  # a whole number of values: PIECE is a power of 2
            _fill(stream, begin, memoryview(piece), extent)
            _require_finite(_tensor(piece, extent.dtype), extent)
            yield bytes(piece)


def document(folder: Path, name: str) -> dict[str, Any]:
    """The object in a strict JSON file; raises ArtifactError when it is none."""
    value = parse(_bytes(folder, name, MAX_INDEX), name)
    if not isinstance(value, dict):
        raise _refused("the file must hold an object", type(value).__name__, name)
    return value


def _index(folder: Path) -> dict[str, str] | None:
    """The shard of each tensor; None where all lie in one file."""
    if not (folder / INDEX).exists():
        return None
    placed = document(folder, INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise _refused("the index must say where each tensor lies", shown(placed), INDEX)
    for name, shard in placed.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise _refused(
                "a shard is a safetensors file in the folder", shown(shard), f"{INDEX}, {shown(name)}"
            )
    if len(set(placed.values())) > MAX_SHARDS:
        raise _refused(f"a model may have {MAX_SHARDS:,} shards", f"{len(set(placed.values())):,}", INDEX)
    return placed


def _raw(folder: Path, extent: Extent) -> bytearray:
    data = bytearray(extent.end - extent.begin)
    with _stream(folder, extent.file) as (stream, _):
        _fill(stream, extent.begin, memoryview(data), extent)
    return data


def _bytes(folder: Path, name: str, most: int) -> bytes:
    with _stream(folder, name) as (stream, size):
        if size > most:
            raise _refused(f"this file may have {most} bytes", f"{size}", name)
        data = bytearray(size)
        _fill(stream, 0, memoryview(data), Extent(name, "uint8", (size,), 0, size, name))
        return bytes(data)


@contextmanager
def _stream(folder: Path, name: str) -> Iterator[tuple[io.FileIO, int]]:
    """An unbuffered stream of a regular file, and its size."""
    path = folder / name
    if not path.exists():
        raise _refused("every file of the model must be there", "no such file", shown(name))
    with disk_errors(path):
        handle = io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    with handle:
        state = os.fstat(handle.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise _refused("a model holds regular files", "something else", shown(name))
        yield handle, state.st_size


def _fill(stream: io.FileIO, begin: int, view: memoryview, extent: Extent) -> None:
    with disk_errors(Path(extent.file)):
        stream.seek(begin)
        while view:  # one read moves at most 2 GiB
            count = stream.readinto(view)
            if not count:
                raise _refused(f"the file must have {len(view)} bytes more", "its end", extent.place)
            view = view[count:]


def _tensor(data: bytearray, dtype: str) -> torch.Tensor:
    kind = getattr(torch, dtype)  # a name of the artifact format's DTYPES, not of a file
    return torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)


def _require_finite(tensor: torch.Tensor, extent: Extent) -> None:
    if (
        not tensor.is_floating_point() or tensor.itemsize == 1
    ):  # one-byte floats are codes, and not added up here
        return
    if not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    raise ModelError(
        "weights must be finite",
        got=f"{bad} values NaN or infinite",
        where=extent.place,
        way_out="repair or retrain the model",
    )


def _refused(rule: str, got: str, where: str) -> ArtifactError:
    return damaged(rule, got=got, where=where, way_out=_AGAIN)
