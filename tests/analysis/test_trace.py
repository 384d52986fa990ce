"""Batch norms that directly follow a convolution, and those that only seem to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flyweight.analysis.trace import trace

X = torch.randn(2, 3, 6, 6)


class Two(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.a, self.c = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(3, 4, 3, bias=False)
        self.b, self.d = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> Any:
        if self.form == "apart":
            return self.b(self.a(x)) + self.d(self.c(x))
        if self.form == "norm used twice":
            return self.b(self.a(x)) + self.b(self.c(x))
        if self.form == "conv used twice":
            return self.b(self.a(x)) + self.a(x)
        if self.form == "output seen by another":
            y = self.a(x)
            return self.b(y) + y
        if self.form == "activation between":
            return self.b(torch.relu(self.a(x)))
        return self.b(self.a(x)) if float(x.sum()) > 0 else self.a(x)


@pytest.mark.parametrize(
    ("form", "norms"),
    [
        ("apart", {"a": "b", "c": "d"}),
        ("norm used twice", {}),
        ("conv used twice", {}),
        ("output seen by another", {}),
        ("activation between", {}),
    ],
)
def test_only_a_norm_that_alone_reads_a_convolution_is_found(form: str, norms: dict[str, str]) -> None:
    assert trace(Two(form).eval(), X).norms == norms


def test_a_model_that_cannot_be_traced_says_why() -> None:
    found = trace(Two("branch").eval(), X)
    assert not found.norms
    assert "cannot be traced" in found.reason


def test_models_without_norms_are_not_traced() -> None:
    assert trace(nn.Sequential(nn.Linear(3, 3)), X).norms == {}


def test_norms_without_running_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert trace(model, X).norms == {}


@pytest.mark.parametrize("batch", [X, (X,), {"input": X}], ids=["tensor", "tuple", "dict"])
def test_every_form_of_batch_is_traced(batch: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    assert trace(model, batch).norms == {"0": "1"}
