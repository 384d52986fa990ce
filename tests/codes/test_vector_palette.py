"""Palettes of vectors: the nearest one by trying all, the stored bits one by one, and tables that are worth their bytes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from codes import slow
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.codes import _vectors, integer, palette, vector_palette
from flyweight.codes.vector_palette import Options
from flyweight.errors import UsageError
from flyweight.testing.conformance import check_code, failures

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Options(bits=2, width=2)
PAIR = st.tuples(st.floats(-2, 2, width=16), st.floats(-2, 2, width=16))


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def loss(weight: torch.Tensor, options: Options, energy: torch.Tensor | None = None) -> float:
    grid = vector_palette.fit(weight, options, energy)
    square = (grid.values(grid.nearest(weight, energy=energy)).double() - weight.double()).square()
    return float((square if energy is None else square * energy).sum())


@pytest.mark.heavy
@pytest.mark.parametrize(
    "options", [Options(bits=3, width=4), Options(bits=2, width=2, table="float32")], ids=str
)
def test_settings_that_are_no_levels_keep_the_contract_too(options: Options) -> None:
    assert not failures(check_code("vector_palette", [options]))


@given(
    st.lists(PAIR, min_size=1, max_size=12), st.lists(PAIR, min_size=1, max_size=6),
    st.lists(st.floats(0.125, 4, width=16), min_size=24, max_size=24),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_no_vector_of_the_table_is_nearer(
    points: list[tuple[float, float]], table: list[tuple[float, float]], weights: list[float]
) -> None:
    counts = [weights[2 * at : 2 * at + 2] for at in range(len(points))]
    found = _vectors.nearest(torch.tensor(points), torch.tensor(counts), torch.tensor(table)).tolist()
    for point, count, index in zip(points, counts, found, strict=True):
        apart = [sum(c * (a - b) ** 2 for c, a, b in zip(count, point, one, strict=True)) for one in table]
        assert apart[index] <= min(apart) + 1e-4


def test_points_that_count_nothing_and_equals_are_told() -> None:
    table = torch.tensor([[3.0, 3.0], [1.0, 1.0], [1.0, 1.0]])
    assert _vectors.nearest(torch.ones(2, 2), torch.tensor([[0.0, 0.0], [1.0, 0.0]]), table).tolist() == [
        1,
        1,
    ]


@given(st.lists(PAIR, min_size=1, max_size=8), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_few_distinct_vectors_are_met_exactly(points: list[tuple[float, float]], seed: int) -> None:
    every = torch.tensor(points).repeat(3, 1)
    table = _vectors.centres(every, torch.ones_like(every), 8, seed)
    assert torch.allclose(table[_vectors.nearest(every, None, table)], every, atol=2e-3)


def test_the_centres_of_clusters_are_their_weighted_means() -> None:
    points = normal(300, 2) / 10 + torch.tensor([[5.0, 0.0], [-5.0, 1.0], [0.0, 9.0]]).repeat_interleave(
        100, 0
    )
    counts = normal(300, 2, 1).square() + 0.1
    found = _vectors.centres(points, counts, 3, 0)
    for part, count in zip(points.split(100), counts.split(100), strict=True):
        mean = (part * count).sum(0) / count.sum(0)
        assert float((found - mean).abs().sum(1).min()) < 1e-4


@pytest.mark.parametrize(
    ("bits", "width", "most"), [(2, 2, 0.112), (3, 2, 0.0325), (2, 4, 0.100), (1, 8, 0.31)]
)
def test_a_normal_weight_is_met_better_than_any_single_entries_could_be(
    bits: int, width: int, most: float
) -> None:
    """0.3634, 0.1175 and 0.0345 are what the best table of numbers leaves at 1, 2 and 3 bits (Max, 1960)."""
    weight = normal(200, 1000)
    assert (
        loss(weight, Options(bits=bits, width=width, table="float32")) / float(weight.square().sum()) < most
    )


def test_at_equal_bits_it_leaves_less_than_integers_and_single_entries() -> None:
    weight, energy = normal(256, 1024), torch.exp(normal(1, 1024, 1)[0])
    even = integer.Options(bits=2, group=64, scale="float16")
    grid = integer.fit(weight, even, energy)
    lone = palette.fit(weight, palette.Options(bits=2, scaled=True), energy)
    others = [float(((g.values(g.nearest(weight)) - weight).square() * energy).sum()) for g in (grid, lone)]
    assert vector_palette.nbytes(256, 1024, Options()) < integer.nbytes(256, 1024, even)
    assert loss(weight, Options(), energy) < 0.85 * min(others)


def test_energy_moves_the_table_to_where_it_counts() -> None:
    weight = normal(64, 64)
    energy = torch.ones(64) * 1e-3
    energy[::4] = 1.0
    assert loss(weight, Options(), energy) < 0.1 * loss(weight, Options()) * float(energy.mean())


def test_the_bits_in_the_file_one_by_one() -> None:
    for options in (SMALL, Options(bits=3, width=4), Options(bits=1, width=8), Options(bits=5, width=2)):
        weight = normal(256, 24 * options.width)
        grid = vector_palette.fit(weight, options)
        integers = grid.nearest(weight)
        assert integers.shape == (256, 24)
        packed = vector_palette.store(integers, grid, options)["integers"]
        for row, own in zip(integers.tolist(), packed, strict=True):
            assert bytes(own.tolist()) == slow.bits_of(row, options.bits * options.width)


def test_values_are_the_table_times_the_scale() -> None:
    weight = normal(6, 8) * torch.logspace(-2, 2, 6)[:, None]
    grid = vector_palette.fit(weight, SMALL)
    assert grid.table is not None
    integers, values = grid.nearest(weight), grid.values(grid.nearest(weight))
    for row in range(6):
        root = math.sqrt(math.fsum(x * x for x in weight[row].tolist()) / 8)
        assert float(grid.scales[row, 0]) == pytest.approx(root, rel=1e-3)
        told = [
            x * float(grid.scales[row, 0])
            for at in integers[row].tolist()
            for x in grid.table[0, at].tolist()
        ]
        assert values[row].tolist() == pytest.approx(told)


def test_a_channel_of_zeros_stays_so_and_tables_are_half_numbers() -> None:
    weight = normal(6, 64) + 4
    weight[4] = 0
    grid = vector_palette.fit(weight, SMALL)
    assert grid.table is not None
    assert torch.equal(grid.table.half().float(), grid.table)
    assert not grid.values(grid.nearest(weight))[4].any()


def test_a_seed_gives_the_same_sample_of_a_large_weight_and_another_seed_another() -> None:
    weight = normal(300, 512)
    tables = [vector_palette.fit(weight, Options(bits=2, width=2, seed=seed)).table for seed in (0, 0, 1)]
    assert all(table is not None for table in tables)
    assert torch.equal(tables[0], tables[1])  # type: ignore[arg-type]
    assert not torch.equal(tables[0], tables[2])  # type: ignore[arg-type]


def test_what_half_tables_cannot_hold() -> None:
    weight = normal(8, 64) * 1e6
    with pytest.raises(UsageError, match=r"65,504.*choose float32"):
        vector_palette.fit(weight, SMALL)
    assert loss(weight, Options(bits=2, width=2, table="float32")) < 0.2 * float(weight.square().sum())


def test_a_grid_of_another_code_is_not_stored() -> None:
    weight = normal(8, 64)
    grid = vector_palette.fit(weight, SMALL)
    for other in (dataclasses.replace(grid, table=None), palette.fit(weight, palette.Options())):
        with pytest.raises(UsageError, match="must have a table of vectors of 2"):
            vector_palette.store(other.nearest(weight).clamp(0, 15), other, SMALL)


def test_bytes_by_hand() -> None:
    assert vector_palette.nbytes(12, 64, Options()) == 12 * 16 + 256 * 4 * 2 + 12 * 2
    assert (
        vector_palette.nbytes(12, 64, Options(bits=3, width=2, table="float32"))
        == 12 * 24 + (64 * 2 + 12) * 4
    )


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((6, 66), Options(), "its 66 inputs do not divide into vectors of 4"),
        ((6, 1), SMALL, "its 1 inputs do not divide into vectors of 2"),
        ((2, 8), Options(), "it would take 2,056 bytes, as float32 it takes 64"),
        ((0, 8), Options(), "no entries"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(shape: tuple[int, int], options: Options, reason: str) -> None:
    assert reason in str(vector_palette.refuse(*shape, options))


@pytest.mark.parametrize(
    "wrong",
    [{"bits": 0}, {"bits": 7, "width": 2}, {"bits": 4}, {"width": 3}, {"table": "e8m0"}, {"seed": -1}],
    ids=str,
)
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="must be"):
        Options(**wrong)  # type: ignore[arg-type]
