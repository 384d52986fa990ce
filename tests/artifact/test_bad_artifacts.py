"""The bad artifacts that people have, and the answer that each of them gets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from artifact import samples

from flyweight.artifact.format import read
from flyweight.errors import ArtifactError

LONG = "<img src=x onerror=alert(1)>\0\u202e" + "x" * 1000


def cut(name: str, length: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, length)


def flip(name: str, at: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 4
        (folder / name).write_bytes(content)

    return change


def refer_outside(folder: Path) -> None:
    samples.replace_file(folder, "model.onnx", samples.graph(0, 64, "../other.bin"))


def odd_name(folder: Path) -> None:
    more = {"dtype": "uint8", "shape": [1], "sha256": "0" * 64}
    samples.resign(folder, lambda document: document["tensors"].update({LONG: more}))


def as_file(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_bytes(b"PK\3\4 a checkpoint")


def bomb(folder: Path) -> None:
    samples.replace_weights(
        folder, samples.safetensors({"t": samples.entry("F32", [10**12], 0, 4)}, bytes(4))
    )


def overlap(folder: Path) -> None:
    two = {"a": samples.entry("F32", [2], 0, 8), "b": samples.entry("F32", [2], 4, 12)}
    samples.replace_weights(folder, samples.safetensors(two, bytes(12)))


def add(folder: Path) -> None:
    (folder / "notes.txt").touch()


def link(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to("../elsewhere")


TABLE: tuple[tuple[str, Callable[[Path], object], tuple[str, ...]], ...] = (
    ("A1 empty manifest", cut("manifest.json", 0), ("manifest.json", "an empty file")),
    ("A1 empty weights", cut("weights.safetensors", 0), ("weights.safetensors", "405 bytes, got 0")),
    ("A2 cut weights", cut("weights.safetensors", 400), ("weights.safetensors", "405 bytes, got 400")),
    (
        "A2 cut manifest",
        cut("manifest.json", 400),
        ("manifest.json", "must end with its digest, got 400 bytes"),
    ),
    ("A2 cut graph", cut("model.onnx", 100), ("model.onnx", "146 bytes, got 100")),
    ("A3 flipped graph", flip("model.onnx", 60), ("model.onnx", "the file must have the digest")),
    ("A3 flipped weight", flip("weights.safetensors", 300), ("tensor 'layer.weight'", "digest")),
    ("A4 flipped manifest", flip("manifest.json", 30), ("manifest.json", "digest must match its content")),
    (
        "A5 newer format",
        lambda folder: samples.resign(folder, lambda document: document.update(flyweight_artifact=5)),
        ("reads artifacts up to format 4, got one written by format 5", "upgrade flyweight"),
    ),
    (
        "A6 missing file",
        lambda folder: (folder / "weights.safetensors").unlink(),
        ("weights.safetensors", "no such"),
    ),
    ("A6 file too many", add, ("'notes.txt'", "one file too many", "move the file elsewhere")),
    ("A7 symbolic link", link, ("model.onnx", "a symbolic link")),
    ("A8 shape of 10**12", bomb, ("tensor 't'", "takes 4000000000000 bytes, got 4")),
    ("A9 overlap", overlap, ("tensor 'b'", "an overlap")),
    (
        "A10 checkpoint in place of the folder",
        as_file,
        ("an artifact is a folder, got a file", "weights_only=True"),
    ),
    ("A11 graph with weights elsewhere", refer_outside, ("model.onnx", "'../other.bin'")),
    ("A12 odd tensor name", odd_name, ("tensor '<img src=x onerror=alert(1)>\\x00\\u202exxx", "...")),
)


@pytest.mark.parametrize(("build", "contains"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_bad_artifact_gets_its_answer(
    tmp_path: Path, build: Callable[[Path], object], contains: tuple[str, ...]
) -> None:
    folder = samples.build(tmp_path / "best")
    build(folder)
    with pytest.raises(ArtifactError) as caught:
        read(folder)
    for part in contains:
        assert part in str(caught.value)
    assert str(folder) in caught.value.where
    assert str(caught.value).isprintable()
    assert caught.value.exit_code == 5
    assert all((caught.value.rule, caught.value.got, caught.value.way_out))
