"""Healing: a smaller model learns to answer as the original did, is judged on others, and is never left worse."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from flyweight import transforms
from flyweight.analysis import gram
from flyweight.analysis.sites import analyse
from flyweight.errors import UsageError
from flyweight.inputs.check import run
from flyweight.records import Plan, Step
from flyweight.testing.families import family, pictures
from flyweight.transforms import Context, heal

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return found


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *(Block() for _ in range(2)), nn.Linear(8, 4)).eval()


def numbers(seed: int = 1) -> list[torch.Tensor]:
    return list(torch.randn(16, 16, 6, generator=torch.Generator().manual_seed(seed)))


def pruned(ratio: float = 0.5) -> tuple[Step, ...]:
    return tuple(
        Step("prune", f"{at}.up:neurons", {"ratio": ratio, "importance": "magnitude"}) for at in (1, 2)
    )


def applied(model: nn.Module, data: list[torch.Tensor], *steps: Step, say: object = None) -> nn.Module:
    found = analyse(model, data)
    paths = [site.name for site in found.sites]
    said = {} if say is None else {"say": say}
    context = Context(found.statistics, gram.lazily(model, paths, data), examples=data, **said)
    return transforms.apply(model, Plan(steps), found.sites, context)


def far(model: nn.Module, other: nn.Module, data: list[torch.Tensor]) -> float:
    x = torch.cat(data)
    return float((run(model, x) - run(other, x)).norm() / run(model, x).norm())


def test_a_healed_model_is_nearer_on_inputs_not_seen() -> None:
    model, data, others = blocks(), numbers(), numbers(2)
    small = applied(model, data, *pruned())
    healed = applied(model, data, Step("heal", "model", {"passes": 8.0, "rate": 0.01}), *pruned())
    assert [one.shape for one in healed.parameters()] == [one.shape for one in small.parameters()]
    assert far(model, healed, others) < 0.9 * far(model, small, others)


def test_what_is_never_better_on_the_examples_kept_apart_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, said = blocks(), numbers(), list[str]()
    small = applied(model, data, *pruned(0.25))
    errors = itertools.count(1.0)
    monkeypatch.setattr(heal, "mean", lambda loss, kept: next(errors))
    healed = applied(model, data, *pruned(0.25), Step("heal", "model", {"passes": 1.0}), say=said.append)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), healed.parameters(), strict=True))
    assert "did no better" in said[0]


def test_the_same_seed_gives_the_same_model_and_the_given_ones_stay() -> None:
    model, data = blocks(), numbers()
    before = copy.deepcopy(model.state_dict())
    first, second = (
        applied(model, data, *pruned(), Step("heal", "model", {"passes": 1.0})) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert all(one.requires_grad and one.grad is None for one in first.parameters())


def test_a_convolutional_model_is_healed_and_then_quantized() -> None:
    model, data = family("resnet"), [pictures(16)]
    steps = (
        Step("prune", "second.0.0:channels", {"ratio": 0.5, "importance": "magnitude", "compensate": False}),
        Step("heal", "model", {"passes": 2.0, "rate": 0.01}),
        Step("dynamic_int8", "head", {}),
    )
    alone, healed = (applied(model, data, *some) for some in (steps[::2], steps))
    assert healed.second[0][0].out_channels == 16
    assert far(model, healed, data) < far(model, alone, data)


def test_a_model_that_answers_as_the_original_is_left_alone() -> None:
    model, said = blocks(), list[str]()
    same = applied(model, numbers(), Step("heal", "model"), say=said.append)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), model.parameters(), strict=True))
    assert not said


def test_an_artifact_is_rebuilt_without_examples() -> None:
    model = blocks()
    found = transforms.apply(model, Plan((Step("heal", "model"),)), [], Context(rebuilding=True))
    assert torch.equal(run(found, numbers()[0]), run(model, numbers()[0]))


def test_what_cannot_be_healed_is_named() -> None:
    model = blocks()
    with pytest.raises(UsageError, match="healed by examples"):
        transforms.apply(model, Plan((Step("heal", "model"),)), [], Context())
    with pytest.raises(UsageError, match="as a whole"):
        applied(model, numbers(), Step("heal", "1.up"))


@pytest.mark.parametrize(
    "options",
    [{"passes": 0.0}, {"passes": 2000.0}, {"rate": 0.0}, {"rate": 1.0}, {"seconds": 0.0}, {"seed": -1}],
)
def test_bad_options_are_refused_by_name(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        heal.Options(**options)  # type: ignore[arg-type]
