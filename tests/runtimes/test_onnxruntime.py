"""What ONNX Runtime makes of a graph: the same numbers, and integers where integers were meant."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from runtimes import nets
from safetensors import safe_open
from torch import nn

from flyweight.errors import DataError, ModelError
from flyweight.inputs.check import run
from flyweight.runtimes import onnxruntime as runtime
from flyweight.runtimes._constants import INLINE

pytest.importorskip("onnxruntime")

TEXT_METHODS: list[tuple[str, dict[str, Any], float]] = [
    ("weight_only", {}, 1e-5),
    ("weight_only", {"bits": 4, "group": 32, "symmetric": False}, 1e-5),
    ("weight_only", {"bits": 4, "group": 32}, 1e-5),
    ("weight_only", {"bits": 4}, 1e-5),
    ("weight_only", {"bits": 4, "symmetric": False}, 1e-5),
    ("weight_only", {"group": 16}, 1e-5),
    ("weight_only", {"group": "tensor"}, 1e-5),
    ("weight_only", {"bits": 5, "group": 16, "symmetric": False, "scale": "float16"}, 1e-5),
    ("weight_only", {"bits": 3, "group": 16, "symmetric": False, "scale": "float16"}, 1e-5),
    ("weight_only", {"bits": 6, "group": "tensor", "symmetric": False}, 1e-5),
    ("weight_only", {"bits": 2}, 1e-5),
    ("weight_only", {"code": "ternary", "group": 16}, 1e-5),
    ("weight_only", {"code": "palette", "bits": 4}, 1e-5),
    ("weight_only", {"code": "palette", "bits": 6, "rows": 4, "scaled": True}, 1e-5),
    ("weight_only", {"code": "low_float"}, 1e-5),
    ("weight_only", {"code": "low_float", "format": "e2m1", "group": 16, "scale": "e8m0"}, 1e-5),
    ("dynamic_int8", {}, 2e-2),
    ("static_int8", {}, 2e-2),
]


def operations(folder: Path, session: Any, saved: Path) -> Counter[str]:
    """The operations of the graph as ONNX Runtime runs it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(saved)
    options.log_severity_level = 4
    for key, value in session.items():
        options.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(str(saved), load_external_data=False).graph.node)


@pytest.mark.parametrize(("method", "options", "tolerance"), TEXT_METHODS, ids=str)
def test_a_text_model_gives_what_pytorch_gives(
    method: str, options: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    model = nets.changed(nets.words(), nets.TEXTS, method, options)
    predict = nets.prepared("onnxruntime", model, nets.TEXTS, tmp_path)
    for batch in (*nets.TEXTS, nets.text(5, 3), nets.text(1, 1)):
        wanted, found = run(model, batch), predict(batch)
        assert type(found) is nets.Answer
        assert found.nothing is None
        assert found.number == 3.5
        assert nets.gap(wanted.logits, found.logits) < tolerance
        assert nets.gap(wanted.parts[0], found.parts[0]) < tolerance
        assert found.parts[1][0].shape == ()
        assert float(found.parts[1][0]) == float(wanted.parts[1][0])


def test_every_layer_between_input_and_output_becomes_integer(tmp_path: Path) -> None:
    model = nets.changed(nets.pictures(), nets.IMAGES, "static_int8", folds=nets.FOLDS)
    predict = nets.prepared("onnxruntime", model, nets.IMAGES, tmp_path)
    for batch in (*nets.IMAGES, nets.images(3)):
        assert nets.gap(run(model, batch), predict(batch)) < 3e-2
    found = operations(tmp_path, predict.session, tmp_path / "optimized")
    assert found["QLinearConv"] == 3
    assert not found["Conv"] + found["FusedConv"] + found["Pad"] + found["Relu"]
    assert not found["BatchNormalization"]
    assert not found["Clip"]
    assert found["QLinearGlobalAveragePool"] == found["QGemm"] == 1
    assert found["DequantizeLinear"] + found["QuantizeLinear"] == 1


def test_dynamic_layers_multiply_integers_and_share_their_input_s_rounding(tmp_path: Path) -> None:
    model = nets.changed(nets.words(), nets.TEXTS, "dynamic_int8")
    predict = nets.prepared("onnxruntime", model, nets.TEXTS, tmp_path)
    found = operations(tmp_path, predict.session, tmp_path / "optimized")
    integer = found["DynamicQuantizeMatMul"] + found["MatMulIntegerToFloat"] + found["MatMulInteger"]
    assert integer == 4
    assert found["MatMul"] <= 1


def test_a_short_prediction_runs_on_one_thread_where_that_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int | None] = []
    monkeypatch.setattr(runtime, "cores", lambda: 2)
    for ours, alone in ((1e-4, 2e-4), (2e-4, 1e-4), (1.0, 1e-4)):

        def seconds(predict: Any, batch: Any, times: tuple[float, float] = (ours, alone)) -> float:
            return times[runtime.ONE_THREAD in predict.session]

        monkeypatch.setattr(runtime, "_seconds", seconds)
        predict = nets.prepared("onnxruntime", nets.pictures(), nets.IMAGES, tmp_path)
        taken.append(predict.session.get(runtime.ONE_THREAD))
        assert nets.gap(run(nets.pictures(), nets.IMAGES[0]), predict(nets.IMAGES[0])) < 1e-5
    assert taken == [None, "1", None]


def test_stored_integers_are_decoded_at_load(tmp_path: Path) -> None:
    model = nets.changed(nets.pictures(), nets.IMAGES, "weight_only", folds=nets.FOLDS)
    predict = nets.prepared("onnxruntime", model, nets.IMAGES, tmp_path)
    assert "session.disable_quant_qdq" in predict.session
    found = operations(tmp_path, predict.session, tmp_path / "optimized")
    assert found["Conv"] + found["FusedConv"] == 3
    assert not found["QLinearConv"] + found["DequantizeLinear"]


@pytest.mark.parametrize("method", ["weight_only", "static_int8", "dynamic_int8"])
def test_weights_are_stored_once_and_outside_the_graph(method: str, tmp_path: Path) -> None:
    model = nets.changed(nets.words(), nets.TEXTS, method)
    nets.prepared("onnxruntime", model, nets.TEXTS, tmp_path)
    graph = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph
    size, places = (tmp_path / "weights.safetensors").stat().st_size, []
    for item in graph.initializer:
        if item.data_location == onnx.TensorProto.EXTERNAL:
            at = {entry.key: entry.value for entry in item.external_data}
            assert at["location"] == "weights.safetensors"
            assert int(at["offset"]) + int(at["length"]) <= size
            places.append(int(at["offset"]))
        else:
            assert item.ByteSize() <= INLINE + 200
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        held = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    state = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    assert held <= sum(state.values()) + 64


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.zeros(1, 3, 12, 13), ["1x3x12x13", "anyx3x12x12", "input"]),
        (torch.zeros(3, 12, 12), ["3x12x12", "input"]),
    ],
)
def test_wrong_shapes_are_refused(batch: torch.Tensor, words: list[str], tmp_path: Path) -> None:
    predict = nets.prepared("onnxruntime", nets.pictures(), nets.IMAGES, tmp_path)
    with pytest.raises(DataError) as error:
        predict(batch)
    assert all(word in str(error.value) for word in words)


def test_wrong_keys_are_refused(tmp_path: Path) -> None:
    predict = nets.prepared("onnxruntime", nets.words(), nets.TEXTS, tmp_path)
    with pytest.raises(DataError, match="first example's keys"):
        predict({"tokens": torch.zeros(1, 2, dtype=torch.long)})


def test_other_sizes_than_the_examples_need_examples_that_vary(tmp_path: Path) -> None:
    predict = nets.prepared("onnxruntime", nets.words(), nets.TEXTS, tmp_path)
    assert {name: shape for name, _, shape in predict.inputs} == {
        "tokens": (None, None), "mask": (None, None), "unused": (None, 2),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", [None, "weight_only", "dynamic_int8", "static_int8"])
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype, method: str | None, tmp_path: Path) -> None:
    x = torch.randn(2, 16).to(dtype)
    model = nn.Sequential(nn.Linear(16, 4, bias=False)).to(dtype).eval()
    model = nets.changed(model, [x], method) if method else model
    with pytest.raises(ModelError, match=r"must be in float32.*model\.float\(\)"):
        nets.prepared("onnxruntime", model, [x], tmp_path)


def test_a_model_that_cannot_be_exported_says_so_quietly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layer = nn.Linear(4, 4)
    model = nets.Function(lambda self, x: self.a(x) if float(x.sum()) > 0 else x, a=layer).eval()
    with pytest.raises(ModelError, match=r"exportable to ONNX.*--runtime torch"):
        nets.prepared("onnxruntime", model, [torch.randn(1, 4)], tmp_path)
    assert capfd.readouterr() == ("", "")


def test_code_may_ask_a_layer_for_its_numbers(tmp_path: Path) -> None:
    model = nets.Function(lambda self, x: self.a(x) * self.a.stride[0], a=nn.Conv2d(3, 4, 3, stride=2)).eval()
    x = torch.randn(2, 3, 8, 8)
    predict = nets.prepared("onnxruntime", model, [x], tmp_path)
    assert torch.allclose(torch.as_tensor(predict(x)), run(model, x), atol=1e-5)
