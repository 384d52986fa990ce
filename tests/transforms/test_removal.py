"""Units taken out of models: what is left computes what it should, runs, trains and is traced again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flyweight.analysis.coupling import Coupling, Group, Place, couple
from flyweight.errors import UsageError
from flyweight.inputs.check import run
from flyweight.runtimes._structure import leaves
from flyweight.testing.families import FAMILIES, family, pictures
from flyweight.testing.zoo import ZOO
from flyweight.transforms._removal import check, proven, refuted, removed, silenced

GROUPS = {
    "vgg": 3,
    "resnet": 4,
    "densenet": 5,
    "inception": 5,
    "shufflenet": 3,
    "unet": 4,
    "squeeze_excite": 3,
    "grouped": 2,
}
"""How many groups each family has; all of them can be removed."""


def some(group: Group, share: float) -> list[int]:
    """All units but a share of them, spread."""
    gone = {int(place) for place in torch.linspace(0, group.units - 1, max(1, int(group.units * share)))}
    return [unit for unit in range(group.units) if unit not in gone][: group.units] or [0]


def traced(model: nn.Module, batch: object) -> Coupling:
    return proven(model, couple(model, batch), batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_lose_parts_of_every_group(name: str) -> None:
    model, batch = family(name), pictures(2)
    coupling = traced(model, batch)
    assert len(coupling.groups) == GROUPS[name]
    for share in (0.1, 0.5):
        kept = {group.name: some(group, share) for group in coupling.groups}
        small = removed(model, coupling.groups, kept)
        wanted = run(silenced(model, coupling.groups, kept), pictures(5))
        assert torch.allclose(run(small, pictures(5)), wanted, rtol=1e-4, atol=1e-5)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    small.train()
    small(pictures(4)).square().mean().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in small.parameters())
    exported = torch.export.export(small.eval(), (batch,), strict=False).module()
    assert torch.allclose(exported(batch), run(small, batch), atol=1e-6)


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_whatever_is_proven_fits_all_examples_of_the_zoo(entry) -> None:
    model = copy.deepcopy(entry.build()).eval()
    examples = entry.examples()
    coupling = traced(model, examples[0])
    kept = {group.name: some(group, 0.5) for group in coupling.groups}
    small = removed(model, coupling.groups, kept)
    for batch in examples:
        for one, other in zip(leaves(run(small, batch)), leaves(run(model, batch)), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert "bfloat16" in entry.traits or refuted(model, coupling.groups, kept, batch) == ""


def test_what_modules_say_of_their_sizes_is_true() -> None:
    model = family("grouped")
    coupling = traced(model, pictures(2))
    small = removed(model, coupling.groups, {"conv:channels": [0, 2], "groups:channels": [1, 3, 4]})
    assert (small.conv.out_channels, small.norm.num_groups, small.norm.num_channels) == (8, 2, 8)
    assert (small.groups.groups, small.groups.in_channels, small.groups.out_channels) == (2, 8, 6)
    assert small.head.in_features == 6
    assert (model.norm.num_groups, model.groups.groups) == (4, 4)


def test_tied_weights_stay_tied_and_layers_that_run_twice_are_cut_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.same = nn.Linear(6, 6)
            self.same.weight = self.again.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.again(torch.relu(self.first(x))))
            return self.last(torch.relu(self.same(torch.relu(self.again(x)))))

    model, batch = Twice().eval(), torch.randn(3, 4)
    coupling = traced(model, batch)
    small = removed(model, coupling.groups, {coupling.groups[0].name: [0, 1, 5]})
    assert small.same.weight is small.again.weight
    assert small.again.weight.shape == (3, 3)


def test_a_wrong_group_is_refuted_with_the_distance() -> None:
    model, batch = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 4)
    (group,) = couple(model, batch).groups
    own, reader = group.places[:2], Place("2.weight", 1, 6, ((3, 1, 6, 1),))  # as many columns go, but others
    wrong = Group(group.name, group.kind, 3, (*own, reader))
    reason = refuted(model, [wrong], {group.name: [0, 1]}, batch)
    assert "from where it should be" in reason
    assert proven(model, Coupling((wrong,)), batch).fixed[group.name]


def test_a_group_whose_removal_does_not_run_is_fixed_with_the_reason() -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.one(x))
            if y.shape[1] != 6:
                raise ValueError("six are needed")
            return self.two(y)

    coupling = traced(Checked().eval(), torch.randn(2, 4))
    assert coupling.groups == ()
    assert "six are needed" in coupling.fixed["one:neurons"]


@pytest.mark.parametrize("units", [[], [7], [-1]])
def test_units_must_be_the_groups_own_and_some_must_stay(units: list[int]) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    groups = couple(model, torch.randn(2, 4)).groups
    with pytest.raises(UsageError, match="some must stay"):
        removed(model, groups, {"0:neurons": units})
    with pytest.raises(UsageError, match="one of the model's"):
        removed(model, groups, {"1:neurons": [0]})


def test_groups_of_another_model_are_refused() -> None:
    model, other = (nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, 3)) for n in (6, 8))
    groups = couple(model, torch.randn(2, 4)).groups
    check(model, groups)
    with pytest.raises(UsageError, match="one of the model's"):
        check(other, groups)


def test_half_precision_is_proven_in_float32() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).bfloat16()
    coupling = traced(model, torch.randn(2, 4).bfloat16())
    assert len(coupling.groups) == 1
    assert removed(model, coupling.groups, {"0:neurons": [1, 2]})[0].weight.dtype == torch.bfloat16
