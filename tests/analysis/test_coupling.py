"""Groups of coupled dimensions: what goes together, what stays, and why."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flyweight.analysis.coupling import Group, Place, couple, group_from_json
from flyweight.errors import UsageError
from flyweight.testing.families import family, pictures
from flyweight.testing.zoo import ZOO


def found(model: nn.Module, batch: object) -> dict[str, Group]:
    return {group.name: group for group in couple(model.eval(), batch).groups}


def names(group: Group) -> set[tuple[str, int | None]]:
    return {(place.name, place.axis) for place in group.places}


def test_neurons_between_two_layers_are_a_group_and_the_ends_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    coupling = couple(model, torch.randn(2, 4))
    (group,) = coupling.groups
    assert (group.name, group.kind, group.units) == ("0:neurons", "neurons", 6)
    assert names(group) == {("0.weight", 0), ("0.bias", 0), ("2.weight", 1)}
    assert coupling.fixed["0.weight:1"] == "it is an input or a constant of the model"
    assert coupling.fixed["2.weight:0"] == "it is an output of the model"


def test_a_residual_sum_couples_all_that_it_adds() -> None:
    groups = found(family("resnet"), pictures(2))
    stem = groups["stem.0:channels"]
    assert {
        ("stem.0.weight", 0),
        ("first.0.0.weight", 1),
        ("first.1.0.weight", 0),
        ("shortcut.0.weight", 1),
    } <= names(stem)
    assert all(place.spans == ((0, 1, 16, 1),) for place in stem.places)


def test_behind_a_concatenation_units_stand_further_on() -> None:
    group = found(family("densenet"), pictures(2))["layers.1.0:channels"]
    places = {place.name: place for place in group.places if place.axis == 1}
    assert places["layers.2.0.weight"].indices([0, 3]).tolist() == [12, 15]
    assert places["join.0.weight"].indices([1]).tolist() == [13]


def test_a_channel_that_is_flattened_takes_all_its_places() -> None:
    group = found(family("vgg"), pictures(2))["2.0:channels"]
    place = next(place for place in group.places if place.name == "5.weight")
    assert place.indices([2]).tolist() == list(range(32, 48))


def test_numbers_of_groups_are_places_too() -> None:
    group = found(family("grouped"), pictures(2))["conv:channels"]
    assert group.units == 4
    assert {("norm:num_groups", None), ("groups:groups", None)} <= names(group)


@dataclass
class Sizes:
    """A plain object with numbers, as configurations are."""

    width: int


class Configured(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.one, self.two = nn.Linear(4, sizes.width), nn.Linear(sizes.width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).view(x.shape[0], self.sizes.width))


def test_attributes_are_found_where_their_value_reaches_a_view() -> None:
    group = found(Configured(Sizes(6)), torch.randn(2, 4))["one:neurons"]
    assert (":sizes.width", None) in names(group)


def test_the_number_that_comes_from_a_shape_is_no_place() -> None:
    class Shaped(Configured):
        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            return self.two(y.view(x.shape[0], y.shape[1]))

    assert all(
        place.axis is not None for place in found(Shaped(Sizes(6)), torch.randn(2, 4))["one:neurons"].places
    )


class Fused(nn.Module):
    """One product, taken apart where sums and products of the model's own numbers say."""

    def __init__(self, wide: int, narrow: int, times: int) -> None:
        super().__init__()
        self.wide, self.narrow, self.times = wide, narrow, times
        self.one = nn.Linear(4, wide + times * narrow)
        self.two, self.three = nn.Linear(wide, 3), nn.Linear(narrow, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        end = sum((self.wide, self.times * self.narrow))
        parts = y[:, self.wide : end].view(-1, self.times, self.narrow)
        return self.two(y[:, : self.wide]) + self.three(parts).sum(1)


def test_attributes_are_found_where_a_sum_of_products_cuts() -> None:
    groups = found(Fused(6, 5, 2), torch.randn(2, 4))
    own = {
        place.name: group.units for group in groups.values() for place in group.places if place.axis is None
    }
    assert own == {":wide": 6, ":narrow": 5, ":times": 2}


def test_an_attribute_times_a_number_is_told_from_what_it_is_seen_as() -> None:
    class Threefold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.one, self.two = 5, nn.Linear(4, 30), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            a, b, c = self.one(x).view(x.shape[0], -1, 3 * self.width).chunk(3, -1)
            return self.two(a * b + c)

    groups = found(Threefold(), torch.randn(2, 4))
    (group,) = [group for group in groups.values() if (":width", None) in names(group)]
    assert group.units == 5
    assert ("two.weight", 1) in names(group)


def test_a_piece_of_no_size_holds_nothing() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            return self.two(torch.cat([torch.relu(y[..., :6]), y[..., 6:]], -1))

    assert found(Halved(), torch.randn(2, 4))["one:neurons"].units == 6


def test_layer_norms_softmax_and_lookups_hold_sizes() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Softmax(-1), nn.Linear(5, 3))
    fixed = couple(model, torch.randn(2, 4)).fixed
    assert fixed["0.weight:0"] == "a norm's statistics run over it"
    assert fixed["2.weight:0"] == "a softmax runs over it"
    table = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    assert (
        couple(table, torch.zeros(2, 3, dtype=torch.long)).fixed["0.weight:0"]
        == "it is what an index looks up"
    )


def test_a_model_that_cannot_be_traced_says_where() -> None:
    entry = next(entry for entry in ZOO if entry.name == "branching")
    coupling = couple(entry.build().eval(), entry.examples()[0])
    assert coupling.groups == ()
    assert "cannot be traced" in coupling.reason


def test_an_operation_without_a_rule_holds_what_it_touches_and_is_named() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.sort(self.one(x)).values)

    coupling = couple(Sorted(), torch.randn(2, 4))
    assert coupling.groups == ()
    assert "test_coupling.py" in coupling.unknown["sort"]
    assert coupling.fixed["one.weight:0"] == "sort has no rule"


def test_the_model_is_left_as_it_was() -> None:
    model = family("grouped")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    couple(model, pictures(2))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert type(model.norm.num_groups) is int


def test_groups_go_to_json_and_back() -> None:
    for group in couple(family("shufflenet"), pictures(2)).groups:
        assert group_from_json(json.loads(json.dumps(group.to_json())), "here") == group


@pytest.mark.parametrize(
    "place",
    [
        {"name": "a", "axis": 0, "size": 4, "spans": [[0, 1, 4, 2]]},
        {"name": "a", "axis": 0, "size": 4, "spans": [[0, 2**40, 0, 1]]},
        {"name": "a", "axis": -1, "size": 4, "spans": [[0, 1, 4, 1]]},
        {"name": "a", "axis": 0, "size": 4, "spans": [[1, 1, 4, 1]]},
        {"name": 1, "axis": 0, "size": 4, "spans": [[0, 1, 4, 1]]},
        {"name": "a", "axis": 0, "size": 4, "spans": [[0, 1]]},
        {"axis": 0},
    ],
)
def test_groups_that_cannot_be_are_refused(place: object) -> None:
    with pytest.raises(UsageError, match="group"):
        group_from_json({"name": "a:b", "kind": "b", "units": 4, "places": [place]}, "steps[0]")


def test_indices_of_several_spans() -> None:
    place = Place("a", 0, 20, ((0, 1, 4, 1), (4, 2, 8, 2)))
    assert place.indices([1, 3]).tolist() == [1, 3, 6, 7, 10, 11, 14, 15, 18, 19]
    assert np.array_equal(place.indices([0]), [0, 4, 5, 12, 13])
