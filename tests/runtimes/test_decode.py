"""Every code decodes alike in PyTorch, ONNX Runtime and OpenVINO, whatever the layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runtimes import nets

from flyweight import discover
from flyweight.inputs.check import run
from flyweight.runtimes._structure import leaves

CODES: list[dict[str, Any]] = [
    {},
    {"bits": 4, "group": 16, "symmetric": False, "scale": "float16"},
    {"bits": 3, "group": "tensor"},
    {"bits": 6},
    {"code": "ternary", "group": 16},
    {"code": "palette", "bits": 3, "rows": 2},
    {"code": "low_float", "format": "e5m2"},
    {"code": "low_float", "format": "e2m1", "group": 16, "scale": "e8m0"},
    {"code": "entropy", "step": 0.05},
    {"code": "entropy", "step": 0.05, "scale": "float32"},
]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("given", CODES, ids=str)
def test_layers_of_all_kinds(runtime: str, given: dict[str, Any], tmp_path: Path) -> None:
    reason = discover.method("runtimes", runtime).available()
    if reason:
        pytest.skip(reason)
    for at, (model, examples, folds) in enumerate(
        ((nets.words(), nets.TEXTS, ()), (nets.pictures(), nets.IMAGES, nets.FOLDS))
    ):
        changed = nets.changed(model, examples, "weight_only", given, folds)
        where = tmp_path / str(at)
        where.mkdir()
        predict = nets.prepared(runtime, changed, examples, where)
        for batch in examples:
            wanted, found = (leaves(output)[0] for output in (run(changed, batch), predict(batch)))
            assert torch.isfinite(found).all()
            assert nets.gap(wanted, found) < 1e-4
