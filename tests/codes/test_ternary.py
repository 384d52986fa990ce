"""Ternary scales against the trial of every set of entries that may be not zero."""

from __future__ import annotations

import math

import pytest
import torch
from codes import slow
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.codes import ternary
from flyweight.codes.ternary import Options
from flyweight.errors import UsageError
from flyweight.testing.conformance import check_code, failures

pytestmark = pytest.mark.usefixtures("one_thread")

MORE = (Options(group="tensor"), Options(group="tensor", scale="float16"), Options(group=16))


def loss(weight: torch.Tensor, options: Options, energy: torch.Tensor | None = None) -> float:
    grid = ternary.fit(weight, options, energy)
    square = (grid.values(grid.nearest(weight)).double() - weight.double()).square()
    return float((square if energy is None else square * energy).sum())


@pytest.mark.parametrize("options", MORE, ids=str)
def test_settings_that_are_no_levels_keep_the_contract_too(options: Options) -> None:
    assert not failures(check_code("ternary", [options]))


@given(
    st.lists(st.tuples(st.floats(-100, 100, width=32), st.floats(0, 10, width=32)), min_size=4, max_size=8),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_set_of_entries_does_better(pairs: list[tuple[float, float]], weighed: bool) -> None:
    weight = torch.tensor([[x for x, _ in pairs]])
    energy = torch.tensor([c for _, c in pairs])
    if not weighed or float(energy.sum()) == 0:
        energy = torch.ones(len(pairs))
    wanted = slow.best_ternary(weight[0].tolist(), energy.tolist())
    largest = float((weight.double().square() * energy).sum())
    assert loss(weight, Options(), energy) <= wanted * (1 + 1e-5) + 1e-6 * largest + 1e-30


@pytest.mark.parametrize("group", [None, 16, "tensor"])
def test_groups_are_found_one_by_one(group: int | str | None) -> None:
    weight = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    energy = torch.linspace(0.5, 1.5, 32)
    parts = slow.groups(weight, energy, group)
    grid = ternary.fit(weight, Options(group=group), energy)
    for index, (entries, counts) in enumerate(parts):
        order = sorted(range(len(entries)), key=lambda i: -abs(entries[i]))
        runs = [order[:k] for k in range(1, len(order) + 1)]
        best = max(
            runs,
            key=lambda run: sum(counts[i] * abs(entries[i]) for i in run) ** 2 / sum(counts[i] for i in run),
        )
        scale = sum(counts[i] * abs(entries[i]) for i in best) / sum(counts[i] for i in best)
        row, column = (0, 0) if group == "tensor" else divmod(index, grid.scales.shape[1])
        assert math.isclose(float(grid.scales[row, column]), scale, rel_tol=1e-6)


def test_what_is_ternary_already_is_met_exactly() -> None:
    weight = torch.tensor([[0.5, -0.5, 0.0, 0.5, 0.0, -0.5, 0.5]])
    grid = ternary.fit(weight, Options())
    assert torch.equal(grid.values(grid.nearest(weight)), weight)
    assert ternary.store(grid.nearest(weight), grid, Options())["integers"].tolist() == [
        [2 + 0 * 3 + 1 * 9 + 2 * 27 + 1 * 81, 0 + 2 * 3]
    ]


def test_bytes_by_hand() -> None:
    assert ternary.nbytes(10, 64, Options()) == 10 * 13 + 10 * 4
    assert ternary.nbytes(10, 64, Options(group=32, scale="float16")) == 10 * 13 + 20 * 2
    assert ternary.nbytes(10, 64, Options(group="tensor")) == 10 * 13 + 4


@pytest.mark.parametrize("wrong", [{"group": 5}, {"scale": "e8m0"}], ids=str)
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="must be"):
        Options(**wrong)  # type: ignore[arg-type]


def test_channels_with_one_input_are_refused() -> None:
    assert "one input each" in str(ternary.refuse(5, 1, Options()))
    assert ternary.refuse(50, 1, Options(group="tensor")) is None
