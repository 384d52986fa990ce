"""A layer has another's weight, times factors: which one, how near it comes, what is stored, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flyweight import transforms
from flyweight.analysis import gram
from flyweight.analysis.sites import analyse
from flyweight.errors import UsageError
from flyweight.inputs.check import run
from flyweight.records import Plan, Step
from flyweight.runtimes._state import unique_state
from flyweight.transforms import Context, QuantizedLayer, share

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model() -> nn.Sequential:
    """The fourth layer is the first, its rows scaled, and a little noise; the second is another."""
    torch.manual_seed(0)
    layers = [
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Linear(8, 2),
    ]
    with torch.no_grad():
        scaled = torch.rand(8, 1) + 0.5
        layers[4].weight.copy_(scaled * layers[0].weight + 0.01 * torch.randn(8, 8))
    return nn.Sequential(*layers).eval()


@pytest.fixture
def examples() -> list[torch.Tensor]:
    return list(torch.randn(4, 30, 8, generator=torch.Generator().manual_seed(1)))


def applied(model: nn.Module, plan: Plan, examples: list[torch.Tensor]) -> nn.Module:
    found = analyse(model, examples)
    known = gram.lazily(model, [site.name for site in found.sites], examples)
    return transforms.apply(model, plan, found.sites, Context(found.statistics, known, examples=examples))


def test_the_layer_most_alike_is_found_and_stored_once(model, examples, tmp_path) -> None:
    plan = transforms.complete(model, Plan((Step("share", "4"),)), Context(examples=examples))
    assert plan.steps[0].options["of"] == "0"
    small = applied(model, plan, examples)
    assert small[4].inner.weight is small[0].weight
    gap = (run(small, examples[0]) - run(model, examples[0])).norm() / run(model, examples[0]).norm()
    assert gap < 0.05
    sizes = []
    for one in (model, small):
        save_file(unique_state(one), tmp_path / "weights")
        sizes.append(sum(tensor.numel() for tensor in unique_state(one).values()))
    assert sizes[0] - sizes[1] == 64 - 8


def test_the_factors_are_those_of_least_squares_on_the_inputs(model, examples) -> None:
    plan = Plan((Step("share", "4", {"of": "2", "threshold": -1.0}),))
    small = applied(model, plan, examples)
    x = torch.cat(examples)
    with torch.no_grad():
        inputs = model[:4](x)
        wanted, given = inputs @ model[4].weight.T, inputs @ model[2].weight.T
    best = [torch.linalg.lstsq(given[:, [o]], wanted[:, [o]]).solution.item() for o in range(8)]
    assert torch.allclose(small[4].scale.detach(), torch.tensor(best), rtol=1e-3)


def test_a_shared_weight_is_quantized_once_for_all_who_read_it(model, examples) -> None:
    plan = Plan((Step("share", "4"), Step("weight_only", "0", {"bits": 8})))
    small = applied(model, plan, examples)
    assert isinstance(small[4].inner, QuantizedLayer)
    assert small[4].inner.integers.data_ptr() == small[0].integers.data_ptr()
    with pytest.raises(UsageError, match="a step's site must be a layer"):
        applied(model, Plan((Step("share", "4"), Step("weight_only", "4", {"bits": 8}))), examples)


def test_a_completed_plan_is_rebuilt_without_data(model, examples) -> None:
    plan = transforms.complete(model, Plan((Step("share", "4"),)), Context(examples=examples))
    small = applied(model, plan, examples)
    fresh = transforms.apply(copy.deepcopy(model), plan, [], Context(rebuilding=True))
    fresh.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(run(fresh, examples[0]), run(small, examples[0]))


def test_channels_of_convolutions_are_scaled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).eval()
    with torch.no_grad():
        model[2].weight.copy_(model[0].weight * torch.tensor([1.0, -2.0, 0.5, 3.0])[:, None, None, None])
    examples = [torch.randn(2, 4, 6, 6)]
    small = applied(model, Plan((Step("share", "2"),)), examples)
    assert torch.allclose(run(small, examples[0]), run(model, examples[0]), atol=1e-5)
    assert share.likeness(model, "2", "0", Context()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("site", "options", "words"),
    [
        ("2", {}, "must be as alike as 0.9"),
        ("0", {}, "no other of its shape"),
        ("6", {}, "no other of its shape"),
        ("6", {"of": "0"}, "of the same kind and shape"),
        ("2", {"of": "4"}, "an earlier layer"),
        ("1", {}, "with weights of their own"),
        ("4", {"threshold": 2.0}, "threshold"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_the_reason(model, examples, site, options, words) -> None:
    with pytest.raises(UsageError, match=words):
        applied(model, Plan((Step("share", site, options),)), examples)


def test_tied_weights_are_not_given_away(examples) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    model[1].weight = model[2].weight
    with pytest.raises(UsageError, match="with weights of their own"):
        applied(model, Plan((Step("share", "2", {"threshold": -1.0}),)), examples)
