"""Pruning by plan: units go, what is left makes up for them, and the plan alone brings the structure back."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from flyweight import stages, transforms
from flyweight.analysis import gram
from flyweight.analysis.sites import analyse
from flyweight.artifact.load import load_module, load_predictor
from flyweight.errors import UsageError
from flyweight.inputs.check import run
from flyweight.records import Goal, Plan, Step, Task
from flyweight.testing.families import family, pictures
from flyweight.transforms import Context, prune
from flyweight.transforms._removal import removed


def seen(model: nn.Module, examples: list[torch.Tensor]) -> tuple[transforms.Context, tuple]:
    found = analyse(model, examples)
    paths = [site.name for site in found.sites]
    return Context(found.statistics, gram.lazily(model, paths, examples), examples=examples), found.sites


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


@pytest.fixture
def examples() -> list[torch.Tensor]:
    return list(torch.randn(8, 32, 6, generator=torch.Generator().manual_seed(1)))


def step(**options: object) -> Plan:
    return Plan((Step("prune", "0:neurons", options),))


def test_a_share_of_the_units_goes_for_good(model, examples) -> None:
    context, sites = seen(model, examples)
    small = transforms.apply(model, step(ratio=0.5), sites, context)
    assert (small[0].weight.shape, small[2].weight.shape) == ((8, 6), (4, 8))
    assert (small[0].out_features, small[2].in_features) == (8, 8)
    assert (model[0].weight.shape, model[0].out_features) == ((16, 6), 16)


def test_the_layer_behind_makes_up_by_least_squares_with_its_bias(model, examples) -> None:
    """Against the plain regression of the old output on what is left, ridge aside."""
    context, sites = seen(model, examples)
    plan = transforms.complete(model, step(ratio=0.5), context)
    small = transforms.apply(model, plan, sites, context)
    kept = prune.units_of(plan.steps[0].options["kept"], "")
    x = torch.cat(examples)
    with torch.no_grad():
        hidden, wanted = torch.relu(model[0](x)), model(x)
        design = torch.cat([hidden[:, kept], torch.ones(len(x), 1)], 1)
        best = (wanted - design @ torch.linalg.lstsq(design, wanted).solution).square().mean()
        plain = removed(model, prune.groups(model, examples[0]).groups, {"0:neurons": kept})
        found, without = ((wanted - one(x)).square().mean() for one in (small, plain))
    assert best <= found < 1.05 * best
    assert found < 0.5 * without


def test_only_readers_of_groups_that_are_made_up_for_change() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)]
    model, data = nn.Sequential(*layers).eval(), list(torch.randn(8, 32, 6))
    context, sites = seen(model, data)
    plan = transforms.complete(
        model, Plan((Step("prune", "0:neurons", {"compensate": False}), Step("prune", "2:neurons"))), context
    )
    small = transforms.apply(model, plan, sites, context)
    first, second = (prune.units_of(step.options["kept"], "") for step in plan.steps)
    assert torch.equal(small[2].weight, model[2].weight[second][:, first])
    assert not torch.equal(small[4].weight, model[4].weight[:, second])


def test_nothing_goes_at_ratio_0_and_nothing_changes(model, examples) -> None:
    context, sites = seen(model, examples)
    same = transforms.apply(model, step(ratio=0.0), sites, context)
    assert torch.equal(run(same, examples[0]), run(model, examples[0]))


def test_the_number_that_stays_is_a_multiple(model, examples) -> None:
    context, sites = seen(model, examples)
    small = transforms.apply(model, step(ratio=0.7, multiple=4, importance="magnitude"), sites, context)
    assert small[0].out_features == 8  # 5 would stay


def test_a_completed_plan_is_applied_without_examples_and_brings_the_structure_back(examples) -> None:
    model, batch = family("shufflenet"), pictures(6)
    context, sites = seen(model, [batch])
    names = [group.name for group in prune.groups(model, batch).groups]
    plan = Plan(tuple(Step("prune", name, {"importance": "taylor", "ratio": 0.4}) for name in names))
    plan = Plan.from_json(json.loads(json.dumps(transforms.complete(model, plan, context).to_json())))
    small = transforms.apply(model, plan, sites, context)
    fresh = transforms.apply(family("shufflenet"), plan, sites, Context(rebuilding=True))
    fresh.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(run(fresh, batch), run(small, batch))
    assert run(small, pictures(2)).shape == (2, 5)


def test_layers_of_a_pruned_model_are_quantized_in_the_same_plan(examples) -> None:
    model, batch = family("resnet"), pictures(8)
    context, sites = seen(model, [batch])
    steps = (Step("prune", "second.0.0:channels", {"ratio": 0.25}), Step("dynamic_int8", "head", {}))
    small = transforms.apply(model, Plan(steps), sites, context)
    assert small.second[1][0].weight.shape[1] == 24
    assert bool(torch.isfinite(run(small, batch)).all())


def test_groups_are_named_where_one_is_unknown_or_fixed(model, examples) -> None:
    context, sites = seen(model, examples)
    with pytest.raises(UsageError, match="did you mean 0:neurons"):
        transforms.apply(model, Plan((Step("prune", "0:neuron"),)), sites, context)
    with pytest.raises(UsageError, match="one step of each stage"):
        transforms.check(model, Plan(step().steps * 2), sites)
    with pytest.raises(UsageError, match="by examples"):
        transforms.apply(model, step(), sites, Context())


@pytest.mark.parametrize(
    "options",
    [{"ratio": 1.0}, {"ratio": -0.1}, {"ratio": float("nan")}, {"importance": "size"}, {"multiple": 0},
     {"kept": "0-3"}, {"group": {}}, {"seed": -1}],
)  # fmt: skip
def test_bad_options_are_refused_when_they_are_read(model, options) -> None:
    with pytest.raises(UsageError):
        transforms.check(model, step(**options), [])


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,1", "0-99999999999", "0,,1", "-1", "²"])
def test_units_are_read_strictly(text: str) -> None:
    with pytest.raises(UsageError, match="units are written"):
        prune.units_of(text, "here")


def test_units_go_to_text_and_back() -> None:
    assert prune.text_of([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert prune.units_of("0-2,5,7-8", "") == [0, 1, 2, 5, 7, 8]


@pytest.mark.heavy
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_an_artifact_of_a_recipe_is_smaller_and_is_loaded_again(tmp_path, runtime: str) -> None:
    model, batch = family("resnet"), pictures(8)
    task = Task(name="pruned", model=model, examples=[batch], score=lambda predict: 1.0)
    recipe = Plan(
        (Step("prune", "second.0.0:channels", {"ratio": 0.5}), Step("prune", "first.0.0:channels", {}))
    )
    stages.apply(task, recipe, Goal(runtime=runtime, within=60), tmp_path / "out")
    loaded = load_module(tmp_path / "out" / "best", family("resnet"))
    assert loaded.second[0][0].out_channels == 16
    stored = sum(file.stat().st_size for file in (tmp_path / "out" / "best").glob("weights*"))
    assert stored < 0.8 * sum(4 * p.numel() for p in model.parameters())
    if runtime == "onnxruntime":
        predict = load_predictor(tmp_path / "out" / "best")
        assert torch.allclose(predict(batch), run(loaded, batch), atol=1e-4)


def test_a_completed_plan_does_not_fit_another_model(model, examples) -> None:
    context, sites = seen(model, examples)
    plan = transforms.complete(model, step(), context)
    other = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    with pytest.raises(UsageError, match=r"one of the model's"):
        transforms.apply(other, plan, sites, Context(rebuilding=True))
