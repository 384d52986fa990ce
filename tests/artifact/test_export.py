"""OpenVINO IR out of an artifact, run by OpenVINO alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runtimes import nets
from torch import nn

from flyweight import discover, transforms
from flyweight.artifact import _ir
from flyweight.artifact import format as spec
from flyweight.artifact._ir import BIN, XML
from flyweight.artifact.export import export
from flyweight.errors import ArtifactError, UsageError
from flyweight.inputs.check import run
from flyweight.records import Plan, Step

openvino = pytest.importorskip("openvino")

EXAMPLES = [torch.randn(n, 128, generator=torch.Generator().manual_seed(n)) for n in (1, 3)]
FOUR: dict[str, Any] = {"bits": 4, "group": 32, "symmetric": False, "scale": "float16"}


def quantized(options: dict[str, Any]) -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 64)).eval()
    plan = Plan(tuple(Step("weight_only", name, options) for name in ("0", "2")))
    sites = [transforms.plain_site(model, step.site) for step in plan.steps]
    return transforms.apply(model, plan, sites, transforms.Context()), plan


def artifact(where: Path, runtime: str, options: dict[str, Any]) -> tuple[nn.Module, Path]:
    model, plan = quantized(options)
    (where / "source").mkdir()
    found = discover.method("runtimes", runtime).prepare(model, EXAMPLES, where / "source")
    manifest = spec.Manifest(
        task="ir", runtime=runtime, session=dict(found.session), plan=plan,
        inputs=tuple(spec.TensorSpec(name=n, dtype=d, shape=s) for n, d, s in found.inputs),
        outputs=found.outputs, layouts=dict(found.layouts), model_digest="5e" * 32, measured={}, machine={}, versions={},
    )  # fmt: skip
    spec.write(where / "best", where / "source", manifest)
    return model, where / "best"


@pytest.mark.parametrize(("options", "most"), [(FOUR, 0.2), ({}, 0.32)], ids=["4 bits", "8 bits"])
def test_openvino_runs_it_with_its_weights_as_integers(
    options: dict[str, Any], most: float, tmp_path: Path
) -> None:
    model, best = artifact(tmp_path, "openvino", options)
    told = export(best, tmp_path / "ir")
    files = {file.name: file.stat().st_size for file in (tmp_path / "ir").iterdir()}
    assert set(files) == {XML, BIN}
    assert files == told
    assert files[BIN] < most * 4 * (128 * 512 + 512 * 64)
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(tmp_path / "ir" / XML), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    for batch in EXAMPLES:
        found = compiled({"input": batch.numpy()})[0]
        assert nets.gap(run(model, batch), torch.from_numpy(found)) < 1e-5
    kinds = [
        {port.get_element_type().get_type_name() for port in op.inputs()}
        for op in compiled.get_runtime_model().get_ops()
    ]
    assert sum(bool(kind & {"u4", "i8"}) for kind in kinds) >= 2


def test_several_inputs_of_any_length(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    model = nets.words()
    found = nets.prepared("openvino", model, nets.TEXTS, tmp_path / "source")
    manifest = spec.Manifest(
        task="ir", runtime="openvino", session={}, plan=Plan(),
        inputs=tuple(spec.TensorSpec(name=n, dtype=d, shape=s) for n, d, s in found.inputs),
        outputs=found.outputs, layouts=dict(found.layouts), model_digest="5e" * 32, measured={}, machine={}, versions={},
    )  # fmt: skip
    spec.write(tmp_path / "best", tmp_path / "source", manifest)
    export(tmp_path / "best", tmp_path / "ir")
    compiled = openvino.Core().compile_model(tmp_path / "ir" / XML, "CPU")
    batch = nets.text(3, 9)
    given = {port.get_any_name(): batch[port.get_any_name()].numpy() for port in compiled.inputs}
    assert nets.gap(run(model, batch).logits, torch.from_numpy(compiled(given)[0])) < 1e-4


@pytest.mark.parametrize("options", [FOUR, {"code": "entropy"}], ids=["as it is", "unpacked"])
def test_of_another_runtime_it_is_what_that_opens(options: dict[str, Any], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, best = artifact(tmp_path, "onnxruntime", options)
    told = export(best, tmp_path / "plain")
    assert set(told) == {"model.onnx", "weights.safetensors"}
    session = onnxruntime.InferenceSession(str(tmp_path / "plain" / "model.onnx"))
    for batch in EXAMPLES:
        (found,) = session.run(None, {"input": batch.numpy()})
        assert nets.gap(run(model, batch), torch.from_numpy(found)) < 1e-5


def test_nothing_is_overwritten_and_nothing_half_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, best = artifact(tmp_path, "openvino", FOUR)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="must not be there yet"):
        export(best, tmp_path / "mine")
    before = set(tmp_path.iterdir())
    good = _ir._convert

    def wrong(source: Path, part: Path) -> None:
        good(source, part)
        raw = np.fromfile(part / BIN, np.uint8)
        raw[:2048] ^= 0x0F
        raw.tofile(part / BIN)

    monkeypatch.setattr(_ir, "_convert", wrong)
    with pytest.raises(ArtifactError, match="IR must compute what the artifact computes"):
        export(best, tmp_path / "ir")
    assert set(tmp_path.iterdir()) == before


def test_a_damaged_artifact_is_refused(tmp_path: Path) -> None:
    _, best = artifact(tmp_path, "openvino", FOUR)
    raw = bytearray((best / "weights.safetensors").read_bytes())
    raw[-5] ^= 1
    (best / "weights.safetensors").write_bytes(raw)
    with pytest.raises(ArtifactError):
        export(best, tmp_path / "ir")
