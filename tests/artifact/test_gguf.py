"""An artifact may hold a GGUF in place of weights and graph; its head is doubted as strictly."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifact import samples

from flyweight.artifact import _gguf as head
from flyweight.artifact.format import read, tensors, write
from flyweight.errors import ArtifactError
from flyweight.runtimes import _gguf
from flyweight.runtimes._gguf import Tensor, Value
from flyweight.runtimes._gguf_super import LAYOUTS

MANIFEST = dataclasses.replace(samples.MANIFEST, runtime="llamacpp", layouts={}, session={})
METADATA: dict[str, Value] = {
    "general.architecture": "llama", "llama.block_count": 1, "llama.rope.freq_base": 1e4,
    "tokenizer.ggml.tokens": ["a", "ä"], "tokenizer.ggml.token_type": [1, 3], "tokenizer.ggml.add_bos_token": True,
}  # fmt: skip
BLOCKS = _gguf.pack(_gguf.Q4_0, np.arange(192).reshape(3, 64) % 16 - 8, np.full((3, 2), 0.5, np.float32))


def stored(seed: int = 0) -> list[Tensor]:
    """A tensor of each kind; the first two are followed by bytes that fill up."""
    floats = (np.arange(15, dtype=np.float32).reshape(3, 5) - seed) / 7
    return [
        Tensor("layer.weight", _gguf.F32, (3, 5), lambda: floats),
        Tensor("halves", _gguf.F16, (7,), lambda: np.arange(7, dtype=np.float16)),
        Tensor("packed", _gguf.Q4_0, (3, 64), lambda: BLOCKS),
    ]


def build(folder: Path, metadata: dict[str, Value] | None = None, seed: int = 0) -> Path:
    source = folder.with_name(f"{folder.name}-source-{seed}")
    source.mkdir()
    _gguf.write(source / "model.gguf", METADATA if metadata is None else metadata, stored(seed))
    write(folder, source, MANIFEST)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build(tmp_path / "best")


def test_a_gguf_comes_back(folder: Path) -> None:
    artifact = read(folder)
    assert artifact.manifest == MANIFEST
    assert [file.name for file in artifact.files] == ["model.gguf"]
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.gguf"]
    assert artifact.bytes == sum(path.stat().st_size for path in folder.iterdir())
    loaded = tensors(artifact)
    assert torch.equal(loaded["layer.weight"], torch.arange(15.0).reshape(3, 5) / 7)
    assert torch.equal(loaded["halves"], torch.arange(7, dtype=torch.float16))
    assert torch.equal(loaded["packed"], torch.from_numpy(BLOCKS))
    assert json.loads((folder / "manifest.json").read_text())["flyweight_artifact"] == 2


def test_every_type_of_llama_cpp_comes_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    written = {
        name: np.arange(3 * 256 // layout.type.length * layout.type.bytes, dtype=np.uint8).reshape(3, -1)
        for name, layout in LAYOUTS.items()
    }
    stored = [
        Tensor(name, LAYOUTS[name].type, (3, 256), functools.partial(np.asarray, raw))
        for name, raw in written.items()
    ]
    _gguf.write(source / "model.gguf", METADATA, stored)
    write(tmp_path / "best", source, MANIFEST)
    loaded = tensors(read(tmp_path / "best"))
    assert all(torch.equal(loaded[name], torch.from_numpy(raw)) for name, raw in written.items())


def test_an_artifact_without_a_gguf_keeps_the_older_format(tmp_path: Path) -> None:
    samples.build(tmp_path / "best")
    assert json.loads((tmp_path / "best" / "manifest.json").read_text())["flyweight_artifact"] == 1


def test_a_gguf_takes_the_place_of_weights_and_a_graph(tmp_path: Path) -> None:
    samples.build(tmp_path / "best")
    build(tmp_path / "best", seed=1)
    assert [file.name for file in read(tmp_path / "best").files] == ["model.gguf"]


def test_a_gguf_stands_alone(folder: Path, tmp_path: Path) -> None:
    source = samples.source(tmp_path / "source")
    (source / "model.gguf").write_bytes((folder / "model.gguf").read_bytes())
    with pytest.raises(ArtifactError, match="holds all that a model needs"):
        write(tmp_path / "other", source, MANIFEST)
    assert not (tmp_path / "other").exists()
    raw = (source / "model.onnx").read_bytes()
    samples.replace_file(folder, "model.onnx", raw)
    with pytest.raises(ArtifactError, match="holds all that a model needs"):
        read(folder)


def test_an_older_format_knows_no_gguf(folder: Path) -> None:
    samples.resign(folder, lambda document: document.update(flyweight_artifact=1))
    with pytest.raises(ArtifactError, match="have a later format"):
        read(folder)


def test_every_truncation_and_many_flips_are_refused_by_name(folder: Path) -> None:
    file, source = folder / "model.gguf", random.Random(0)
    whole = file.read_bytes()
    changed = [whole[:length] for length in range(len(whole))] + [whole + b"\0"]
    for _ in range(300):
        content = bytearray(whole)
        content[source.randrange(len(whole))] ^= 1 << source.randrange(8)
        changed.append(bytes(content))
    for raw in changed:
        file.write_bytes(raw)
        with pytest.raises(ArtifactError) as caught:
            read(folder)
        error = caught.value
        assert "model.gguf" in f"{error.where} {error.rule}"
        assert all((error.rule, error.got, error.way_out))
        assert str(error).isascii()


def test_a_changed_tensor_is_named(folder: Path) -> None:
    raw = bytearray((folder / "model.gguf").read_bytes())
    raw[-40] ^= 1
    samples.replace_file(folder, "model.gguf", bytes(raw))
    with pytest.raises(ArtifactError, match="digest") as caught:
        read(folder)
    assert "model.gguf, tensor 'packed'" in caught.value.where


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words.encode())) + words.encode()


def gguf(
    entries: list[bytes], infos: list[bytes], data: bytes = b"", start: bytes = b"GGUF\3\0\0\0"
) -> bytes:
    """A file of any entries and tensors, right or wrong."""
    raw = start + struct.pack("<QQ", len(infos), len(entries)) + b"".join(entries + infos)
    return raw + bytes(-len(raw) % 32) + data


def info(name: str = "t", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    lengths = b"".join(struct.pack("<Q", length) for length in reversed(shape))
    return text(name) + struct.pack("<I", len(shape)) + lengths + struct.pack("<IQ", kind, offset)


def entry(key: str, kind: int = 4, value: bytes = b"\1\0\0\0") -> bytes:
    return text(key) + struct.pack("<I", kind) + value


CASES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "must lie in the file's first 0 bytes"),
    "another format": (b"GGML\3\0\0\0" + bytes(24), "must be a GGUF of version 3"),
    "another version": (gguf([], [], start=b"GGUF\2\0\0\0"), "must be a GGUF of version 3"),
    "a chat template": (gguf([entry("tokenizer.chat_template", 8, text("{{1}}"))], []), "describes the model"),
    "a model in parts": (gguf([entry("split.count")], []), "describes the model"),
    "another alignment": (gguf([entry("general.alignment")], []), "describes the model"),
    "a place on the network": (gguf([entry("general.source.url", 8, text("x"))], []), "describes the model"),
    "an entry twice": (gguf([entry("llama.a"), entry("llama.a")], []), "no entry may stand twice"),
    "a tensor twice": (gguf([], [info(), info(offset=32)], bytes(64)), "no tensor may stand twice"),
    "10**18 tensors": (b"GGUF\3\0\0\0" + struct.pack("<QQ", 10**18, 0) + bytes(8), "may hold 100000 tensors"),
    "10**18 entries": (b"GGUF\3\0\0\0" + struct.pack("<QQ", 0, 10**18) + bytes(8), "1024 entries"),
    "a key of 2**63 bytes": (gguf([struct.pack("<Q", 2**63)], []), "a head must lie"),
    "2**60 words": (
        gguf([entry("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2**60))], []), "a value must be of a known type"),
    "2**60 numbers": (gguf([entry("llama.a", 9, struct.pack("<IQ", 4, 2**60))], []), "a head must lie"),
    "a list of lists": (gguf([entry("llama.a", 9, struct.pack("<IQ", 9, 1) + bytes(12))], []), "a known type"),
    "an unknown type of value": (gguf([entry("llama.a", 13)], []), "a known type"),
    "a truth value of 2": (gguf([entry("llama.a", 7, b"\2")], []), "a truth value is 0 or 1"),
    "a text in Latin-1": (gguf([entry("llama.a", 8, struct.pack("<Q", 1) + b"\xe4")], []), "UTF-8"),
    "a tensor's name with a slash": (gguf([], [info("../t")], bytes(32)), "a plain name"),
    "a tensor's name of 64 bytes": (gguf([], [info("t" * 64)], bytes(32)), "a plain name"),
    "no dimensions": (gguf([], [info(shape=())], bytes(32)), "1 to 4 dimensions"),
    "five dimensions": (gguf([], [info(shape=(1, 1, 1, 1, 8))], bytes(32)), "1 to 4 dimensions"),
    "a length of 0": (gguf([], [info(shape=(0, 8))]), "whole blocks"),
    "an unknown type": (gguf([], [info(kind=99)], bytes(32)), "a known type"),
    "half a block": (gguf([], [info(shape=(33,), kind=2)], bytes(64)), "whole blocks"),
    "a hole": (gguf([], [info(), info("u", offset=64)], bytes(96)), "one behind the other"),
    "an overlap": (gguf([], [info(), info("u", offset=0)], bytes(32)), "one behind the other"),
    "a shape of 10**12": (gguf([], [info(shape=(10**12,))], bytes(32)), "the tensors must fill the file"),
    "a product of 2**64": (gguf([], [info(shape=(2**32, 2**32))], bytes(32)), "the tensors must fill the file"),
    "bytes at the end": (gguf([], [info()], bytes(64)), "the tensors must fill the file"),
    "other bytes that fill up": (gguf([], [info(shape=(7,))], bytes(31) + b"\1"), "what fills up must be zeros"),
    "other bytes behind the head": (gguf([entry("llama.a")], [])[:-1] + b"\1", "what fills up must be zeros"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "says"), CASES.values(), ids=CASES)
def test_odd_files_are_refused(raw: bytes, says: str, folder: Path) -> None:
    samples.replace_file(folder, "model.gguf", raw)
    with pytest.raises(ArtifactError) as caught:
        read(folder)
    assert says in str(caught.value)
    assert "model.gguf" in caught.value.where
    assert str(caught.value).isascii()


def test_what_is_refused_to_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="describes the model"):
        build(tmp_path / "best", {"tokenizer.chat_template": "{{ 7 * 7 }}"})
    assert not (tmp_path / "best").exists()


WORDS = (b"GGUF", b"\0" * 8, b"\xff" * 8, b"\1\0\0\0", b"\t\0\0\0\x08\0\0\0", b"\x20", b"packed", b"llama.")


def changed(source: random.Random, raw: bytes) -> bytes:
    content = bytearray(raw)
    for _ in range(source.randint(1, 3)):
        at = source.randrange(len(content))
        to = min(len(content), at + source.choice((1, 1, 2, 8)))
        content[at:to] = source.choice(
            (bytes([source.randrange(256)]), source.choice(WORDS), b"", content[at:to] * 2)
        )
    return bytes(content)


def test_blindly_changed_files_are_refused_or_read_as_the_format_s_own_reader_reads_them(
    folder: Path, tmp_path: Path, figure: Callable[[int, str], None]
) -> None:
    reader = pytest.importorskip("gguf").GGUFReader
    whole, source, read_anyway = (folder / "model.gguf").read_bytes(), random.Random(5), 0
    for _ in range(4000):
        raw = changed(source, whole)
        ours = extents(raw)
        if ours is None or raw == whole:
            continue
        read_anyway += 1
        (tmp_path / "changed").write_bytes(raw)
        theirs = reader(tmp_path / "changed").tensors
        assert ours == {t.name: (t.data.shape, t.data.tobytes()) for t in theirs}
    assert read_anyway > 10
    figure(15, "GGUFs changed blindly, read otherwise than by the package gguf: 0 of 4,000")


def extents(raw: bytes) -> dict[str, tuple[Any, bytes]] | None:
    try:
        start, found = head.read_header(io.BytesIO(raw), len(raw))  # type: ignore[arg-type]
    except ArtifactError as error:
        assert str(error).isascii()
        return None
    at = len(start)
    return {one.name: (one.shape, raw[at + one.begin : at + one.end]) for one in found}
