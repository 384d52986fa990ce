"""How much units count, against plain computations of the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flyweight.analysis.coupling import Group, couple
from flyweight.analysis.gram import grams
from flyweight.analysis.importance import DAMPING, KINDS, SLOPES, by_slopes, local
from flyweight.errors import DataError
from flyweight.testing.families import family, pictures


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).eval()


@pytest.fixture
def examples() -> list[torch.Tensor]:
    return list(torch.randn(4, 9, 5, generator=torch.Generator().manual_seed(1)))


def unknown(site: str) -> None:
    """Nothing is known of any site."""


def only(model: nn.Module, batch: torch.Tensor) -> Group:
    (group,) = couple(model, batch).groups
    return group


def told(kind: str, model: nn.Module, examples: list[torch.Tensor], sites: list[str]) -> torch.Tensor:
    return local(kind, model, only(model, examples[0]), grams(model, sites, examples).get, unknown, 0)


def test_magnitude_is_the_sum_of_squares_of_all_that_belongs_to_a_unit(model, examples) -> None:
    wanted = model[0].weight.square().sum(1) + model[0].bias.square() + model[2].weight.square().sum(0)
    assert torch.allclose(told("magnitude", model, examples, []), wanted.double())


def test_contribution_is_the_mean_square_of_what_a_unit_gives(model, examples) -> None:
    hidden = torch.tanh(model[0](torch.cat(examples)))
    wanted = torch.stack(
        [(hidden[:, [u]] @ model[2].weight[:, [u]].T).square().sum(1).mean() for u in range(7)]
    )
    assert torch.allclose(told("contribution", model, examples, ["2"]), wanted.double(), rtol=1e-5)


def test_second_order_takes_first_what_the_others_can_best_make_up_for(model, examples) -> None:
    hidden = torch.tanh(model[0](torch.cat(examples))).detach().double()
    gram, weight = hidden.T @ hidden / len(hidden), model[2].weight.detach().double()
    gram += DAMPING * gram.diagonal().mean() * torch.eye(7)
    missed = []
    for unit in range(7):
        stay = [other for other in range(7) if other != unit]
        new = weight @ gram[:, stay] @ torch.linalg.inv(gram[stay][:, stay])
        gap = weight.clone()
        gap[:, stay] -= new
        missed.append(float((gap @ gram @ gap.T).trace()))
    found = told("second_order", model, examples, ["2"])
    assert int(found.argmin()) == missed.index(min(missed))
    assert float(found.min()) == pytest.approx(min(missed), rel=1e-4)


def test_a_unit_that_doubles_another_goes_before_a_smaller_one_of_its_own() -> None:
    """What is told apart from contribution: its twin takes over."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0])))
        model[0].weight[1] = model[0].weight[0]
        model[1].weight.fill_(1.0)
    examples = list(torch.randn(8, 50, 4))
    assert int(told("second_order", model, examples, ["1"]).argmin()) in (0, 1)
    assert int(told("contribution", model, examples, ["1"]).argmin()) in (2, 3)


@pytest.mark.parametrize("kind", SLOPES)
def test_slopes_of_a_dead_unit_are_none(model, examples, kind: str) -> None:
    with torch.no_grad():
        model[2].weight[:, 3] = 0
        model[0].weight[3], model[0].bias[3] = 0, 0
    (found,) = by_slopes(kind, model, [only(model, examples[0])], examples, seed=0)
    assert found.shape == (7,)
    if kind != "gradient":
        assert float(found[3]) == 0 == float(found.min())
    assert bool((found >= 0).all())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_units_of_convolutions_in_blocks_have_a_number_each(kind: str) -> None:
    model, batch = family("densenet"), pictures(4)
    groups = couple(model, batch).groups
    if kind in SLOPES:
        found = by_slopes(kind, model, groups, [batch], seed=0)
    else:
        gram = grams(
            model,
            [name for name, m in model.named_modules() if hasattr(m, "weight") and m.weight.ndim > 1],
            [batch],
        )
        found = [local(kind, model, group, gram.get, unknown, 0) for group in groups]
    for group, scores in zip(groups, found, strict=True):
        assert scores.shape == (group.units,)
        assert bool(torch.isfinite(scores).all())


def test_without_inputs_that_are_known_there_is_no_contribution(model, examples) -> None:
    group = only(model, examples[0])
    with pytest.raises(DataError, match="reads the group"):
        local("contribution", model, group, unknown, unknown, 0)
    with pytest.raises(DataError, match="examples"):
        by_slopes("taylor", model, [group], [], seed=0)
