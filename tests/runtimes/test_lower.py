"""Corners of the lowering: who reads what rounded, and whose grid counts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from runtimes import nets
from torch import nn

from flyweight import transforms
from flyweight.analysis.sites import analyse
from flyweight.inputs.check import run
from flyweight.records import Plan, Step
from flyweight.transforms import Context

pytest.importorskip("onnxruntime")


def static(model: nn.Module, examples: Any, ranges: dict[str, str]) -> nn.Module:
    analysis = analyse(model, examples)
    steps = tuple(Step("static_int8", site, {"range": kind}) for site, kind in ranges.items())
    return transforms.apply(model, Plan(steps), analysis.sites, Context(analysis.statistics))


def test_the_model_itself_may_be_the_only_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, examples = nn.Linear(16, 4).eval(), [torch.randn(1, 16), torch.randn(3, 16)]
    for index, method in enumerate((None, "weight_only", "dynamic_int8", "static_int8")):
        where = tmp_path / str(index)
        where.mkdir()
        twin = nets.changed(model, examples, method) if method else model
        predict = nets.prepared("onnxruntime", twin, examples, where)
        assert nets.gap(run(twin, examples[1]), predict(examples[1])) < 1e-2


def test_models_of_one_printed_form_are_not_mixed_up(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(2, 8)
    functions = (lambda self, x: self.a(x) + 1, lambda self, x: self.a(x) * 2)
    for index, function in enumerate(functions):
        where = tmp_path / str(index)
        where.mkdir()
        model = nets.Function(function, a=layer).eval()
        assert torch.allclose(nets.prepared("onnxruntime", model, [x], where)(x), run(model, x), atol=1e-6)


def test_two_layers_that_want_different_grids_of_one_tensor(tmp_path: Path) -> None:
    """The bias is in units of the grid that the tensor got, not of the one that its layer would have chosen."""
    torch.manual_seed(0)
    body = nets.Function(
        lambda self, x: torch.relu(self.b(self.z(x))) + torch.relu(self.c(self.z(x))),
        z=nn.Identity(), b=nn.Conv2d(4, 8, 3), c=nn.Conv2d(4, 8, 3),
    ).eval()  # fmt: skip
    with torch.no_grad():
        body.b.bias += 3
        body.c.bias += 3
    x = torch.randn(2, 4, 40, 40)
    x[0, 0, 0, 0] = 20.0  # min-max and percentile differ by far
    model = static(body, [x], {"b": "minmax", "c": "percentile"})
    assert float(model.b.input_grid[0]) > 1.2 * float(model.c.input_grid[0])
    found = nets.prepared("onnxruntime", model, [x], tmp_path)(x)
    wide = copy.deepcopy(model)
    wide.c.input_grid = wide.b.input_grid
    assert nets.gap(run(wide, x), found) < 0.03


def test_outputs_and_sums_beside_linear_layers_are_not_rounded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = nets.Function(lambda self, x: (x + self.a(x), x), a=nn.Linear(16, 16)).eval()
    x = torch.randn(3, 16)
    model = static(body, [x], {"a": "minmax"})
    total, same = nets.prepared("onnxruntime", model, [x], tmp_path)(x)
    assert torch.equal(same, x)
    assert nets.gap(run(model, x)[0], total) < 1e-4  # the bias is in steps of the integer product


def test_a_dead_channel_with_a_large_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight[3] *= 1e-12
        model[0].bias[3] = 50.0
    x = torch.randn(2, 4, 9, 9)
    twin = static(model, [x], {"0": "minmax", "2": "minmax"})
    assert nets.gap(run(model, x), nets.prepared("onnxruntime", twin, [x], tmp_path)(x)) < 0.03


def test_equal_weights_of_two_layers_are_not_taken_for_one(tmp_path: Path) -> None:
    """A constant may refer to a weight only if nothing stores that weight turned round."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 24, bias=False)
    body = nets.Function(lambda self, x: self.a(x) @ self.b.weight, a=layer, b=copy.deepcopy(layer)).eval()
    x = torch.randn(3, 24)
    for index, twin in enumerate((body, nets.changed(body, [x], "weight_only"))):
        where = tmp_path / str(index)
        where.mkdir()
        assert nets.gap(run(twin, x), nets.prepared("onnxruntime", twin, [x], where)(x)) < 1e-5
