"""The memory probe, on models whose size is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flyweight.evaluation import memory
from flyweight.evaluation.memory import peak_memory
from flyweight.runtimes import onnxruntime
from flyweight.runtimes import torch as eager
from flyweight.runtimes._files import Predictor

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured on Linux only")
BATCH = torch.zeros(1, 512)
WEIGHTS = 4 * 512 * 4096 * 4
"""Bytes of the weights below: 34 MB."""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return nn.Sequential(
        *(layer for _ in range(2) for layer in (nn.Linear(512, 4096), nn.Linear(4096, 512)))
    ).eval()


def test_a_module_takes_its_weights_and_little_more(model: nn.Module, tmp_path: Path) -> None:
    found = peak_memory(eager.prepare(model, [BATCH], tmp_path), model, BATCH)
    assert found is not None
    assert 0.95 * WEIGHTS <= found <= 1.2 * WEIGHTS + 20e6


@pytest.mark.skipif(onnxruntime.available() is not None, reason="needs onnxruntime")
def test_a_file_takes_its_weights_and_a_runtime(model: nn.Module, tmp_path: Path) -> None:
    found = peak_memory(onnxruntime.prepare(model, [BATCH], tmp_path), model, BATCH)
    assert found is not None
    assert 0.95 * WEIGHTS <= found <= 3 * WEIGHTS + 60e6


def test_a_model_that_fails_has_no_figure() -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no")

    predictor = Predictor(runtime="torch", call=len, files=())
    assert peak_memory(predictor, Failing(), BATCH) is None


def test_a_model_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            while True:
                pass

    monkeypatch.setattr(memory, "LIMIT_SECONDS", 0.2)
    assert peak_memory(Predictor(runtime="torch", call=len, files=()), Hanging(), BATCH) is None


def test_a_file_that_cannot_be_run_has_no_figure(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    predictor = Predictor(runtime="onnxruntime", call=len, files=(tmp_path / "model.onnx",))
    assert peak_memory(predictor, nn.Identity(), BATCH) is None
