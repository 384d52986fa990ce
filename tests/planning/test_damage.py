"""Damage of single layers: measured as it is meant, and the model is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planning.made import steps
from torch import nn

from flyweight.analysis import fisher, gram
from flyweight.analysis.sites import analyse
from flyweight.inputs.check import digest
from flyweight.planning.damage import damages, predicted, scaled
from flyweight.records import Plan, Step
from flyweight.transforms import Context, apply

DATA = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)).eval()


def test_damage_is_the_relative_squared_change_of_the_output(model: nn.Sequential) -> None:
    found = analyse(model, [DATA])
    context, chosen = Context(found.statistics), steps("0", "2", bits=4, group=32, symmetric=False)
    before, modules = digest(model.state_dict()), list(model.modules())
    result = damages(model, found.sites, chosen, context, [DATA], seconds=60)
    for name, step in chosen.items():
        with torch.no_grad():
            wanted, changed = model(DATA), apply(model, Plan((step,)), found.sites, context)(DATA)
        assert result[name] == pytest.approx(
            float((changed - wanted).square().sum() / wanted.square().sum()), rel=1e-3
        )
    assert digest(model.state_dict()) == before
    assert list(model.modules()) == modules  # the very same objects


def test_eight_bits_hurt_less_than_four(model: nn.Sequential) -> None:
    found = analyse(model, [DATA])
    results = [
        damages(
            model,
            found.sites,
            steps("0", bits=bits, symmetric=bits == 8),
            Context(found.statistics),
            [DATA],
            seconds=60,
        )
        for bits in (8, 4)
    ]
    assert 0 < results[0]["0"] < results[1]["0"] / 20


def test_sites_that_the_time_does_not_reach_are_missing(model: nn.Sequential) -> None:
    found = analyse(model, [DATA])
    assert damages(model, found.sites, steps("0", "2"), Context(found.statistics), [DATA], seconds=0) == {}


def test_a_step_that_fails_leaves_the_model_whole(model: nn.Sequential) -> None:
    class Fragile(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if type(self[0]) is not nn.Linear:
                raise RuntimeError("changed")
            return super().forward(x)

    fragile = Fragile(*model).eval()
    found = analyse(fragile, [DATA])
    with pytest.raises(RuntimeError, match="changed"):
        damages(fragile, found.sites, steps("0"), Context(found.statistics), [DATA], seconds=60)
    assert type(fragile[0]) is nn.Linear


def test_predicted_damage_is_half_the_weighed_square_of_the_outputs_change(model: nn.Sequential) -> None:
    found, names = analyse(model, [DATA]), ["0", "2"]
    grams, rows = gram.grams(model, names, [DATA]), fisher.fisher(model, names, [DATA], seed=0)
    context = Context(found.statistics, gram=grams.get, rows=rows.get)
    for site in found.sites:
        step = steps(site.name, bits=4, group=32, symmetric=False)[site.name]
        layer = apply(model, Plan((step,)), found.sites, context).get_submodule(site.name)
        with torch.no_grad():
            inputs = DATA if site.name == "0" else model[1](model[0](DATA))
            change = inputs @ (layer.weight - model.get_submodule(site.name).weight).T  # type: ignore[operator]
        slow = sum(
            float(rows[site.name][o]) * float(change[:, o].square().mean()) / 2
            for o in range(change.shape[1])
        )
        assert predicted(model, site, step, context) == pytest.approx(slow, rel=1e-4)


def test_nothing_is_predicted_where_nothing_was_seen(model: nn.Sequential) -> None:
    found = analyse(model, [DATA])
    step = steps("0", bits=4, group=32, symmetric=False)["0"]
    assert predicted(model, found.sites[0], step, Context(found.statistics)) is None


def test_one_prediction_tells_of_all_codes(model: nn.Sequential) -> None:
    for name in ("0", "2"):
        nn.init.normal_(model.get_submodule(name).weight, generator=torch.Generator().manual_seed(0))
    found = analyse(model, [DATA])
    grams, rows = (
        gram.grams(model, ["0", "2"], [DATA]),
        fisher.fisher(model, ["0", "2"], [DATA], seed=0),
    )
    context = Context(found.statistics, gram=grams.get, rows=rows.get)
    options: list[dict[str, Any]] = [
        {"bits": 8, "group": 32},
        {"code": "iq4_nl"},
        {"bits": 3, "group": 32},
        {"bits": 2, "group": 32},
    ]
    for site in found.sites:
        damages = scaled(model, site, options, context)
        wanted = [predicted(model, site, Step("weight_only", site.name, given), context) for given in options]
        assert damages == sorted(damages)
        assert damages == pytest.approx(wanted, rel=2)
        assert scaled(model, site, options, Context(found.statistics)) is None
