"""Every code decodes alike in PyTorch, ONNX Runtime and OpenVINO, whatever the layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runtimes import nets
from torch import nn

from flyweight import discover, transforms
from flyweight.analysis.sites import analyse
from flyweight.codes import super_block
from flyweight.inputs.check import run
from flyweight.records import Plan, Step
from flyweight.runtimes._files import WEIGHTS
from flyweight.runtimes._structure import leaves
from flyweight.transforms import Context

CODES: list[dict[str, Any]] = [
    {},
    {"bits": 4, "group": 16, "symmetric": False, "scale": "float16"},
    {"bits": 3, "group": "tensor"},
    {"bits": 6},
    {"code": "ternary", "group": 16},
    {"code": "palette", "bits": 3, "rows": 2},
    {"code": "vector_palette", "bits": 2, "width": 2},
    {"code": "low_float", "format": "e5m2"},
    {"code": "low_float", "format": "e2m1", "group": 16, "scale": "e8m0"},
    {"code": "entropy", "step": 0.05},
    {"code": "entropy", "step": 0.05, "scale": "float32"},
    {"code": "sparse"},
    {"code": "sparse", "pattern": "2:4", "bits": 4, "group": 16, "scale": "float16"},
    {"code": "sparse", "pattern": "8x1", "sparsity": 0.75, "bits": 3, "group": "tensor"},
    {"code": "sparse", "pattern": "4x4", "bits": 6},
]
BLOCKS: list[dict[str, Any]] = [
    {"code": "iq4_nl"},
    *({"code": "super_block", "bits": bits, "uneven": uneven} for bits, uneven in super_block.FORMS),
]


RUNTIMES = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])


@RUNTIMES
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


@RUNTIMES
def test_blocks_of_llama_cpp(runtime: str, tmp_path: Path) -> None:
    reason = discover.method("runtimes", runtime).available()
    if reason:
        pytest.skip(reason)
    torch.manual_seed(0)
    model, batch = nn.Sequential(*(nn.Linear(256, 256) for _ in BLOCKS)).eval(), torch.randn(3, 256)
    analysis = analyse(model, [batch])
    plan = Plan(tuple(Step("weight_only", str(at), given) for at, given in enumerate(BLOCKS)))
    changed = transforms.apply(model, plan, analysis.sites, Context(analysis.statistics))
    predict = nets.prepared(runtime, changed, [batch], tmp_path)
    assert nets.gap(run(changed, batch), predict(batch)) < 1e-4
    size = next(file.stat().st_size for file in predict.files if file.name == WEIGHTS)
    bits = sum(4 if given.get("bits", 4) <= 4 else 8 for given in BLOCKS)
    assert size < 256 * 256 * (bits + len(BLOCKS)) / 8
