"""The artifact comes back as it was written, and is verified on the way."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from artifact import samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flyweight.artifact import _onnx
from flyweight.artifact.format import Artifact, TensorSpec, read, tensors, write
from flyweight.artifact.manifest import DTYPES
from flyweight.errors import ArtifactError, MachineError, UsageError

KINDS = st.tuples(st.lists(st.integers(0, 5), max_size=4), st.sampled_from(sorted(DTYPES)))
NAMES = st.text(max_size=12).filter(lambda name: name != "__metadata__")
ASSETS = Path(__file__).parent.parent / "assets"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return samples.build(tmp_path / "best")


def test_the_manifest_comes_back_equal(folder: Path) -> None:
    artifact = read(folder)
    assert artifact.manifest == samples.MANIFEST
    assert artifact.folder == folder
    assert artifact.notes == ()
    assert {tensor.name for tensor in artifact.tensors} == set(samples.weights())


def test_the_weights_come_back_equal_and_own_their_memory(folder: Path) -> None:
    artifact = read(folder)
    loaded = tensors(artifact)
    for name, tensor in samples.weights().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
    loaded["layer.weight"].zero_()
    torch.testing.assert_close(tensors(artifact)["layer.weight"], samples.weights()["layer.weight"])
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values() if tensor.numel()}) == 3


def test_bytes_are_those_of_the_files(folder: Path, tmp_path: Path) -> None:
    total = sum(file.stat().st_size for file in folder.iterdir())
    assert read(folder).bytes == total
    assert write(folder, tmp_path / "best-source-0", samples.MANIFEST) == total
    assert {file.name: file.bytes for file in read(folder).files} == {
        name: (folder / name).stat().st_size for name in ("weights.safetensors", "model.onnx")
    }


def test_the_digest_is_the_one_that_the_specification_gives(folder: Path) -> None:
    command = ["sh", "-c", "sed '$d' manifest.json | sha256sum"]
    printed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert printed.split()[0] == read(folder).digest
    assert json.loads((folder / "manifest.json").read_bytes())["digest"] == read(folder).digest


def test_equal_contents_give_equal_bytes(tmp_path: Path, figure: Callable[[int, str], None]) -> None:
    one, two = samples.build(tmp_path / "one"), samples.build(tmp_path / "two")
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()
    figure(22, "artifacts of equal contents, byte by byte: equal")


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_comes_back(tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, name)
    values = torch.arange(2 * dtype.itemsize, dtype=torch.uint8)
    tensor = torch.tensor([True, False]) if dtype == torch.bool else values.view(dtype)
    (tmp_path / "source").mkdir()
    save_file({"t": tensor}, tmp_path / "source" / "weights.safetensors")
    write(tmp_path / "best", tmp_path / "source", samples.MANIFEST)
    artifact = read(tmp_path / "best")
    assert artifact.tensors[0].dtype == name
    back = tensors(artifact)["t"]
    assert back.dtype == dtype
    assert back.view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.dictionaries(NAMES, KINDS, max_size=6))
def test_any_weights_come_back_as_safetensors_reads_them(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, tuple[list[int], str]]
) -> None:
    tmp_path = tmp_path_factory.mktemp("any")
    (tmp_path / "source").mkdir()
    file = tmp_path / "source" / "weights.safetensors"
    save_file({name: _filled(shape, dtype) for name, (shape, dtype) in kinds.items()}, file)
    write(tmp_path / "best", tmp_path / "source", samples.MANIFEST)
    ours, theirs = tensors(read(tmp_path / "best")), load_file(file)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert _bytes(ours[name]) == _bytes(tensor)


def test_the_graph_runs_on_weights_that_are_stored_once(folder: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    x = numpy.ones((2, 4), dtype=numpy.float32)
    expected = x @ samples.weights()["layer.weight"].numpy()
    numpy.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-6)
    assert samples.weights()["layer.weight"].numpy().tobytes() not in (folder / "model.onnx").read_bytes()


def test_an_artifact_needs_no_graph(tmp_path: Path) -> None:
    source = samples.source(tmp_path / "source")
    (source / "model.onnx").unlink()
    write(tmp_path / "best", source, samples.MANIFEST)
    assert [file.name for file in read(tmp_path / "best").files] == ["weights.safetensors"]


def test_what_is_there_is_replaced_and_nothing_is_left_beside_it(folder: Path) -> None:
    before = read(folder).digest
    samples.build(folder, seed=1)
    assert read(folder).digest != before
    assert {path.name for path in folder.parent.iterdir()} == {"best", "best-source-0", "best-source-1"}


def test_the_source_is_left_as_it_was(tmp_path: Path) -> None:
    source = samples.source(tmp_path / "source")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    write(tmp_path / "best", source, samples.MANIFEST)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    assert read(samples.build(tmp_path / "best")).manifest == samples.MANIFEST


@pytest.mark.parametrize("kind", ["other files", "file", "link"])
def test_what_is_no_artifact_is_not_replaced(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "best"
    if kind == "other files":
        folder.mkdir()
        (folder / "thesis.tex").write_text("years of work")
    elif kind == "file":
        folder.write_text("years of work")
    else:
        folder.symlink_to(tmp_path)
    with pytest.raises(UsageError, match="takes the place of an artifact only"):
        write(folder, samples.source(tmp_path / "source"), samples.MANIFEST)
    assert kind != "other files" or (folder / "thesis.tex").read_text() == "years of work"
    assert kind != "file" or folder.read_text() == "years of work"
    assert kind != "link" or folder.is_symlink()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="the folder must be there") as caught:
        read(tmp_path / "nowhere")
    assert "nowhere" in caught.value.where
    with pytest.raises(MachineError):
        write(tmp_path / "best", tmp_path / "nowhere", samples.MANIFEST)
    with pytest.raises(MachineError, match="No such file"):
        write(tmp_path / "nowhere" / "best", samples.source(tmp_path / "source"), samples.MANIFEST)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("manifest.json", b"{}", "the writer makes the manifest"),
        ("notes.txt", b"", "holds only"),
        ("weights.safetensors", b"1234", "its length and its header"),
        ("model.onnx", b"\x00\x01", "must be an ONNX model"),
        ("model.onnx", samples.graph(0, 64, "/etc/passwd"), "must lie in weights.safetensors"),
    ],
)
def test_what_a_reader_would_refuse_is_not_written(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    folder = samples.build(tmp_path / "best")
    before = read(folder).digest
    source = samples.source(tmp_path / "source")
    (source / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=says):
        write(folder, source, samples.MANIFEST)
    assert read(folder).digest == before
    assert not (tmp_path / ".best.part").exists()


def test_weights_are_needed(tmp_path: Path) -> None:
    source = samples.source(tmp_path / "source")
    (source / "weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"no such file \(at weights.safetensors\)"):
        write(tmp_path / "best", source, samples.MANIFEST)
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("measured", {"score": float("nan")}),
        ("measured", {"score": {1, 2}}),
        ("machine", {"big": float("inf")}),
        ("runtime", "os.system"),
        ("model_digest", "not hex"),
        ("session", {"threads": 2}),
        ("inputs", (TensorSpec(name="x", dtype="float128", shape=()),)),
        ("inputs", (TensorSpec(name="x", dtype="float32", shape=(-1,)),)),
        ("task", "x" * 2**20),
    ],
)
def test_a_manifest_that_a_reader_would_refuse_is_not_written(
    tmp_path: Path, field: str, value: object
) -> None:
    manifest = dataclasses.replace(samples.MANIFEST, **{field: value})
    with pytest.raises(ArtifactError):
        write(tmp_path / "best", samples.source(tmp_path / "source"), manifest)
    assert not (tmp_path / "best").exists()


def test_a_newer_format_asks_for_an_upgrade(folder: Path) -> None:
    samples.resign(folder, lambda document: document.update(flyweight_artifact=7, new_key=1))
    with pytest.raises(
        ArtifactError, match=r"up to format 4, got one written by format 7 .*; upgrade flyweight"
    ):
        read(folder)


def test_artifacts_of_every_released_format_open(figure: Callable[[int, str], None]) -> None:
    kept = sorted(ASSETS.glob("artifact-format-*"))
    assert kept
    for folder in kept:
        artifact = read(folder)
        assert artifact.manifest.task == "sample"
        assert torch.equal(tensors(artifact)["layer.weight"], samples.weights()["layer.weight"])
    figure(9, f"artifacts of released formats opened: {len(kept)} of {len(kept)}")


def test_weights_that_changed_after_the_read_are_refused(folder: Path) -> None:
    artifact = read(folder)
    samples.build(folder, seed=1)
    with pytest.raises(ArtifactError, match="must have the digest"):
        tensors(artifact)


def test_without_onnx_the_artifact_says_what_was_not_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    artifact = read(folder)
    assert artifact.notes == (_onnx.NOT_CHECKED,)
    assert isinstance(artifact, Artifact)


def _filled(shape: list[int], dtype: str) -> torch.Tensor:
    return torch.ones(shape).to(getattr(torch, dtype))


def _bytes(tensor: torch.Tensor) -> list[int]:
    return list(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else []
