"""Reads the head of model.gguf strictly: every length is doubted before anything is allocated by its word.

A tensor whose type packs integers counts as uint8 rows of blocks. What could name another file, or is a program, is
refused: metadata that splits a model over files, and chat templates.
"""

from __future__ import annotations

import io
import math
import re
import struct

from flyweight.artifact._files import PIECE
from flyweight.artifact._strict import damaged, shown
from flyweight.artifact._weights import Extent
from flyweight.artifact.manifest import GGUF, MAX_TENSORS
from flyweight.runtimes._gguf import ALIGNMENT, F16, F32, INTEGERS
from flyweight.runtimes._gguf_super import LAYOUTS

MAX_HEAD = 2**26
"""Bytes of the head; a large vocabulary takes ten million."""
MAX_ENTRIES = 1024
MAX_DIMENSIONS = 4
_START = b"GGUF" + struct.pack("<I", 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a number, by its type's number."""
_KEY = re.compile(
    r"general\.(architecture|quantization_version)|(llama|qwen2|tokenizer\.ggml)\.[a-z0-9_.]{1,64}"
)
_NAME = re.compile(r"[A-Za-z0-9_.]{1,63}")
_TYPES = {kind.number: kind for kind in (F32, F16, *INTEGERS, *(layout.type for layout in LAYOUTS.values()))}
_FLOATS = {F32.number: "float32", F16.number: "float16"}


class _Head:
    """Takes a file's head piece by piece."""

    def __init__(self, stream: io.FileIO, size: int) -> None:
        self._stream, self._limit = stream, min(size, MAX_HEAD)
        self.size, self.raw, self.at = size, bytearray(), 0

    def take(self, count: int) -> bytes:
        """The next bytes; raises ArtifactError where the file or its head may not have so many."""
        end = self.at + count
        if end > self._limit:
            got = f"{count} more at byte {self.at}"
            raise damaged(f"a head must lie in the file's first {self._limit} bytes", got=got, where=GGUF)
        while len(self.raw) < end:
            piece = self._stream.read(PIECE)
            if not piece:
                raise damaged(f"the file must have {self.size} bytes", got=f"{len(self.raw)}", where=GGUF)
            self.raw += piece
        found, self.at = bytes(self.raw[self.at : end]), end
        return found

    def number(self, bits: int = 64) -> int:
        """An unsigned number."""
        return int.from_bytes(self.take(bits // 8), "little")

    def text(self) -> str:
        """A text in UTF-8."""
        raw = self.take(self.number())
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise damaged("a text must be UTF-8", got=shown(str(error)), where=GGUF) from error


def read_header(stream: io.FileIO, size: int) -> tuple[bytes, tuple[Extent, ...]]:
    """The bytes before the tensors, and where each lies behind them; raises ArtifactError on any oddity."""
    head = _Head(stream, size)
    if head.take(len(_START)) != _START:
        got = shown(bytes(head.raw[: len(_START)]))
        raise damaged("the file must be a GGUF of version 3", got=got, where=GGUF)
    tensors, entries = head.number(), head.number()
    if tensors > MAX_TENSORS or entries > MAX_ENTRIES:
        rule = f"a file may hold {MAX_TENSORS} tensors and {MAX_ENTRIES} entries"
        raise damaged(rule, got=f"{tensors} and {entries}", where=GGUF)
    _check_unique([_entry(head) for _ in range(entries)], "entry")
    extents: list[Extent] = []
    for _ in range(tensors):
        extents.append(_extent(head, extents[-1] if extents else None))
    _check_unique([extent.name for extent in extents], "tensor")
    if any(head.take(-head.at % ALIGNMENT)):
        raise damaged("what fills up must be zeros", got="other bytes", where=f"{GGUF}, head")
    end = head.at + (extents[-1].end + extents[-1].padding if extents else 0)
    if end != size:
        raise damaged(f"the tensors must fill the file, {end} bytes", got=f"{size} bytes", where=GGUF)
    stream.seek(head.at)
    return bytes(head.raw[: head.at]), tuple(extents)


def _entry(head: _Head) -> str:
    """Pass an entry of the metadata; its key."""
    key = head.text()
    if not _KEY.fullmatch(key):
        raise damaged("an entry must be one that describes the model", got=shown(key), where=GGUF)
    place, kind = f"{GGUF}, entry {shown(key)}", head.number(32)
    if kind != _ARRAY:
        _pass(head, kind, 1, place)
    else:
        kind, count = head.number(32), head.number()
        _pass(head, kind, count, place)
    return key


def _pass(head: _Head, kind: int, count: int, place: str) -> None:
    if kind == _STRING and count * 8 <= head.size:
        for _ in range(count):
            head.text()
    elif kind in _SIZES:
        values = head.take(count * _SIZES[kind])
        if kind == _BOOL and not set(values) <= {0, 1}:
            raise damaged("a truth value is 0 or 1", got=shown(values), where=place)
    else:
        raise damaged("a value must be of a known type", got=f"{count} of type {kind}", where=place)


def _extent(head: _Head, before: Extent | None) -> Extent:
    """Where the next tensor lies: behind the one before, at a multiple of the alignment."""
    name = head.text()
    place = f"{GGUF}, tensor {shown(name)}"
    rank = head.number(32) if _NAME.fullmatch(name) else 0
    if not 1 <= rank <= MAX_DIMENSIONS:
        rule = f"a tensor has a plain name and 1 to {MAX_DIMENSIONS} dimensions"
        raise damaged(rule, got=f"{rank}", where=place)
    shape = [head.number() for _ in range(rank)][::-1]
    number, offset = head.number(32), head.number()
    if number not in _TYPES or shape[-1] % _TYPES[number].length or not all(0 < n < 2**63 for n in shape):
        raise damaged("a tensor has a known type and whole blocks", got=f"{number} {shape}"[:80], where=place)
    begin = before.end + before.padding if before else 0
    if offset != begin:
        raise damaged("tensors must lie one behind the other", got=f"{offset}, not {begin}", where=place)
    kind = _TYPES[number]
    size = math.prod(shape) // kind.length * kind.bytes
    if number not in _FLOATS:
        shape[-1] = shape[-1] // kind.length * kind.bytes
    dtype = _FLOATS.get(number, "uint8")
    return Extent(name, dtype, tuple(shape), begin, begin + size, file=GGUF, padding=-size % ALIGNMENT)


def _check_unique(names: list[str], what: str) -> None:
    if len(set(names)) < len(names):
        raise damaged(f"no {what} may stand twice", got="one that does", where=GGUF)
