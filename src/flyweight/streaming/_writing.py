"""Writes files that are there whole or not at all; of a shard never more than one tensor's piece is held to write it.

A file is written beside its place, synced, and renamed: whatever ends the process, its name stands for all of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from flyweight._faults import point
from flyweight.artifact._files import PIECE, disk_errors
from flyweight.artifact._weights import Extent
from flyweight.artifact.atomic import sync, synced_file
from flyweight.artifact.manifest import DTYPES
from flyweight.errors import ArtifactError, UsageError
from flyweight.records import JSON, Record

_ALIGNED = 8
"""Bytes: where the tensors of a safetensors file begin."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor to write."""

    name: str
    dtype: str
    """By torch's name."""
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterable[bytes]]
    """Its bytes, in order."""


@dataclass(frozen=True)
class Written(Record):
    """A file as it was written."""

    name: str
    bytes: int
    sha256: str


def held(name: str, tensor: torch.Tensor) -> Entry:
    """The entry of a tensor in memory."""
    raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data

    def pieces() -> Iterator[bytes]:
        return (bytes(raw[start : start + PIECE]) for start in range(0, len(raw), PIECE))

    return Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), len(raw), pieces)


def copied(extent: Extent, pieces: Callable[[], Iterable[bytes]]) -> Entry:
    """The entry of a tensor as it lies in another file."""
    return Entry(extent.name, extent.dtype, extent.shape, extent.end - extent.begin, pieces)


def write_shard(path: Path, entries: Sequence[Entry]) -> Written:
    """Write a safetensors file; the largest elements come first, so that all of them are aligned.

    Raises MachineError when the disk does not take it; what was at `path` is then untouched.
    """
    ordered = sorted(entries, key=lambda one: (-getattr(torch, one.dtype).itemsize, one.name))

    def parts() -> Iterator[bytes]:
        yield _header(ordered)
        for entry in ordered:
            yield from entry.pieces()

    return write(path, parts())


def write(path: Path, parts: Iterable[bytes]) -> Written:
    """Write a file of the bytes that come; raises as `write_shard` does."""
    part, digest, size = path.with_name(f".{path.name}.part"), hashlib.sha256(), 0
    with disk_errors(path), ExitStack() as undo:
        undo.callback(part.unlink, missing_ok=True)
        with synced_file(part) as append:
            for piece in parts:
                append(piece)
                digest.update(piece)
                size += len(piece)
        point("stream:written")
        part.rename(path)
        sync(path.parent)
    point("stream:renamed")
    return Written(path.name, size, digest.hexdigest())


def write_json(path: Path, value: Mapping[str, JSON]) -> Written:
    """Write an object as JSON, indented; raises as `write_shard` does."""
    return write(
        path, [json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace"), b"\n"]
    )


def require_same(folder: Path, wanted: Written) -> None:
    """Raise ArtifactError unless a file has the size and the digest with which it was written."""
    path, digest = folder / wanted.name, hashlib.sha256()
    rule = (
        f"a finished file must be as it was written, {wanted.bytes} bytes of digest {wanted.sha256[:16]}..."
    )
    way_out = "delete the output folder, and begin anew"
    if not path.is_file():
        raise ArtifactError(rule, got="no such file", where=str(path), way_out=way_out)
    with disk_errors(path), path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
        size = file.tell()
    if (size, digest.hexdigest()) != (wanted.bytes, wanted.sha256):
        got = f"{size} bytes of digest {digest.hexdigest()[:16]}..."
        raise ArtifactError(rule, got=got, where=str(path), way_out=way_out)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the kernel frees when the process ends; UsageError where another process holds it."""
    with disk_errors(folder):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rule, way_out = (
                "one process at a time writes a folder",
                "wait for it, or give another output folder",
            )
            raise UsageError(rule, got="another at work", where=str(folder), way_out=way_out) from None
        yield
    finally:
        os.close(handle)


def _header(entries: Sequence[Entry]) -> bytes:
    """The bytes before the tensors: their length, and what they are, with the metadata that transformers asks for."""
    document: dict[str, JSON] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        document[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text
