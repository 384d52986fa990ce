"""A damaged artifact is refused; the refusal says which file and tensor, what was expected, what to do.

FLYWEIGHT_FLIPS sets how many random flips are tried; 20,000 take about a minute.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from artifact import samples

from flyweight.artifact.format import read, tensors
from flyweight.errors import ArtifactError
from flyweight.testing import faults

FLIPS = int(os.environ.get("FLYWEIGHT_FLIPS", "1500"))
NAMES = ("manifest.json", "weights.safetensors", "model.onnx")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return samples.build(tmp_path / "best")


def refusal(folder: Path) -> ArtifactError:
    """The refusal of a folder; the test fails when it is read or when anything else is raised."""
    with pytest.raises(ArtifactError) as caught:
        read(folder)
    return caught.value


def is_whole(error: ArtifactError) -> bool:
    """Whether the refusal has its four parts, names a file, fits a few lines and can be printed anywhere."""
    parts = (error.rule, error.got, error.where, error.way_out)
    named = any(name in f"{error.where} {error.rule}" for name in NAMES)
    return all(parts) and named and error.exit_code == 5 and len(str(error)) < 800 and str(error).isascii()


def test_every_truncation_is_refused(folder: Path, figure: Callable[[int, str], None]) -> None:
    refused = 0
    for name in NAMES:
        file = folder / name
        whole = file.read_bytes()
        for length in range(len(whole)):
            file.write_bytes(whole[:length])
            error = refusal(folder)
            assert is_whole(error), error
            assert name in error.where
            refused += 1
        file.write_bytes(whole)
    assert read(folder).manifest == samples.MANIFEST
    figure(11, f"truncations of an artifact refused: {refused} of {refused}")
    figure(12, f"refusals of truncations with all four parts: {refused} of {refused}")


def test_random_flips_are_refused(folder: Path, figure: Callable[[int, str], None]) -> None:
    source = random.Random(0)
    whole = {name: (folder / name).read_bytes() for name in NAMES}
    for _ in range(FLIPS):
        name = source.choice(NAMES)
        faults.flip(folder / name, source, bits=source.randint(1, 8))
        error = refusal(folder)
        assert is_whole(error), error
        (folder / name).write_bytes(whole[name])
    figure(11, f"artifacts with 1 to 8 flipped bits that were accepted: 0 of {FLIPS:,}")
    figure(12, f"refusals of flips with all four parts: {FLIPS:,} of {FLIPS:,}")


def test_a_flipped_weight_is_named_by_its_tensor(folder: Path) -> None:
    file = folder / "weights.safetensors"
    whole = file.read_bytes()
    for name in ("layer.weight", "other.weight", "packed"):
        offset, length = samples.extent(whole, name)
        for at in range(offset, offset + length):
            damaged = bytearray(whole)
            damaged[at] ^= 1
            file.write_bytes(damaged)
            error = refusal(folder)
            assert f"weights.safetensors, tensor '{name}'" in error.where
            assert "digest" in error.rule
            assert error.got


def swapped(folder: Path) -> bytes:
    """The weights file with the bytes of two tensors of one shape exchanged."""
    raw = (folder / "weights.safetensors").read_bytes()
    (one, length), (two, _) = (samples.extent(raw, name) for name in ("layer.weight", "other.weight"))
    changed = bytearray(raw)
    changed[one : one + length] = raw[two : two + length]
    changed[two : two + length] = raw[one : one + length]
    return bytes(changed)


def test_swapped_tensors_are_refused(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(swapped(folder))
    assert "tensor 'layer.weight'" in refusal(folder).where


def test_swapped_tensors_are_refused_when_the_files_digest_is_forged(folder: Path) -> None:
    samples.replace_weights(folder, swapped(folder))
    assert "tensor 'layer.weight'" in refusal(folder).where


def test_swapped_names_are_refused_when_the_files_digest_is_forged(folder: Path) -> None:
    raw = (folder / "weights.safetensors").read_bytes()
    raw = raw.replace(b"layer.weight", b"third.weight").replace(b"other.weight", b"layer.weight")
    raw = raw.replace(b"third.weight", b"other.weight")
    samples.replace_weights(folder, raw)
    assert ".weight'" in refusal(folder).where


def test_a_header_that_says_the_same_in_other_words_is_refused(folder: Path) -> None:
    file = folder / "weights.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    backwards = dict(reversed(json.loads(raw[8 : 8 + size]).items()))
    header = json.dumps(backwards, separators=(",", ":")).encode().ljust(size)
    file.write_bytes(samples.safetensors(header, raw[8 + size :]))
    assert file.stat().st_size == len(raw)
    error = refusal(folder)
    assert "the file must have the digest" in error.rule
    assert "weights.safetensors" in error.where


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    error = refusal(folder)
    assert name in error.where
    assert error.got == "no such file"


@pytest.mark.parametrize("name", ["extra.bin", "Manifest.json", "weights.safetensors~", ".hidden"])
def test_an_added_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    error = refusal(folder)
    assert name in error.where
    assert "too many" in error.got


def test_a_graph_that_the_manifest_does_not_list_is_refused(folder: Path) -> None:
    samples.resign(folder, lambda document: document["files"].pop("model.onnx"))
    error = refusal(folder)
    assert "model.onnx" in error.where
    assert error.got == "one more"


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_artifact_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    # Another task, so that each of its files differs.
    other = samples.build(tmp_path / "other", seed=1)
    samples.resign(other, lambda document: document.update(task="other"))
    samples.replace_file(other, "model.onnx", (other / "model.onnx").read_bytes() + b"\x32\x00")
    (folder / name).write_bytes((other / name).read_bytes())
    refusal(folder)


def test_a_tensor_that_the_manifest_alone_lists_is_named(folder: Path) -> None:
    more = {"dtype": "uint8", "shape": [1], "sha256": "0" * 64}
    samples.resign(folder, lambda document: document["tensors"].update(ghost=more))
    error = refusal(folder)
    assert "tensor 'ghost'" in error.where
    assert error.got == "no such tensor"


def test_a_tensor_that_the_manifest_does_not_list_is_named(folder: Path) -> None:
    samples.resign(folder, lambda document: document["tensors"].pop("packed"))
    error = refusal(folder)
    assert "tensor 'packed'" in error.where
    assert error.got == "one more"


def test_another_shape_or_dtype_is_named(folder: Path) -> None:
    samples.resign(folder, lambda document: document["tensors"]["packed"].update(dtype="int8"))
    error = refusal(folder)
    assert (error.rule, error.got) == ("the manifest lists int8 [5]", "uint8 [5]")


def test_the_weights_are_verified_while_they_are_loaded(folder: Path) -> None:
    artifact = read(folder)
    file = folder / "weights.safetensors"
    whole = file.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x40
        file.write_bytes(damaged)
        try:
            loaded = tensors(artifact)
        except ArtifactError:
            continue
        # Only the metadata and the padding of the header are not weights.
        assert at < samples.extent(whole, "layer.weight")[0]
        assert {name: tensor.tolist() for name, tensor in loaded.items()} == {
            name: tensor.tolist() for name, tensor in samples.weights().items()
        }
