"""PyTorch itself, eager and compiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from runtimes import nets
from torch import nn

from flyweight.records import Step
from flyweight.runtimes import torch as eager
from flyweight.runtimes import torch_compile


def test_eager_runs_the_model_and_stores_tied_weights_once(tmp_path: Path) -> None:
    predict = eager.prepare(nets.words(), nets.TEXTS, tmp_path)
    with torch.no_grad():
        wanted = nets.words()(**nets.TEXTS[0]).logits
    assert torch.equal(predict(nets.TEXTS[0]).logits, wanted)
    assert not predict(nets.TEXTS[0]).logits.requires_grad
    tensors = sum(p.numel() * 4 for p in nets.words().parameters())
    assert tensors <= predict.bytes <= tensors + 2000


@pytest.mark.parametrize("batch", [torch.ones(2, 4), (torch.ones(2, 4),), {"input": torch.ones(2, 4)}])
def test_every_form_of_batch(batch: object) -> None:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        assert torch.equal(eager.caller(layer)(batch), layer(torch.ones(2, 4)))


def test_integer_plans_do_not_pay_in_pytorch() -> None:
    assert "slower" in str(eager.refuse([Step("static_int8", "a")]))
    assert eager.refuse([Step("weight_only", "a"), Step("fold_batch_norm", "b")]) is None
    assert eager.available() is None


def test_compiling_without_a_compiler_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert torch_compile.available() == "no C++ compiler named no-such-compiler: install g++ or set CXX"
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert torch_compile.available() is None
