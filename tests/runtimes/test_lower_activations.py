"""How activations are rounded reaches the graph: by rows in integers, on learned grids, in fewer bits, with another bias."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from runtimes import nets
from torch import nn

from flyweight import transforms
from flyweight.inputs.check import run

pytest.importorskip("onnxruntime")


def test_rows_give_what_pytorch_gives_whatever_is_beside_them(tmp_path: Path) -> None:
    model = nets.changed(nets.words(), nets.TEXTS, "dynamic_int8", {"per_row": True})
    predict = nets.prepared("onnxruntime", model, nets.TEXTS, tmp_path)
    for batch in (*nets.TEXTS, nets.text(5, 3), nets.text(1, 1)):
        assert nets.gap(run(model, batch).logits, predict(batch).logits) < 2e-3


def test_rows_of_other_sizes_zeros_and_constants(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(6, 16)
    x[1], x[2], x[3], x[4] = 0.0, 3.0, -3.0, 1000 * x[4]
    twin = nets.changed(model, [x], "dynamic_int8", {"per_row": True, "bias": "keep"})
    found = nets.prepared("onnxruntime", twin, [x], tmp_path)(x)
    wanted = run(twin, x)
    for row in range(len(x)):
        assert nets.gap(wanted[row], found[row]) < 2e-3
        assert nets.gap(run(model, x)[row], found[row]) < 3e-2


def test_rows_are_multiplied_in_integers(tmp_path: Path) -> None:
    model = nets.changed(nets.words(), nets.TEXTS, "dynamic_int8", {"per_row": True})
    nets.prepared("onnxruntime", model, nets.TEXTS, tmp_path)
    graph = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph
    found = Counter(node.op_type for node in graph.node)
    layers = [m for m in model.modules() if getattr(m, "activations", "") == "rows"]
    assert found["MatMulInteger"] == found["QuantizeLinear"] == len(layers) >= 3
    assert not found["DynamicQuantizeLinear"]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "options",
    [{"bits": 8, "reduced": True, "activations": 4}, {"bits": 4, "symmetric": False, "activations": 8}],
    ids=str,
)
def test_layers_that_learned_their_grids(runtime: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Linear layers that read one tensor, each on a grid of its own."""
    pytest.importorskip(runtime)
    torch.manual_seed(0)
    body = nets.Function(
        lambda self, x: self.c(self.a(x) + self.b(x)),
        a=nn.Linear(32, 32),
        b=nn.Linear(32, 32),
        c=nn.Linear(32, 4),
    )
    x = torch.randn(6, 32)
    found = transforms.frozen(nets.changed(body.eval(), [x], "quantization_aware", options))
    found.b.input_grid.mul_(torch.tensor([1.5, 1.0]))
    predict = nets.prepared(runtime, found, [x], tmp_path)
    assert nets.gap(run(found, x), predict(x)) < 1e-3


def test_a_bias_that_was_added_reaches_the_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 4, bias=False)).eval(), torch.rand(6, 16)
    for bias in ("keep", "add"):
        (tmp_path / bias).mkdir()
        twin = nets.changed(model, [x], "dynamic_int8", {"bias": bias})
        assert nets.gap(run(twin, x), nets.prepared("onnxruntime", twin, [x], tmp_path / bias)(x)) < 5e-3
