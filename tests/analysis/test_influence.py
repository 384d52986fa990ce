"""Block influence, damage and reach, against plain computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from flyweight.analysis.answers import Answer
from flyweight.analysis.influence import answers_of, damage, leading, passages, reached

pytestmark = pytest.mark.usefixtures("one_thread")


class Adding(nn.Module):
    """A layer added to what it gets by name, beside something else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, weight: float, *, state: torch.Tensor) -> tuple[torch.Tensor, float]:
        return state + weight * self.layer(state), weight


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Adding(), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(0.5, state=x)[0])


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def test_influence_is_one_less_the_mean_cosine_of_in_and_output(model) -> None:
    examples = [torch.randn(2, 5, 6), torch.randn(3, 5, 6)]
    found = passages(model, examples)
    each = []
    for x in examples:
        with torch.no_grad():
            given, gave = x.double().numpy(), model.block(0.5, state=x)[0].double().numpy()
        norms = np.linalg.norm(given, axis=-1) * np.linalg.norm(gave, axis=-1)
        each.append(((given * gave).sum(-1) / norms).mean())
    block = found["block"]
    assert block.influence == pytest.approx(1 - np.mean(each), rel=1e-6)
    assert (block.source, block.elements, block.calls) == ("state", 2, 1)
    assert (found["head"].sources, found["head"].influence) == ({}, 1.0)
    assert "block.idle" not in found


def test_channels_of_pictures_stand_second() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        cosine = nn.functional.cosine_similarity(x, model(x), dim=1).mean()
    assert passages(model.eval(), [x])["0"].influence == pytest.approx(1 - float(cosine), rel=1e-4)


def test_damage_is_divergence_of_logits_and_relative_change_of_others() -> None:
    one, two = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    p, q = (np.exp(t.double().numpy()) for t in (one, two))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    divergence = (p * np.log(p / q)).sum(-1).mean()
    assert damage([Answer([one], True)], [Answer([two], True)]) == pytest.approx(divergence, rel=1e-4)
    change = float((one - two).square().sum() / one.square().sum())
    assert damage([Answer([one], False)], [Answer([two], False)]) == pytest.approx(change, rel=1e-5)
    assert damage([Answer([one], False)], [Answer([two[:1]], False)]) == math.inf
    assert damage([Answer([one], True)], [Answer([two * math.nan], True)]) == math.inf


def test_parameters_are_reached_that_the_output_depends_on(model) -> None:
    assert reached(model, torch.randn(2, 6)) == {
        "block.layer.weight", "block.layer.bias", "head.weight", "head.bias",
    }  # fmt: skip
    assert reached(nn.Identity(), torch.randn(2, 6)) == set()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_output_begins_with_a_tensor_or_does_not(model) -> None:
    x = torch.ones(2)
    assert [leading(output)[1] for output in (x, (x,), [x, None], (None, x), {"x": x}, ())] == [
        0,
        1,
        2,
        -1,
        -1,
        -1,
    ]
    assert len(answers_of(model, [torch.randn(2, 6)])[0].tensors) == 1
