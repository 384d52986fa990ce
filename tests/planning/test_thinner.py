"""What goes of a model for a loss: which units, of which groups, and what is saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flyweight import transforms
from flyweight.analysis import fisher, gram
from flyweight.analysis.sites import analyse
from flyweight.inputs.check import run
from flyweight.planning.family import Family
from flyweight.planning.thinner import FIRST, Thinner, thinner
from flyweight.records import Plan
from flyweight.transforms import Context


class Net(nn.Module):
    """Two hidden layers of which one is mostly idle: half of its neurons are read with tiny weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 4)
        with torch.no_grad():
            self.second.weight[:, ::2] *= 1e-4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


MODEL = Net().eval()
EXAMPLES = list(torch.randn(6, 32, 8, generator=torch.Generator().manual_seed(1)))
SITES = analyse(MODEL, EXAMPLES)
PATHS = [site.name for site in SITES.sites]
CONTEXT = Context(
    SITES.statistics,
    gram.lazily(MODEL, PATHS, EXAMPLES),
    rows=fisher.lazily(MODEL, PATHS, EXAMPLES, seed=0),
    examples=EXAMPLES,
)


@pytest.fixture(scope="module")
def known() -> Thinner:
    return thinner(MODEL, MODEL, SITES.sites, CONTEXT, size=False)


def applied(known: Thinner, loss: float | None) -> nn.Module:
    return transforms.apply(MODEL, Plan(known.cut(loss)[0]), SITES.sites, CONTEXT)


def test_a_group_has_levels_at_multiples_and_keeps_all_in_the_last(known: Thinner) -> None:
    assert set(known.groups) == {"first:neurons", "second:neurons"}
    for levels in known.levels.values():
        assert [level.bytes for level in levels] == sorted({level.bytes for level in levels})
        assert len(levels) == 4
        assert levels[-1].damage == 0 == len(levels[-1].step.options)
        losses = [level.damage for level in levels]
        assert losses == sorted(losses, reverse=True)


def test_idle_units_go_first(known: Thinner) -> None:
    small = known.levels["first:neurons"][1]  # half of them stay
    kept = transforms.prune.units_of(str(small.step.options["kept"]), "")
    assert kept == list(range(1, 64, 2))
    assert small.damage < 1e-3 * known.levels["second:neurons"][1].damage


def test_the_first_attempt_saves_about_the_share_it_should(known: Thinner) -> None:
    steps, loss = known.cut()
    assert loss >= 0
    assert 1 - known.left(steps) == pytest.approx(FIRST, abs=0.1)


def test_what_is_left_is_what_the_thinned_model_multiplies(known: Thinner) -> None:
    steps, _ = known.cut(0.05)
    new = analyse(applied(known, 0.05), EXAMPLES)
    assert known.left(steps) == pytest.approx(new.macs / SITES.macs)


def test_more_loss_saves_more_and_the_prediction_is_near(known: Thinner) -> None:
    left, wanted = [], run(MODEL, EXAMPLES[0])
    for loss in (1e-4, 1e-2, 0.3):
        steps, predicted = known.cut(loss)
        assert predicted <= loss
        left.append(known.left(steps))
        gaps = [(run(applied(known, loss), x) - run(MODEL, x)).square().sum(1).mean() for x in EXAMPLES]
        found = float(torch.stack(gaps).mean()) / 2  # of a normal answer with variance 1
        assert found < 4 * predicted + 1e-6
    assert wanted.shape == (32, 4)
    assert left == sorted(left, reverse=True)
    assert left[0] > left[-1]


def test_a_thinned_family_has_its_cuts_before_all_else(known: Thinner) -> None:
    family = known.thinned(Family("plain"))
    assert family is not None
    assert family.at is not None
    plan = family.plan(())
    assert {step.method for step in plan.steps} == {"prune"}
    again = family.at(family.loss)
    assert again is not None
    assert again.plan(()) == plan
    assert known.thinned(Family("plain"), 0.0) is None


def test_without_examples_nothing_goes() -> None:
    assert not thinner(MODEL, MODEL, SITES.sites, Context(), size=True).groups
