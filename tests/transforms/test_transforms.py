"""`apply`: a new model, structure first, kind refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flyweight import transforms
from flyweight.analysis.sites import analyse
from flyweight.errors import UsageError
from flyweight.records import Plan, Step
from flyweight.transforms import Context, QuantizedLayer, apply, check, plain_site, substitute


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    ).eval()


SITES = [plain_site(net(), path) for path in ("0", "4")]
QUANTIZE = [Step("static_int8", "0"), Step("weight_only", "4")]
FOLD = Step("fold_batch_norm", "0", {"norm": "1"})


def test_structure_comes_first_whatever_the_order_of_the_steps() -> None:
    x = torch.randn(2, 3, 5, 5)
    seen = Context(analyse(apply(net(), Plan((FOLD,)), SITES, Context()), [x]).statistics)
    first, last = (apply(net(), Plan(steps), SITES, seen) for steps in ((FOLD, *QUANTIZE), (*QUANTIZE, FOLD)))
    assert torch.equal(first(x), last(x))
    assert isinstance(first[0], QuantizedLayer)
    assert isinstance(first[1], nn.Identity)


def test_the_model_is_not_changed_and_comes_back_in_eval_mode() -> None:
    model = net().train()
    found = apply(model, Plan(tuple(QUANTIZE)), SITES, Context())
    assert model.training
    assert isinstance(model[0], nn.Conv2d)
    assert not any(module.training for module in found.modules())


def test_an_empty_plan_is_a_copy() -> None:
    model = net()
    found = apply(model, Plan(), [], Context())
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(found(x), model(x))
    assert found is not model


def test_modules_that_are_shared_stay_shared() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(4, 4)})
    new = nn.Linear(4, 4)
    found = substitute(model, {"a": new})
    assert found["a"] is found["b"] is new
    assert found["c"] is not model["c"]


def test_the_model_itself_may_be_the_site() -> None:
    layer = nn.Linear(16, 4).eval()
    found = apply(layer, Plan((Step("weight_only", ""),)), [plain_site(layer, "")], Context())
    assert isinstance(found, QuantizedLayer)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([Step("weight_onli", "4")], ["unknown method", "did you mean weight_only"]),
        ([Step("weight_only", "nowhere")], ["'nowhere'", "steps[0]", "2 sites"]),
        (
            [Step("weight_only", "4", {"bitz": 4})],
            ["unknown option", "'bitz'", "did you mean bits", "steps[0].options"],
        ),
        ([Step("weight_only", "4", {"bits": "4"})], ["bits must be int", "str '4'"]),
        ([Step("weight_only", "4", {"bits": 7})], ["bits must be one of 8, 6", "7", "steps[0].options.bits"]),
        ([Step("weight_only", "4", {"bits": True})], ["bits must be int", "bool True"]),
        (
            [Step("weight_only", "4"), Step("static_int8", "4")],
            ["one step of each stage", "two for 4", "steps[1]"],
        ),
        ([Step("weight_only", "4", {"bits": 4, "group": 32})], ["weight_only does not fit 4", "36 inputs"]),
        ([Step("dynamic_int8", "0")], ["dynamic_int8 does not fit 0", "static_int8"]),
        ([Step("fold_batch_norm", "0")], ["norm must be the path of a batch norm"]),
        (
            [Step("fold_batch_norm", "0", {"norm": "2"})],
            ["fold_batch_norm does not fit 0", "running statistics", "'2'"],
        ),
        ([Step("fold_batch_norm", "0", {"norm": "gone"})], ["fold_batch_norm does not fit 0", "'gone'"]),
        (
            [Step("fold_batch_norm", "4", {"norm": "1"})],
            ["fold_batch_norm does not fit 4", "only convolutions"],
        ),
    ],
)
def test_refusals_name_the_rule_the_place_and_the_way_out(steps: list[Step], words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        apply(net(), Plan(tuple(steps)), SITES, Context())
    for word in words:
        assert word in str(error.value)


def test_check_finds_what_needs_no_model() -> None:
    check(net(), Plan(tuple(QUANTIZE)), SITES)
    with pytest.raises(UsageError, match="unknown option"):
        check(net(), Plan((Step("weight_only", "4", {"x": 1}),)), SITES)
    with pytest.raises(UsageError, match="one step of each stage"):
        check(net(), Plan((Step("weight_only", "4"),) * 2), SITES)


def test_every_method_keeps_the_contract_s_form() -> None:
    from flyweight import discover

    for name, method in discover.methods("transforms").items():
        assert "arXiv" in (method.__doc__ or ""), name
        for part in ("Options", "levels", "refuse", "cut" if name in transforms.STRUCTURE else "replace"):
            assert hasattr(method, part), f"{name} has no {part}"
    assert {*transforms.ORDER, *transforms.STRUCTURE} <= set(discover.methods("transforms"))


class Shared(nn.Module):
    """A lookup and two products with one weight, one of them with a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.one, self.two = (
            nn.Embedding(16, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 16, bias=False),
        )
        self.one.weight = self.two.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.two(torch.tanh(self.one(self.embed(tokens))))
        return found


@pytest.mark.parametrize("method", ["weight_only", "dynamic_int8", "static_int8"])
def test_a_step_at_a_tied_weight_changes_every_module_that_holds_it_once(method: str) -> None:
    model, tokens = Shared(), torch.arange(16).reshape(2, 8)
    seen = analyse(model, [tokens])
    found = apply(model, Plan((Step(method, "one"),)), seen.sites, Context(seen.statistics))
    layers = [found.embed, found.one, found.two]
    assert all(isinstance(layer, QuantizedLayer) for layer in layers)
    assert len({layer.integers.data_ptr() for layer in layers}) == 1
    assert [layer.activations == "float" for layer in layers] == [True, *[method == "weight_only"] * 2]
    with torch.no_grad():
        assert float((found(tokens) - model(tokens)).norm() / model(tokens).norm()) < 0.05
    same = found.embed(tokens)
    assert torch.equal(same, found.one._decoded()[tokens])


def test_a_method_that_would_untie_a_weight_is_refused() -> None:
    model = Shared()
    site = plain_site(model, "one")
    with pytest.raises(UsageError, match="must stay tied, got with embed, two"):
        transforms.with_tied(model, site, {"one": nn.Linear(16, 16)})
    assert transforms.with_tied(model, site, {"other": nn.Identity()}).keys() == {"other"}


def test_rebuilding_ties_as_the_first_time() -> None:
    model = Shared()
    plan = Plan((Step("weight_only", "one", {"bits": 4}),))
    seen = analyse(model, [torch.arange(16)[None]])
    first = apply(model, plan, seen.sites, Context(seen.statistics))
    fresh = apply(Shared(), plan, [plain_site(Shared(), "one")], Context(rebuilding=True))
    fresh.load_state_dict(first.state_dict())
    tokens = torch.arange(5)[None]
    assert fresh.embed.integers is fresh.two.integers
    assert torch.equal(first(tokens), fresh(tokens))
