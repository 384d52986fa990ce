"""What plans bring, as (after - before) / before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flyweight.evaluation.adjustment import improvements
from flyweight.records import Plan, Step, Task

pytestmark = pytest.mark.usefixtures("one_thread")


def test_each_plan_tells_quality_time_and_size() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 64))
    model = nn.Sequential(nn.Linear(64, 64), block, nn.Linear(64, 4))
    examples = [torch.randn(64, 64)]
    scores = iter([2.0, 1.5, 2.0])
    task = Task(name="block", model=model, examples=examples, score=lambda predict: next(scores))
    drop = Plan((Step("drop", "1", {"gives": "input", "compensate": False}),))
    shorter, same = improvements(task, [drop, Plan()], seconds=0.3)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (block, model)]
    assert shorter.quality == pytest.approx(-0.25)
    assert shorter.size == pytest.approx(-sizes[0] / sizes[1])
    assert shorter.time < -0.5
    assert (same.quality, same.size) == (0.0, 0.0)
    assert [one.options["source"] for one in shorter.plan.steps] == ["0"]
