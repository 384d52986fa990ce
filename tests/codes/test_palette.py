"""Palettes: k-means against the trial of every cut, tables as they are stored, and channels that must stay what they are."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from codes import slow
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.codes import _kmeans, palette
from flyweight.codes.palette import Options
from flyweight.errors import UsageError
from flyweight.testing.conformance import check_code, failures

pytestmark = pytest.mark.usefixtures("one_thread")

MORE = (Options(bits=2, rows=4), Options(bits=1, table="float32"))
ALONE = Options(bits=3, rows=1, scaled=True, table="float32")
GAUSS = {1: 0.36338, 2: 0.11748, 3: 0.034547, 4: 0.0095012, 5: 0.0025048}
"""Error of the best quantizer of a normal distribution with so many bits (Max, 1960)."""


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def loss(weight: torch.Tensor, options: Options, energy: torch.Tensor | None = None) -> float:
    grid = palette.fit(weight, options, energy)
    square = (grid.values(grid.nearest(weight)).double() - weight.double()).square()
    return float((square if energy is None else square * energy).sum())


@pytest.mark.parametrize("options", MORE, ids=str)
def test_settings_that_are_no_levels_keep_the_contract_too(options: Options) -> None:
    assert not failures(check_code("palette", [options]))


@pytest.mark.heavy
def test_a_table_per_channel_keeps_the_contract_too() -> None:
    assert not failures(check_code("palette", [ALONE]))


@given(
    st.lists(st.tuples(st.floats(-1, 1, width=16), st.floats(0, 4, width=16)), min_size=1, max_size=9),
    st.sampled_from([2, 4]), st.booleans(),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_no_cut_does_better(pairs: list[tuple[float, float]], k: int, weighed: bool) -> None:
    counts = [c if weighed else 1.0 for _, c in pairs]
    if sum(counts) == 0:
        return
    numbers = torch.tensor([[x for x, _ in pairs]])
    found = _kmeans.centres(numbers, torch.tensor([counts]) if weighed else None, k)
    assert found.shape == (1, k)
    assert torch.all(found.diff(dim=1) >= 0)
    mine = slow.error(numbers[0].tolist(), counts, found[0].tolist())
    assert mine <= slow.best_clusters(numbers[0].tolist(), counts, k) + 1e-12


def test_problems_are_solved_one_by_one() -> None:
    numbers = normal(5, 200)
    counts = normal(5, 200, 1).square()
    together = _kmeans.centres(numbers, counts, 4)
    for row in range(5):
        alone = _kmeans.centres(numbers[row : row + 1], counts[row : row + 1], 4)
        assert torch.allclose(together[row], alone[0], rtol=0, atol=1e-12)


def test_few_distinct_numbers_are_met_exactly() -> None:
    values = torch.tensor([-1.5, 0.25, 3.0, 1e-3])
    weight = values[torch.randint(0, 4, (64, 50), generator=torch.Generator().manual_seed(0))]
    weight[0, :4] = values
    for bits in (2, 3, 8):
        assert loss(weight, Options(bits=bits, table="float32")) == 0
    lone = torch.zeros(64, 100)
    lone[3, 7] = 5.0
    assert loss(lone, Options(bits=1)) == 0


@pytest.mark.parametrize("bits", GAUSS)
def test_a_normal_weight_is_met_as_well_as_can_be(bits: int) -> None:
    weight = normal(100, 1000)
    error = loss(weight, Options(bits=bits, table="float32")) / float(weight.square().sum())
    assert error == pytest.approx(GAUSS[bits], rel=0.015)


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_the_ends_of_a_heavy_tail_are_not_forgotten(bits: int) -> None:
    weight = normal(16, 256) / (normal(16, 256, 1).abs() + 0.02)
    ordered = weight.flatten().sort().values
    quantiles = ordered[:: len(ordered) // 2**bits][: 2**bits]
    naive = (quantiles - weight[..., None]).abs().amin(-1).square().sum()
    assert loss(weight, Options(bits=bits)) < 0.5 * float(naive)


def test_energy_moves_the_table_to_where_it_counts() -> None:
    weight = torch.cat((normal(16, 32) + 5, normal(16, 32) - 5), 1)
    energy = torch.cat((torch.ones(32), torch.full((32,), 1e-3)))
    table = palette.fit(weight, Options(bits=3), energy).table
    assert table is not None
    assert int((table > 0).sum()) >= 6
    assert loss(weight, Options(bits=3), energy) < loss(weight, Options(bits=3)) * float(energy.mean()) * 2


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_a_block_of_channels_has_the_table_that_it_has_alone(rows: int) -> None:
    weight, options = normal(6, 64), Options(bits=2, rows=rows)
    grid = palette.fit(weight, options)
    assert grid.table is not None
    assert grid.table.shape == (6 // rows, 4)
    for block in range(6 // rows):
        alone = palette.fit(weight[block * rows : (block + 1) * rows], Options(bits=2)).table
        assert alone is not None
        assert torch.equal(grid.table[block], alone[0])


def test_scaled_channels_share_a_table_well() -> None:
    weight = normal(8, 256) * torch.logspace(-3, 0, 8)[:, None]
    relative = []
    for options in (Options(bits=3), Options(bits=3, scaled=True)):
        grid = palette.fit(weight, options)
        square = (grid.values(grid.nearest(weight)) - weight).square().sum(1) / weight.square().sum(1)
        relative.append(float(square.max()))
    assert relative[0] > 0.5
    assert relative[1] < 0.1
    roots = palette.fit(weight, Options(scaled=True)).scales[:, 0]
    assert torch.allclose(roots, weight.square().mean(1).sqrt(), rtol=1e-3)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_channel_of_zeros_stays_so_in_its_block_alone(scaled: bool) -> None:
    weight = normal(6, 64) + 4
    weight[4] = 0
    grid = palette.fit(weight, Options(bits=2, rows=3, scaled=scaled))
    assert grid.table is not None
    assert (grid.table == 0).any(1).tolist() == [False, True]
    assert not grid.values(grid.nearest(weight))[4].any()


def test_tables_are_half_numbers_before_integers_are_picked() -> None:
    grid = palette.fit(normal(8, 64), Options())
    assert grid.table is not None
    assert torch.equal(grid.table.half().float(), grid.table)


def test_what_half_tables_cannot_hold() -> None:
    weight = normal(8, 64) * 1e6
    with pytest.raises(UsageError, match=r"65,504.*choose float32"):
        palette.fit(weight, Options())
    assert loss(weight, Options(table="float32")) < 0.02 * float(weight.square().sum())


def test_scales_of_a_palette_that_stores_none_must_be_1() -> None:
    weight = normal(8, 64)
    grid = palette.fit(weight, Options())
    with pytest.raises(UsageError, match="must be 1"):
        palette.store(grid.nearest(weight), dataclasses.replace(grid, scales=grid.scales * 2), Options())
    with pytest.raises(UsageError, match="must have a table"):
        palette.store(grid.nearest(weight), dataclasses.replace(grid, table=None), Options())


def test_bytes_by_hand() -> None:
    assert palette.nbytes(12, 63, Options()) == 12 * 32 + 16 * 2
    assert palette.nbytes(12, 63, Options(bits=3, rows=4, table="float32")) == 12 * 24 + 3 * 8 * 4
    assert palette.nbytes(12, 63, Options(bits=8, scaled=True)) == 12 * 63 + 256 * 2 + 12 * 2


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((6, 64), Options(rows=4), "its 6 output channels do not divide into blocks of 4"),
        ((6, 1), Options(scaled=True), "one input each"),
        ((2, 8), Options(bits=8), "it would take 528 bytes, as float32 it takes 64"),
        ((0, 8), Options(), "no entries"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(shape: tuple[int, int], options: Options, reason: str) -> None:
    assert reason in str(palette.refuse(*shape, options))


@pytest.mark.parametrize(
    "wrong", [{"bits": 0}, {"bits": 9}, {"rows": 0}, {"table": "e8m0"}, {"bits": True}], ids=str
)
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="must be"):
        Options(**wrong)  # type: ignore[arg-type]
