"""A code that says COMPRESSED: what runs is as without, and what is kept is a gzip file that loads to the same."""

from __future__ import annotations

import dataclasses
import gzip
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from runtimes import nets
from torch import nn

from flyweight import discover, transforms
from flyweight.artifact import format as spec
from flyweight.artifact.load import load_module, load_predictor
from flyweight.codes import integer
from flyweight.errors import ModelError
from flyweight.evaluation.memory import peak_memory
from flyweight.inputs.check import run
from flyweight.records import Plan, Step
from flyweight.runtimes import _structure, llamacpp
from flyweight.runtimes._files import PACKED, Predictor, is_compressed
from flyweight.transforms import Context

WIDE = [torch.randn(3, 512, generator=torch.Generator().manual_seed(0))]
FILE_RUNTIMES = ("onnxruntime", "openvino")
STEPS = tuple(Step("weight_only", name, {}) for name in ("0", "2"))


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code "integer" as one whose files are compressed."""
    monkeypatch.setattr(integer, "COMPRESSED", True, raising=False)


def wide() -> nn.Module:
    """Layers large enough for runtimes to map their weights; few large values, so that integers are peaked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 256)).eval()
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight, std=0.02)
        layer.weight.data[:, 0] = 0.8
    return model


def quantized() -> nn.Module:
    model = wide()
    sites = [transforms.plain_site(model, step.site) for step in STEPS]
    return transforms.apply(model, Plan(STEPS), sites, Context())


def prepared(runtime: str, folder: Path) -> Predictor:
    if runtime != "torch":
        pytest.importorskip(runtime)
    folder.mkdir()
    predictor: Predictor = discover.method("runtimes", runtime).prepare(quantized(), WIDE, folder)
    return predictor


def written(predictor: Predictor, folder: Path) -> Path:
    manifest = spec.Manifest(
        task="wide", runtime=predictor.runtime, session=dict(predictor.session), plan=Plan(STEPS),
        inputs=tuple(spec.TensorSpec(name=n, dtype=d, shape=s) for n, d, s in predictor.inputs),
        outputs=predictor.outputs, layouts=dict(predictor.layouts), model_digest="5e" * 32, measured={}, machine={},
        versions={},
    )  # fmt: skip
    spec.write(folder, predictor.files[0].parent, manifest)
    return folder


@pytest.mark.parametrize("runtime", ["torch", *FILE_RUNTIMES])
@pytest.mark.usefixtures("compressed")
def test_the_file_to_keep_is_compressed_and_the_one_to_run_is_as_without(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prepared(runtime, tmp_path / "compressed")
    monkeypatch.setattr(integer, "COMPRESSED", False)
    without = prepared(runtime, tmp_path / "without")
    assert {file.name for file in without.files} == {path.name for path in (tmp_path / "without").iterdir()}
    for file in without.files:
        assert (tmp_path / "compressed" / file.name).read_bytes() == file.read_bytes()
    packed = tmp_path / "compressed" / PACKED
    plain = (tmp_path / "without" / "weights.safetensors").read_bytes()
    names = [file.name.replace("weights.safetensors", PACKED) for file in without.files]
    assert [file.name for file in found.files] == names
    assert gzip.decompress(packed.read_bytes()) == plain
    assert found.bytes == without.bytes - len(plain) + packed.stat().st_size
    assert packed.stat().st_size < 0.8 * len(plain)
    assert torch.equal(found(WIDE[0]), without(WIDE[0]))


@pytest.mark.parametrize("runtime", FILE_RUNTIMES)
@pytest.mark.usefixtures("compressed")
def test_an_artifact_runs_when_what_it_was_unpacked_to_is_gone(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prepared(runtime, tmp_path / "source")
    folder = written(before, tmp_path / "best")
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    loaded = load_predictor(folder)
    assert list(place.iterdir()) == []
    wanted = before(WIDE[0])
    for file in (tmp_path / "source").iterdir():
        file.unlink()  # what runs must not lean on them either
    (place / "filler").write_bytes(b"\xff" * 2**22)  # takes the place on the disk that was given back
    for _ in range(3):
        assert torch.equal(next(iter(_structure.leaves(loaded(WIDE[0])))), wanted)
    assert torch.equal(loaded(torch.cat([WIDE[0][1:], WIDE[0][:1]])), torch.cat([wanted[1:], wanted[:1]]))
    assert {file.name for file in loaded.files} == {"model.onnx", PACKED}
    assert loaded.bytes == sum(
        file.stat().st_size for file in folder.iterdir() if file.name != "manifest.json"
    )


@pytest.mark.parametrize("runtime", ["torch", *FILE_RUNTIMES])
@pytest.mark.usefixtures("compressed")
def test_an_artifact_loads_as_a_module(runtime: str, tmp_path: Path) -> None:
    folder = written(prepared(runtime, tmp_path / "source"), tmp_path / "best")
    assert {file.name for file in folder.iterdir()} <= {"manifest.json", "model.onnx", PACKED}
    twin = quantized()
    module = load_module(folder, wide())
    assert torch.equal(run(module, WIDE[0]), run(twin, WIDE[0]))
    for name, tensor in twin.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor)


@pytest.mark.usefixtures("compressed")
def test_equal_models_make_equal_artifacts(tmp_path: Path) -> None:
    one, two = (written(prepared("torch", tmp_path / f"{n}-source"), tmp_path / n) for n in ("one", "two"))
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()


@pytest.mark.usefixtures("compressed")
def test_memory_is_that_of_the_plain_file(tmp_path: Path) -> None:
    predictor = prepared("onnxruntime", tmp_path / "source")
    assert peak_memory(predictor, quantized(), WIDE[0]) is not None
    alone = dataclasses.replace(predictor, files=(tmp_path / "nowhere" / "model.onnx",))
    assert peak_memory(alone, quantized(), WIDE[0]) is None


@pytest.mark.usefixtures("compressed")
def test_llama_cpp_refuses_before_it_writes(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"keeps weights as they run.*compressed"):
        llamacpp.prepare(quantized(), WIDE, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_a_code_that_says_so_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Any = nets.words()
    assert not is_compressed(plain)
    assert not is_compressed(quantized())
    monkeypatch.setattr(integer, "COMPRESSED", True, raising=False)
    assert not is_compressed(plain)
    assert is_compressed(quantized())
