"""Reads weights.safetensors.gz: one gzip member that holds weights.safetensors, within the size that is stated for it.

What is unpacked is never kept: it goes to the reader of weights piece by piece, which digests it on the way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from flyweight.artifact import _weights
from flyweight.artifact._files import PIECE, Sink
from flyweight.artifact._strict import damaged, shown
from flyweight.artifact.manifest import MAX_RATIO, MAX_UNPACKED, PACKED, StoredTensor
from flyweight.errors import ArtifactError

_START = b"\x1f\x8b\x08\0\0\0\0\0"
"""Deflated, without a name, a comment or a time."""
_GZIP = 16 + zlib.MAX_WBITS
"""A zlib that knows gzip's header, and checks the sum and the size at its end."""


class Unpacked:
    """A stream of what a gzip member holds; every byte that is taken of the member goes to the sinks."""

    def __init__(self, stream: io.FileIO, sinks: Sequence[Sink] = ()) -> None:
        self._stream, self._sinks, self._coder = stream, sinks, zlib.decompressobj(_GZIP)
        self._tail = self._more()
        if not self._tail.startswith(_START):
            got = shown(self._tail[: len(_START)])
            raise damaged("the file must be a gzip member without a name or a time", got=got, where=PACKED)

    def read(self, count: int) -> bytes:
        """That many bytes, or what is left; raises ArtifactError when the member is cut or wrong."""
        found = bytearray()
        while len(found) < count and (piece := self._piece(min(PIECE, count - len(found)))):
            found += piece
        return bytes(found)

    def readinto(self, view: memoryview) -> int:
        """Fill the view's first bytes, at most PIECE of them; how many, 0 at the end."""
        piece = self._piece(min(PIECE, len(view)))
        view[: len(piece)] = piece
        return len(piece)

    def finish(self) -> None:
        """Raise ArtifactError when the member holds more than was read, or when anything follows it."""
        if self._piece(1):
            raise damaged("the file must unpack to the bytes that are stated", got="more", where=PACKED)
        if self._coder.unused_data or self._more():
            raise damaged("nothing may follow the gzip member", got="further bytes", where=PACKED)

    def _piece(self, most: int) -> bytes:
        """One to `most` bytes; none at the end."""
        while most and not self._coder.eof:
            feed = self._tail or self._more()
            try:
                piece = self._coder.decompress(feed, most)
            except zlib.error as error:
                raise damaged("the file must be sound gzip", got=shown(str(error)), where=PACKED) from error
            self._tail = self._coder.unconsumed_tail
            if piece:
                return piece
            if not feed and not self._coder.eof:
                raise damaged("the gzip member must have its end", got="the file's end", where=PACKED)
        return b""

    def _more(self) -> bytes:
        piece = self._stream.read(PIECE)
        for sink in self._sinks:
            sink(piece)
        return piece


def length(stream: io.FileIO, size: int) -> int:
    """Bytes that a file of `size` bytes unpacks to; the stream is then at its start again.

    Raises ArtifactError when they are more than an artifact may hold, as soon as they are.
    """
    inside, found, most = Unpacked(stream), 0, min(MAX_UNPACKED, MAX_RATIO * size)
    while piece := inside.read(PIECE):
        found += len(piece)
        if found > most:
            raise damaged(f"{size} bytes may unpack to {most} bytes", got="more", where=PACKED)
    stream.seek(0)
    return found


def scan(stream: io.FileIO, unpacked: int, packed: Sequence[Sink], sinks: Sequence[Sink]) -> _weights.Scan:
    """As `_weights.scan` of the `unpacked` bytes within, which go to the sinks; the digest is the file's own.

    The file's bytes go to the sinks `packed`. Raises ArtifactError when it does not unpack to exactly those bytes.
    """
    whole = hashlib.sha256()
    with _named():
        inside = Unpacked(stream, [whole.update, *packed])
        found = _weights.scan(inside, unpacked, sinks, _weights.read_header)
        inside.finish()
    return dataclasses.replace(found, sha256=whole.hexdigest())


def load(stream: io.FileIO, unpacked: int, expected: Sequence[StoredTensor]) -> dict[str, torch.Tensor]:
    """As `_weights.load` of the `unpacked` bytes within."""
    with _named():
        inside = Unpacked(stream)
        loaded = _weights.load(inside, unpacked, expected, _weights.read_header)
        inside.finish()
    return loaded


@contextmanager
def _named() -> Iterator[None]:
    """Let what is wrong in the weights name the file that is there, too."""
    try:
        yield
    except ArtifactError as error:
        if PACKED in error.where:
            raise
        raise error.at(f"{PACKED}: {error.where}") from error
