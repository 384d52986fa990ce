"""Integers that are multiplied as they are stored: real files in real runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from runtimes import nets
from torch import nn

from flyweight.evaluation.memory import peak_memory
from flyweight.inputs.check import run
from flyweight.runtimes._layout import load_state
from flyweight.runtimes._state import unique_state

pytest.importorskip("onnxruntime")

FOUR: dict[str, Any] = {"bits": 4, "group": 32, "symmetric": False, "scale": "float16"}
EXACT: list[dict[str, Any]] = [
    FOUR,
    {"bits": 4, "group": 16},
    {"bits": 4, "group": 16, "full": True},
    {"bits": 3, "group": 32, "symmetric": False},
    {"bits": 2, "group": 32},
    {"code": "ternary", "group": 16},
    {"bits": 4, "group": 32, "symmetric": False, "rounding": "half_quadratic"},
]
ROUNDED: list[dict[str, Any]] = [
    {},
    {"symmetric": True},
    {"bits": 8},
    {"bits": 8, "symmetric": True, "scale": "float32"},
]


class Deep(nn.Module):
    """Three layers: with a bias, of odd numbers of outputs and of groups; the last is no multiple of anything."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(160, 224), nn.Linear(224, 37, bias=False), nn.Linear(37, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class Turned(nn.Module):
    """The weight (I, O), as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(64, 48) / 8), nn.Parameter(torch.randn(48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, 64), self.weight)
        return flat.reshape(*x.shape[:-1], 48)


def deep() -> nn.Module:
    torch.manual_seed(0)
    return Deep().eval()


EXAMPLES = [torch.randn(n, 5, 160, generator=torch.Generator().manual_seed(n)) for n in (1, 3)]


def nodes(where: Path) -> list[Any]:
    return list(onnx.load(where / "model.onnx", load_external_data=False).graph.node)


def blocks(where: Path) -> list[dict[str, Any]]:
    found = [node for node in nodes(where) if node.op_type == "MatMulNBits"]
    return [{item.name: onnx.helper.get_attribute_value(item) for item in node.attribute} for node in found]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("given", EXACT, ids=str)
def test_float_inputs_stay_exact(runtime: str, given: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    twin = nets.changed(deep(), EXAMPLES, "weight_only", given)
    predict = nets.prepared(runtime, twin, EXAMPLES, tmp_path)
    for batch in (*EXAMPLES, torch.randn(7, 5, 160)):
        assert nets.gap(run(twin, batch), predict(batch)) < 1e-5
    made = blocks(tmp_path)
    assert [(at["K"], at["N"], at["bits"], at["accuracy_level"]) for at in made] == [
        (160, 224, 4, 1),
        (224, 37, 4, 1),
    ]


@pytest.mark.parametrize("given", ROUNDED, ids=str)
def test_rounded_inputs_are_those_of_the_model(given: dict[str, Any], tmp_path: Path) -> None:
    """Also at the ends of the range, where 16-bit sums of 8-bit products could saturate."""
    model = deep()
    with torch.no_grad():
        model.a.weight[:, ::2] = 0.1
        model.a.weight[:, 1::2] = -0.1
    twin = nets.changed(model, EXAMPLES, "block_int8", given)
    predict = nets.prepared("onnxruntime", twin, EXAMPLES, tmp_path)
    signs = torch.ones(1, 1, 160)
    signs[..., 1::2] = -1
    for batch in (*EXAMPLES, torch.randn(40, 5, 160), 100 * signs.expand(2, 5, -1), 0 * EXAMPLES[0]):
        assert nets.gap(run(twin, batch), predict(batch)) < 1e-4
    assert [at["accuracy_level"] for at in blocks(tmp_path)] == [4, 4]
    assert 1e-4 < nets.gap(run(model, EXAMPLES[0]), run(twin, EXAMPLES[0])) < 0.5


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("weight_only", {"bits": 4}),  # 160 and 224 inputs share a scale: no length that runtimes multiply
        ("weight_only", {"bits": 4, "group": "tensor"}),
        ("weight_only", {"bits": 8, "group": 32}),
        ("weight_only", {"bits": 5, "group": 32}),
        ("weight_only", {"code": "palette", "bits": 4}),
        ("weight_only", {"code": "entropy", "step": 0.1}),
        ("dynamic_int8", {}),
    ],
)
def test_all_others_are_decoded(method: str, given: dict[str, Any], tmp_path: Path) -> None:
    twin = nets.changed(deep(), EXAMPLES, method, given)
    predict = nets.prepared("onnxruntime", twin, EXAMPLES, tmp_path)
    assert not blocks(tmp_path)
    assert nets.gap(run(twin, EXAMPLES[1]), predict(EXAMPLES[1])) < 1e-2


@pytest.mark.parametrize("method", ["weight_only", "block_int8"])
def test_turned_layers_and_layers_called_twice(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = nets.Function(
        lambda self, x: self.t(x) + self.u(self.w(self.w(x))),
        t=Turned(),
        w=nn.Linear(64, 64),
        u=nn.Linear(64, 48),
    )
    examples = [torch.randn(1, 64), torch.randn(5, 64)]
    twin = nets.changed(body.eval(), examples, method, FOUR)
    predict = nets.prepared("onnxruntime", twin, examples, tmp_path)
    for batch in examples:
        assert nets.gap(run(twin, batch), predict(batch)) < 1e-5
    assert len(blocks(tmp_path)) >= 2


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_table_that_is_also_the_head(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    twin = nets.changed(nets.words(), nets.TEXTS, "weight_only", {"bits": 4, "group": 16, "symmetric": False})
    predict = nets.prepared(runtime, twin, nets.TEXTS, tmp_path)
    for batch in nets.TEXTS:
        assert nets.gap(run(twin, batch).logits, predict(batch).logits) < 1e-5
    assert len(blocks(tmp_path)) >= 3


@pytest.mark.parametrize(
    ("method", "given"),
    [*(("weight_only", g) for g in EXACT), *(("block_int8", g) for g in ROUNDED)],
    ids=str,
)
def test_what_is_stored_comes_back(method: str, given: dict[str, Any], tmp_path: Path) -> None:
    twin, other = (nets.changed(deep(), EXAMPLES, method, given) for _ in range(2))
    predict = nets.prepared("onnxruntime", twin, EXAMPLES, tmp_path)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "weights.safetensors")
    for tensor in other.state_dict().values():
        tensor.zero_()
    for name in ("a.integers", "b.integers"):
        stored_bytes = stored[name].numel()
        assert stored_bytes == (224 * 160 if name[0] == "a" else 37 * 224) * (
            1 if given.get("bits") == 8 else 0.5
        )
    load_state(other, stored, predict.layouts)
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in unique_state(twin).items())


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(2)]).eval()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_weights_stay_small_in_memory(runtime: str, tmp_path: Path) -> None:
    """8 Mi weights: 32 MiB as floats, 5 MiB in 4 bits and scales. What loading takes for a moment is counted too."""
    pytest.importorskip(runtime)
    examples, peaks = [torch.randn(1, 2048)], {}
    for name, method, given in (
        ("floats", "", {}),
        ("exact", "weight_only", FOUR),
        ("rounded", "block_int8", {}),
    ):
        if (runtime, name) == ("openvino", "rounded"):
            continue
        (tmp_path / name).mkdir()
        twin = nets.changed(wide(), examples, method, given) if method else wide()
        peaks[name] = peak_memory(nets.prepared(runtime, twin, examples, tmp_path / name), twin, examples[0])
    assert all(peaks.values())
    for name in set(peaks) - {"floats"}:
        assert peaks["floats"] - peaks[name] > 16 * 2**20  # type: ignore[operator]


def test_no_setting_is_needed_to_run_the_file(tmp_path: Path) -> None:
    """Whoever opens model.onnx by themselves gets the same output and the same small memory."""
    import onnxruntime

    twin = nets.changed(deep(), EXAMPLES, "weight_only", FOUR)
    predict = nets.prepared("onnxruntime", twin, EXAMPLES, tmp_path)
    plain = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    found = plain.run(None, {"input": EXAMPLES[1].numpy()})[0]
    assert nets.gap(predict(EXAMPLES[1]), torch.from_numpy(found)) < 1e-6
