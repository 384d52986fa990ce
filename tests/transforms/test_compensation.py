"""What makes up for units that went: against plain regressions, behind one another, in every kind of layer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from flyweight.analysis import gram
from flyweight.analysis.gram import Moments
from flyweight.analysis.sites import analyse
from flyweight.transforms import Context, _compensation
from flyweight.transforms._compensation import compensated
from flyweight.transforms._copies import view
from flyweight.transforms._sequential import in_order

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(*shape: int, count: int = 8, seed: int = 1) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=source) for _ in range(count)]


def known(model: nn.Module, data: Sequence[torch.Tensor]) -> Context:
    found = analyse(model, data)
    paths = [site.name for site in found.sites]
    return Context(found.statistics, gram.lazily(model, paths, data), examples=data)


def without(model: nn.Module, places: dict[str, dict[int, list[int]]]) -> nn.Module:
    """A copy in which some indices of some tensors are zero."""
    silent = copy.deepcopy(model)
    held = {**dict(silent.named_parameters()), **dict(silent.named_buffers())}
    with torch.no_grad():
        for name, axes in places.items():
            for axis, gone in axes.items():
                held[name].index_fill_(axis, torch.tensor(gone), 0)
    return silent


def made_up(
    model: nn.Module, data: Sequence[torch.Tensor], places: dict[str, dict[int, list[int]]]
) -> tuple[nn.Module, nn.Module]:
    """The model without what is at the places, and the one that makes up for it, both in the old shapes."""
    silent, held = without(model, places), {**dict(model.named_parameters()), **dict(model.named_buffers())}
    stay = {
        name: {
            axis: torch.tensor([i for i in range(held[name].shape[axis]) if i not in gone])
            for axis, gone in axes.items()
        }
        for name, axes in places.items()
    }
    found = copy.deepcopy(silent)
    values = compensated(model, silent, stay, stay, known(model, data))
    tensors = {**dict(found.named_parameters()), **dict(found.named_buffers())}
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)
    return silent, found


def far(model: nn.Module, other: nn.Module, data: Sequence[torch.Tensor]) -> float:
    with torch.no_grad():
        pairs = [(model(x), other(x)) for x in data]
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(
        float(a.square().sum()) for a, _ in pairs
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_a_deep_model_is_made_up_for_layer_behind_layer() -> None:
    """Each layer is the ridge regression of the original's output on the inputs behind the layers before it."""
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).eval()
    data, gone = numbers(64, 6), [1, 4, 7]
    places = {name: {0: gone} for name in ("0.weight", "0.bias", "2.bias")}
    places |= {"2.weight": {0: gone, 1: gone}, "4.weight": {1: gone}}
    silent, found = made_up(model, data, places)
    kept = [i for i in range(12) if i not in gone]
    x = torch.cat(data)
    with torch.no_grad():
        for at, columns in ((2, kept), (4, kept[:-2])):
            before = found[:at](x)[:, columns]
            some = kept[:-2] if at == 2 else [0, 1, 2]
            wanted = model[: at + 1](x)[:, some]
            design = torch.cat([before, torch.ones(len(x), 1)], 1)
            best = (wanted - design @ torch.linalg.lstsq(design, wanted).solution).square().mean()
            own = (wanted - found[: at + 1](x)[:, some]).square().mean()
            assert best <= own * 1.0001
            assert own < 1.02 * best
    assert far(model, found, numbers(64, 6, seed=2)) < 0.5 * far(model, silent, numbers(64, 6, seed=2))


def test_what_went_stays_zero_and_layers_before_it_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    places = {"1.weight": {0: [2]}, "1.bias": {0: [2]}, "3.weight": {1: [2]}}
    _, found = made_up(model, numbers(32, 6), places)
    assert torch.equal(found[0].weight, model[0].weight)
    assert not found[1].weight[2].any()
    assert found[1].bias[2] == 0
    assert not found[3].weight[:, 2].any()


def test_a_batch_norm_takes_over_the_mean_of_a_convolution_without_a_bias() -> None:
    """Inputs of the second convolution have means; without centring, what goes would leave one behind."""
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    ).eval()
    nn.init.uniform_(model[3].running_var, 0.5, 2.0)
    nn.init.normal_(model[3].running_mean)
    places = {"0.weight": {0: [0, 3, 5]}, "0.bias": {0: [0, 3, 5]}, "2.weight": {1: [0, 3, 5]}}
    data = numbers(4, 2, 6, 6)
    _, found = made_up(model, data, places)
    with torch.no_grad():
        wanted, own = (torch.cat([one[:4](x) for x in data]) for one in (model, found))
    assert torch.allclose(wanted.mean((0, 2, 3)), own.mean((0, 2, 3)), atol=1e-4)
    assert not torch.equal(found[3].running_mean, model[3].running_mean)
    assert torch.equal(found[3].running_var, model[3].running_var)


def test_a_grouped_convolution_is_fitted_group_by_group() -> None:
    """Against plain regressions of what each group gave on what is left of its own inputs."""
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2)).eval()
    places = {"0.weight": {0: [1, 5]}, "0.bias": {0: [1, 5]}, "2.weight": {1: [1]}}
    data = numbers(8, 2, 7, 7)
    silent, found = made_up(model, data, places)
    with torch.no_grad():
        inputs = torch.cat([model[:2](x) for x in data]).movedim(1, -1).reshape(-1, 8)
        wanted, own = (
            torch.cat([one(x) for x in data]).movedim(1, -1).reshape(-1, 4) for one in (model, found)
        )
        for group, columns in enumerate(([0, 2, 3], [4, 6, 7])):
            design = torch.cat([inputs[:, columns], torch.ones(len(inputs), 1)], 1)
            outputs = slice(2 * group, 2 * group + 2)
            best = wanted[:, outputs] - design @ torch.linalg.lstsq(design, wanted[:, outputs]).solution
            error = (wanted[:, outputs] - own[:, outputs]).square().mean()
            assert best.square().mean() <= error * 1.0001
            assert error < 1.02 * best.square().mean()
    assert far(model, found, data) < far(model, silent, data)


class Recurrent(nn.Module):
    """A recurrent layer that reads what another layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cells, self.head = nn.Linear(5, 8), nn.GRU(8, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.cells(torch.relu(self.first(x)))[0])
        return found


def test_a_recurrent_layer_makes_up_for_its_inputs() -> None:
    model, gone = Recurrent().eval(), [0, 5]
    places = {"first.weight": {0: gone}, "first.bias": {0: gone}, "cells.weight_ih_l0": {1: gone}}
    data = numbers(8, 4, 5, count=16)
    silent, found = made_up(model, data, places)
    assert not torch.equal(found.cells.weight_ih_l0, silent.cells.weight_ih_l0)
    assert not found.cells.weight_ih_l0[:, gone].any()
    assert far(model, found, numbers(8, 4, 5, seed=3)) < far(model, silent, numbers(8, 4, 5, seed=3))


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return found


def chained() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(*(Block() for _ in range(3))), nn.Linear(8, 4)).eval()


def cut_blocks() -> dict[str, dict[int, list[int]]]:
    gone = list(range(0, 16, 3))
    places: dict[str, dict[int, list[int]]] = {}
    for at in range(3):
        places |= {
            f"1.{at}.up.weight": {0: gone},
            f"1.{at}.up.bias": {0: gone},
            f"1.{at}.down.weight": {1: gone},
        }
    return places


def test_block_by_block_is_what_the_whole_model_at_once_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = chained(), numbers(16, 4, count=16)
    silent, blockwise = made_up(model, data, cut_blocks())
    ways: list[bool] = []

    def refuse(model: nn.Module, work: object) -> None:
        ways.append(in_order(view(model, {}), work) is not None)  # type: ignore[arg-type]

    monkeypatch.setattr(_compensation, "in_order", refuse)
    _, whole = made_up(model, data, cut_blocks())
    assert ways == [True]
    for one, other in zip(blockwise.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    others = numbers(16, 4, seed=5)
    assert far(model, blockwise, others) < 0.5 * far(model, silent, others)


def test_few_examples_change_little() -> None:
    """With fewer rows than inputs a plain regression would fit noise; what is kept apart says so."""
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8)).eval()
    gone = list(range(0, 64, 2))
    places = {"0.weight": {0: gone}, "0.bias": {0: gone}, "2.weight": {1: gone}}
    silent, found = made_up(model, numbers(3, 8), places)
    others = numbers(64, 8, seed=9)
    assert far(model, found, others) < far(model, silent, others)


def test_tied_weights_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 2)).eval()
    model[2].weight = model[0].weight
    _, found = made_up(model, numbers(32, 6), {"3.weight": {1: [0]}})
    assert torch.equal(found[2].weight, model[2].weight)
    assert not torch.equal(found[3].weight[:, 1:], model[3].weight[:, 1:])


def test_moments_against_plain_means() -> None:
    model, data = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), numbers(5, 3, count=4)
    other = copy.deepcopy(model)
    nn.init.normal_(other[0].weight)
    with torch.no_grad():
        old, new = (torch.relu(one[0](torch.cat(data))).double() for one in (model, other))
    found = gram.moments(model, other, ["2"], data[:1])["2"].joined(
        gram.moments(model, other, ["2"], data[1:])["2"]
    )
    assert found.rows == 20
    wanted = Moments(new.T @ new / 20, old.T @ new / 20, new.mean(0), old.mean(0), 20)
    for name in ("gram", "cross", "mean", "before"):
        assert torch.allclose(getattr(found, name)[0], getattr(wanted, name), rtol=1e-5, atol=1e-6)


class Experts(nn.Module):
    """Rows go to one of two layers, as a gate says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(6, 12), nn.Linear(12, 2)
        self.experts = nn.ModuleList(nn.Linear(12, 3) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        to = self.gate(x).argmax(1)
        found = x.new_zeros(len(x), 3)
        for at, expert in enumerate(self.experts):
            found[to == at] = expert(x[to == at])
        return found


def test_where_models_go_other_ways_layers_make_up_for_the_original_s_inputs() -> None:
    model, data, said = Experts().eval(), numbers(32, 6), list[str]()
    gone = [0, 2, 4, 6, 8, 10]
    readers = ("gate", "experts.0", "experts.1")
    places = {"first.weight": {0: gone}, "first.bias": {0: gone}} | {
        f"{name}.weight": {1: gone} for name in readers
    }
    silent, stay = without(model, places), torch.tensor([1, 3, 5, 7, 9, 11])
    context = dataclasses.replace(known(model, data), say=said.append)
    kept = {name: dict.fromkeys(axes, stay) for name, axes in places.items()}
    values = compensated(model, silent, kept, kept, context)
    assert {"gate.weight", "experts.0.weight"} <= values.keys()
    assert "not behind other cuts" in said[0]
