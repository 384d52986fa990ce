"""Weights may lie compressed: gunzip restores the plain file, and nothing is unpacked beyond what is stated."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import stat
import subprocess
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from artifact import samples
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.artifact import _gzip
from flyweight.artifact.format import read, runnable, tensors, write
from flyweight.cli import main
from flyweight.errors import ArtifactError, MachineError
from flyweight.runtimes._files import pack
from flyweight.testing import faults

NAME = "weights.safetensors.gz"
NAMES = ("manifest.json", NAME, "model.onnx")
FLIPS = int(os.environ.get("FLYWEIGHT_FLIPS", "600"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return samples.build(tmp_path / "best", packed=True)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made in this test."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def plain(folder: Path) -> bytes:
    return gzip.decompress((folder / NAME).read_bytes())


def refusal(folder: Path) -> ArtifactError:
    with pytest.raises(ArtifactError) as caught:
        read(folder)
    return caught.value


def test_only_the_compressed_weights_are_kept_and_come_back(folder: Path) -> None:
    artifact = read(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
    assert artifact.bytes == sum(path.stat().st_size for path in folder.iterdir())
    for name, tensor in samples.weights().items():
        assert torch.equal(tensors(artifact)[name], tensor)
    said = json.loads((folder / "manifest.json").read_text())
    raw = (folder / NAME).read_bytes()
    assert said["flyweight_artifact"] == 3
    assert said["files"][NAME] == {
        "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest(), "unpacked": len(plain(folder)),
    }  # fmt: skip


def test_the_tensors_are_described_as_without_compression(folder: Path, tmp_path: Path) -> None:
    other = samples.build(tmp_path / "plain")
    assert read(folder).tensors == read(other).tensors
    assert plain(folder) == (other / "weights.safetensors").read_bytes()
    assert (folder / "model.onnx").read_bytes() == (other / "model.onnx").read_bytes()


def test_gunzip_makes_the_file_that_the_graph_runs_on(folder: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    subprocess.run(["gunzip", "-k", NAME], cwd=folder, check=True)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    x = np.ones((2, 4), dtype=np.float32)
    found = session.run(None, {"x": x})[0]
    np.testing.assert_allclose(found, x @ samples.weights()["layer.weight"].numpy(), rtol=1e-6)


def test_compressed_weights_alone_are_enough_to_write(folder: Path, tmp_path: Path) -> None:
    source = samples.source(tmp_path / "source", packed=True)
    (source / "weights.safetensors").unlink()
    write(tmp_path / "other", source, samples.MANIFEST)
    assert read(tmp_path / "other").digest == read(folder).digest


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True)])
def test_one_takes_the_place_of_the_other(tmp_path: Path, first: bool, second: bool) -> None:
    samples.build(tmp_path / "best", packed=first)
    samples.build(tmp_path / "best", seed=1, packed=second)
    artifact = read(tmp_path / "best")
    assert {file.name for file in artifact.files} == {"model.onnx", NAME if second else "weights.safetensors"}
    assert torch.equal(tensors(artifact)["packed"], samples.weights(1)["packed"])


def test_both_at_once_are_refused(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(plain(folder))
    assert refusal(folder).got == "one more"
    samples.replace_weights(folder, plain(folder))
    assert "weights are in weights.safetensors or in weights.safetensors.gz" in refusal(folder).rule


def test_an_older_format_knows_no_compression(folder: Path) -> None:
    samples.resign(folder, lambda document: document.update(flyweight_artifact=2))
    assert "have a later format" in refusal(folder).rule


def test_the_command_verify_checks_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder)]) == 0
    assert "sound" in capsys.readouterr().out
    raw = bytearray((folder / NAME).read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / NAME).write_bytes(raw)
    assert main(["verify", str(folder)]) == 5
    assert NAME in capsys.readouterr().err


def test_every_truncation_is_refused(folder: Path) -> None:
    whole = (folder / NAME).read_bytes()
    for length in range(len(whole)):
        (folder / NAME).write_bytes(whole[:length])
        error = refusal(folder)
        assert NAME in error.where
        samples.replace_packed(folder, whole[:length], len(plain_of(whole)))
        error = refusal(folder)
        assert NAME in f"{error.where} {error.rule}"
        assert all((error.rule, error.got, error.way_out))
        assert str(error).isascii()
        samples.replace_packed(folder, whole, len(plain_of(whole)))
    assert read(folder).manifest == samples.MANIFEST


def plain_of(raw: bytes) -> bytes:
    return zlib.decompress(raw, 31)


def test_random_flips_are_refused(folder: Path, figure: Callable[[int, str], None]) -> None:
    source, whole = random.Random(0), {name: (folder / name).read_bytes() for name in NAMES}
    for _ in range(FLIPS):
        name = source.choice(NAMES)
        faults.flip(folder / name, source, bits=source.randint(1, 8))
        error = refusal(folder)
        assert all((error.rule, error.got, error.where, error.way_out))
        assert any(file in f"{error.where} {error.rule}" for file in NAMES)
        assert str(error).isascii()
        assert len(str(error)) < 800
        (folder / name).write_bytes(whole[name])
    figure(11, f"compressed artifacts with 1 to 8 flipped bits that were accepted: 0 of {FLIPS:,}")


def test_flips_that_the_file_s_digest_is_forged_for_are_refused(folder: Path) -> None:
    whole, source = (folder / NAME).read_bytes(), random.Random(0)
    size, accepted = len(plain(folder)), []
    for at in range(len(whole)):
        for bit in range(8) if at < 16 else source.sample(range(8), 2):
            raw = bytearray(whole)
            raw[at] ^= 1 << bit
            samples.replace_packed(folder, bytes(raw), size)
            try:
                read(folder)
            except ArtifactError as error:
                assert str(error).isascii()
            else:
                accepted.append(at)
    assert set(accepted) == {8, 9}  # where gzip tells how hard it tried and on which system: no weights


def test_a_changed_tensor_is_named(folder: Path) -> None:
    raw = bytearray(plain(folder))
    raw[samples.extent(raw, "packed")[0]] ^= 1
    samples.replace_packed(folder, samples.packed_file(bytes(raw)), len(raw))
    error = refusal(folder)
    assert "tensor 'packed'" in error.where
    assert "digest" in error.rule


def test_the_weights_are_verified_while_they_are_loaded(folder: Path, temporary: Path) -> None:
    artifact = read(folder)
    samples.build(folder, seed=1, packed=True)
    for use in (tensors, lambda it: runnable(it).__enter__()):
        with pytest.raises(ArtifactError):
            use(artifact)
    assert list(temporary.iterdir()) == []


def test_a_runnable_folder_is_private_and_goes(folder: Path, temporary: Path) -> None:
    artifact = read(folder)
    with runnable(artifact) as place:
        assert place.parent == temporary
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        assert {path.name for path in place.iterdir()} == {"weights.safetensors", "model.onnx"}
        assert (place / "weights.safetensors").read_bytes() == plain(folder)
        assert (place / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
        assert read(folder) == artifact  # no second name of its files
    assert list(temporary.iterdir()) == []


def test_a_runnable_folder_of_plain_weights_is_the_artifact_s_own(tmp_path: Path) -> None:
    folder = samples.build(tmp_path / "best")
    with runnable(read(folder)) as place:
        assert place == folder


def test_a_full_disk_is_told_and_leaves_nothing(folder: Path, temporary: Path) -> None:
    artifact = read(folder)
    with faults.short_write(100), pytest.raises(MachineError, match="File too large"), runnable(artifact):
        pass
    assert list(temporary.iterdir()) == []


def test_verifying_takes_little_memory_and_loading_no_more_than_the_weights(tmp_path: Path) -> None:
    size, source = 2**25, tmp_path / "source"
    source.mkdir()
    values = np.random.default_rng(0).normal(0, 2, size).astype(np.int8).tobytes()
    raw = samples.safetensors({"t": samples.entry("I8", [size], 0, size)}, values)
    (source / NAME).write_bytes(samples.packed_file(raw))
    del raw
    tracemalloc.start()
    write(tmp_path / "best", source, samples.MANIFEST)
    artifact = read(tmp_path / "best")
    assert tracemalloc.get_traced_memory()[1] < 2**23
    loaded = tensors(artifact)
    assert tracemalloc.get_traced_memory()[1] < 1.2 * size
    tracemalloc.stop()
    assert loaded["t"].numpy().tobytes() == values
    assert artifact.bytes < 0.45 * size


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=400), times=st.integers(1, 400), step=st.integers(1, 5000))
def test_what_is_packed_is_read_as_gzip_reads_it(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, times: int, step: int
) -> None:
    place = tmp_path_factory.mktemp("any")
    (place / "plain").write_bytes(content * times)
    pack(place / "plain", place / "packed")
    raw = (place / "packed").read_bytes()
    assert gzip.decompress(raw) == content * times
    assert raw == samples.packed_file(content * times)
    assert len(content * times) <= 8 * len(raw)
    with io.FileIO(place / "packed") as stream:
        assert _gzip.length(stream, len(raw)) == len(content * times)
        inside, found = _gzip.Unpacked(stream), b""
        while piece := inside.read(step):
            found += piece
        inside.finish()
    assert found == content * times


def test_equal_weights_make_equal_files_whenever_and_wherever(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.bin").write_bytes(b"weights" * 99)
        os.utime(tmp_path / name / f"{name}.bin", (len(name), 10**9))
        pack(tmp_path / name / f"{name}.bin", tmp_path / name / "packed")
    assert (tmp_path / "one" / "packed").read_bytes() == (tmp_path / "two" / "packed").read_bytes()
