"""Attacks by compressed weights: memory or time out of proportion, or bytes that two readers unpack differently."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from artifact import samples
from artifact.samples import entry, packed_file, safetensors
from attacks.attack import Attack

NAME = "weights.safetensors.gz"
START = b"\x1f\x8b\x08\0\0\0\0\0\0\3"
Change = Callable[[bytes], bytes]
"""From the good compressed file to the hostile one."""


def _packed(folder: Path) -> bytes:
    """Make the artifact one of compressed weights; their file."""
    plain = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").unlink()
    samples.resign(
        folder, lambda it: (it["files"].pop("weights.safetensors"), it.update(flyweight_artifact=3))
    )
    raw = packed_file(plain)
    samples.replace_packed(folder, raw, len(plain))
    return raw


def _file(name: str, change: Change, says: str | None, unpacked: int | None = None) -> Attack:
    """unpacked: the size that is stated; None: what is true of the good file."""

    def forge(folder: Path) -> None:
        raw = _packed(folder)
        size = len(zlib.decompress(raw, 31)) if unpacked is None else unpacked
        samples.replace_packed(folder, change(raw), size)

    return Attack(name, forge, says)


def _said(name: str, value: Any, says: str) -> Attack:
    def forge(folder: Path) -> None:
        samples.replace_packed(folder, _packed(folder), value)

    return Attack(f"weights that unpack to {name}", forge, says)


def _values(name: str, change: Callable[[dict[str, Any]], object], says: str) -> Attack:
    def forge(folder: Path) -> None:
        _packed(folder)
        samples.resign(folder, change)

    return Attack(name, forge, says)


def _other(raw: bytes) -> Change:
    return lambda _: raw


def _flagged(flags: int, more: bytes = b"") -> Change:
    """The same file with other flags in its header, and what belongs to them."""
    return lambda raw: raw[:3] + bytes([flags]) + raw[4:10] + more + raw[10:]


def _deflated(raw: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return coder.compress(raw) + coder.flush()


def _ended(deflated: bytes, plain: bytes) -> bytes:
    """A gzip member of any deflated bytes."""
    return START + deflated + zlib.crc32(plain).to_bytes(4, "little") + len(plain).to_bytes(4, "little")


def _zip(raw: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights.safetensors", raw)
    return file.getvalue()


def _link(folder: Path) -> None:
    raw = _packed(folder)
    (folder / NAME).unlink()
    (folder.parent / "real").write_bytes(raw)
    (folder / NAME).symlink_to("../real")


def _twice(folder: Path) -> None:
    raw = _packed(folder)
    samples.replace_weights(folder, zlib.decompress(raw, 31))


def _refers(folder: Path) -> None:
    _packed(folder)
    samples.replace_file(folder, "model.onnx", samples.graph(0, 64, NAME))


ZEROS = safetensors({"t": entry("U8", [2**27], 0, 2**27)}, bytes(2**27))
BOMB = gzip.compress(ZEROS, mtime=0)  # 128 KiB
TRUE = len(ZEROS)
GROWING = packed_file(safetensors({"t": entry("U8", [400], 0, 400)}, bytes(2**22)))
del ZEROS
ATTACKS = (
    _file("a bomb that says how large it is", _other(BOMB), "may unpack to", TRUE),
    _file("a bomb that says it is small", _other(BOMB), "the tensors must fill the file", 8 * len(BOMB)),
    _file("a file that goes on behind its tensors", _other(GROWING), "bytes that are stated", 472),
    _file("a bomb of bombs", lambda raw: packed_file(BOMB), "its length and its header", len(BOMB)),
    _file("200,000 blocks of nothing", _other(START + b"\0\0\0\xff\xff" * 200_000), "must have its end"),
    _file("blocks of nothing, with an end", _other(_ended(b"\0\0\0\xff\xff" * 99_999 + b"\3\0", b"")), "its length"),
    _file("a match before the first byte", _other(START + b"\x4b\x04\x12\0" + bytes(8)), "must be sound gzip", 99),
    _said("one byte less", 404, "the tensors must fill the file"),
    _said("one byte more", 406, "the tensors must fill the file"),
    _said("2**60 bytes", 2**60, "may unpack to"),
    _said("2**4000 bytes", 2**4000, "may unpack to"),
    _said("minus one bytes", -1, "a number of unpacked bytes"),
    _said("405.0 bytes", 405.0, "a number of unpacked bytes"),
    _said("true bytes", True, "a number of unpacked bytes"),
    _said("'405' bytes", "405", "a number of unpacked bytes"),
    _values("no size to unpack to", lambda it: it["files"][NAME].pop("unpacked"), "'absent': ['unpacked']"),
    _values("a graph to unpack", lambda it: it["files"]["model.onnx"].update(unpacked=9), "'added': ['unpacked']"),
    _values("a compressed graph", lambda it: it["files"].update({"model.onnx.gz": it["files"][NAME]}), "lists weights"),
    _values("an older format", lambda it: it.update(flyweight_artifact=2), "have a later format"),
    Attack("weights plain and compressed", _twice, "weights are in weights.safetensors or in"),
    Attack("a link to compressed weights", _link, "a symbolic link"),
    Attack("a graph of compressed weights", _refers, "must lie in weights.safetensors"),
    _file("a second member", lambda raw: raw + raw, "nothing may follow"),
    _file("an empty second member", lambda raw: raw + gzip.compress(b"", mtime=0), "nothing may follow"),
    _file("zeros behind the member", lambda raw: raw + bytes(512), "nothing may follow"),
    _file("a zip behind the member", lambda raw: raw + _zip(b"x"), "nothing may follow"),
    _file("2 MiB behind the member", lambda raw: raw + bytes(2**21), "nothing may follow"),
    _file("another sum", lambda raw: raw[:-8] + bytes(4) + raw[-4:], "incorrect data check"),
    _file("another size", lambda raw: raw[:-4] + bytes(4), "incorrect length check"),
    _file("no sum", lambda raw: raw[:-8], "must have its end"),
    _file("a name with a path", _flagged(8, b"../../evil\0"), "without a name or a time"),
    _file("a name without end", _flagged(8, b"x" * 100_000), "without a name or a time"),
    _file("a comment", _flagged(16, b"x\0"), "without a name or a time"),
    _file("a field of 65,535 bytes", _flagged(4, b"\xff\xff" + bytes(65_535)), "without a name or a time"),
    _file("a sum of the header", _flagged(2, b"\0\0"), "without a name or a time"),
    _file("flags that nobody knows", _flagged(0xE0), "without a name or a time"),
    _file("a time", lambda raw: raw[:4] + b"\1\2\3\4" + raw[8:], "without a name or a time"),
    _file("another method", lambda raw: raw[:2] + b"\7" + raw[3:], "without a name or a time"),
    _file("no bytes", _other(b""), "may unpack to 0 bytes"),
    _file("plain weights under that name", lambda raw: zlib.decompress(raw, 31), "must be a gzip member"),
    _file("zlib's own format", lambda raw: zlib.compress(zlib.decompress(raw, 31)), "must be a gzip member"),
    _file("no header", lambda raw: _deflated(zlib.decompress(raw, 31)), "must be a gzip member"),
    _file("bzip2", lambda raw: bz2.compress(zlib.decompress(raw, 31)), "must be a gzip member"),
    _file("xz", lambda raw: lzma.compress(zlib.decompress(raw, 31)), "must be a gzip member"),
    _file("a zip", lambda raw: _zip(zlib.decompress(raw, 31)), "must be a gzip member"),
    _file("gzip in gzip", lambda raw: packed_file(raw), "its length and its header", 250),
    _file("a pickle within", lambda raw: packed_file(b"cos\nsystem\n(S'touch CANARY'\ntR."), "its length and", 32),
    _file("another compressor's file of the same weights", lambda raw: _repacked(raw), None),
)  # fmt: skip


def _repacked(raw: bytes) -> bytes:
    plain = zlib.decompress(raw, 31)
    return _ended(_deflated(plain), plain)
