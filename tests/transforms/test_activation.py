"""Activation functions give way to cheaper ones: which, and what is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flyweight import transforms
from flyweight.analysis.influence import answers_of, damage
from flyweight.errors import UsageError
from flyweight.inputs.check import run
from flyweight.records import Plan, Step
from flyweight.transforms import Context, activation

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = [torch.randn(20, 6, generator=torch.Generator().manual_seed(1))]


def model(function: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), function, nn.Linear(16, 6), nn.Dropout(), nn.Softmax(-1)).eval()


def applied(net: nn.Module, path: str, **options: object) -> nn.Module:
    plan = transforms.complete(net, Plan((Step("activation", path, options),)), Context(examples=EXAMPLES))
    return transforms.apply(net, plan, [], Context())


@pytest.mark.parametrize(
    ("function", "cheaper"),
    [(nn.SiLU(), nn.Hardswish), (nn.Sigmoid(), nn.Hardsigmoid), (nn.Tanh(), nn.Hardtanh)],
)
def test_the_function_that_changes_the_output_least_takes_its_place(function, cheaper) -> None:
    net = model(function)
    small = applied(net, "1")
    assert type(small[1]) is cheaper
    assert type(net[1]) is type(function)
    wanted = answers_of(net, EXAMPLES)
    each = activation.damages(net, "1", EXAMPLES)
    assert damage(wanted, answers_of(small, EXAMPLES)) == min(each.values())
    assert torch.equal(
        run(applied(net, "1", by="relu"), EXAMPLES[0]), run(_with(net, nn.ReLU()), EXAMPLES[0])
    )


def _with(net: nn.Sequential, function: nn.Module) -> nn.Module:
    return nn.Sequential(net[0], function, *net[2:]).eval()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("0", "holds or gives more"),
        ("3", "not each by itself"),
        ("4", "not each by itself"),
        ("7", "no module that runs"),
        ("", "no module that runs"),
    ],
)
def test_what_is_no_activation_function_is_refused(path: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        applied(model(nn.GELU()), path)


def test_what_is_cheap_already_unknown_or_without_examples_is_refused() -> None:
    with pytest.raises(UsageError, match="cheap already"):
        applied(model(nn.ReLU()), "1")
    with pytest.raises(UsageError, match="by must be"):
        applied(model(nn.GELU()), "1", by="sine")
    with pytest.raises(UsageError, match="by examples"):
        transforms.apply(model(nn.GELU()), Plan((Step("activation", "1"),)), [], Context())


def test_all_functions_of_a_model_are_proposed() -> None:
    plans = list(activation.proposals(model(nn.GELU()).train(), EXAMPLES))
    assert [[step.site for step in plan.steps] for plan in plans] == [["1"]]
    assert not list(activation.proposals(nn.Sequential(nn.Linear(6, 2), nn.ReLU()), EXAMPLES))
