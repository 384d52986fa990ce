"""Parts taken out of tiny models of transformers of many makes: what is left computes what it should, and trains."""

from __future__ import annotations

import pytest
import torch
from benchmarks._coverage_models import MAKES, built, example

from flyweight.analysis.answers import answer, vocabularies_of
from flyweight.analysis.coupling import couple
from flyweight.inputs.check import call
from flyweight.transforms._removal import proven, refuted, removed

pytestmark = pytest.mark.heavy

OTHERS = {
    "Bloom": {"neurons"},  # its positions are spread over the number of heads
    "Mamba": {"channels", "neurons"},
    "RWKV": {"neurons"},
    "ConvNext": {"neurons"},
    "ResNet": {"channels"},
    "MobileNetV2": {"channels"},
    "EfficientNet": {"channels"},
}
"""What goes from those that lose no heads."""


@pytest.mark.parametrize("name", MAKES)
def test_parts_of_transformers_go(name: str) -> None:
    model, batch = built(name), example(name)
    coupling = proven(model, couple(model, batch), batch)
    assert coupling.reason == ""
    assert OTHERS.get(name, {"heads", "neurons"}) <= {group.kind for group in coupling.groups}
    half = {group.name: range(0, group.units, 2) for group in coupling.groups}
    assert refuted(model, coupling.groups, half, batch) == ""
    small = removed(model, coupling.groups, half).train()
    loss = answer(call(small, batch), vocabularies_of(small)).tensors[0].square().mean()
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in small.parameters() if p.grad is not None)
    assert not couple(small.eval(), batch).reason
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
