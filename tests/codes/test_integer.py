"""Integers: the scale search against a slow one in float64, what each range covers, and where the bits lie."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from codes import slow
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.codes import Grid, integer
from flyweight.codes.integer import Options
from flyweight.errors import ModelError, UsageError
from flyweight.testing.conformance import check_code, failures

pytestmark = pytest.mark.usefixtures("one_thread")

MORE = (
    Options(group="tensor"),
    Options(group="tensor", symmetric=False, bits=5),
    Options(bits=4, full=True, group=32, scale="float16"),
    Options(bits=8, reduced=True, range="minmax"),
    Options(bits=8, symmetric=False, range="percentile"),
    Options(bits=3, group=16, range="minmax", full=False),
    Options(bits=2, group=256, range="percentile", percentile=90.0),
)  # fmt: skip
GROUPS = (None, 16, "tensor")
WEIGHTS = {
    "normal": lambda: normal(3, 48),
    "heavy": lambda: normal(3, 48) * normal(3, 48, 7).abs(),
    "one row": lambda: normal(1, 16),
    "skewed": lambda: normal(2, 32) + 0.1,
    "all negative": lambda: -normal(2, 32).abs() - 1,
    "constant": lambda: torch.full((2, 32), -0.7),
    "outlier": lambda: torch.cat((torch.full((2, 1), 50.0), normal(2, 31)), 1),
    "one value": lambda: torch.nn.functional.pad(torch.ones(2, 1), (5, 26)),
}


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 10


def loss(weight: torch.Tensor, grid: Grid, energy: torch.Tensor | None = None) -> float:
    square = (grid.values(grid.nearest(weight)).double() - weight.double()).square()
    return float((square if energy is None else square * energy).sum())


def slow_best(options: Options, entries: list[float], counts: list[float]) -> float:
    """The least error over a close mesh of scales, and all zeros."""
    peak = max(abs(x) for x in entries) or 1.0
    count = options.high - options.low
    least = math.inf
    for zero in range(options.high + 1) if not options.symmetric else (0,):
        for step, sign in itertools.product(range(1, 60), (1, -1)):
            scale = sign * peak * 2.2 / count * step / 60
            if sign > 0 or options.low < -options.high:
                levels = [(q - zero) * scale for q in range(options.low, options.high + 1)]
                least = min(least, slow.error(entries, counts, levels))
    return least


@pytest.mark.parametrize("options", MORE, ids=str)
def test_settings_that_are_no_levels_keep_the_contract_too(options: Options) -> None:
    cells = list(check_code("integer", [options]))
    assert not failures(cells)
    assert sum(cell.state == "passed" for cell in cells) > 60


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_the_search_comes_near_the_best_scale(name: str, symmetric: bool, bits: int) -> None:
    weight, options = WEIGHTS[name](), Options(bits=bits, symmetric=symmetric, group=16)
    energy = torch.linspace(0.1, 3, weight.shape[1])
    found = loss(weight, integer.fit(weight, options, energy), energy / energy.mean())
    wanted = math.fsum(slow_best(options, x, c) for x, c in slow.groups(weight, energy, 16))
    assert found <= 1.05 * wanted + 1e-12


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [8, 5, 4, 2])
@pytest.mark.parametrize("scale", ["float32", "float16"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_is_never_worse_than_the_whole_range(
    name: str, group: int | str | None, bits: int, scale: str, symmetric: bool
) -> None:
    weight = WEIGHTS[name]()
    energy = torch.linspace(0, 3, weight.shape[1])
    common = {"bits": bits, "group": group, "scale": scale, "symmetric": symmetric}
    for counts in (None, energy):
        searched = loss(weight, integer.fit(weight, Options(**common), counts), counts)
        whole = loss(weight, integer.fit(weight, Options(**common, range="minmax"), counts), counts)
        assert searched <= whole * (1 + 1e-6)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_the_full_range_is_never_worse(name: str, bits: int) -> None:
    weight = WEIGHTS[name]()
    for reach in ("minmax", "mse"):
        full, half = (
            loss(weight, integer.fit(weight, Options(bits=bits, full=full, range=reach, group=16)))
            for full in (True, False)
        )
        assert full <= half * (1.0 + 1e-6 if reach == "minmax" else 1.01)


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=40),
    st.sampled_from([8, 6, 5, 4, 3, 2]), st.booleans(),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_the_whole_range_is_covered_within_half_a_step(
    entries: list[float], bits: int, symmetric: bool
) -> None:
    weight = torch.tensor([entries])
    options = Options(bits=bits, symmetric=symmetric, range="minmax", full=False)
    grid = integer.fit(weight, options)
    worst = float((grid.values(grid.nearest(weight)) - weight).abs().max())
    step = float(grid.scales.max())
    if float(weight.abs().max()) > 1e-25:
        assert worst <= step * (0.5 if symmetric else 1.0) * (1 + 1e-4)  # the zero point is rounded as well


def test_scales_of_the_whole_range_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0, 0.5, 2.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 6.0, 3.0]])
    assert integer.fit(weight, Options(bits=3, full=False, range="minmax")).scales.tolist() == [
        [1.0],
        [1.0],
        [2.0],
    ]
    uneven = integer.fit(weight, Options(bits=2, symmetric=False, range="minmax"))
    assert uneven.scales[:, 0].tolist() == pytest.approx([5 / 3, 1, 2])
    assert uneven.zeros is not None
    assert uneven.zeros[:, 0].tolist() == [2, 0, 0]


def test_the_lowest_integer_serves_the_larger_end() -> None:
    weight = torch.tensor([[4.0, -1.0, 2.0, -2.0, 3.0, 0.0, 1.0, -3.0]])
    grid = integer.fit(weight, Options(bits=3, range="minmax"))
    assert (grid.low, grid.high, grid.scales.tolist()) == (-4, 3, [[-1.0]])
    assert torch.equal(grid.values(grid.nearest(weight)), weight)
    assert torch.equal(integer.fit(-weight, Options(bits=3, range="minmax")).scales, -grid.scales)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_percentile_leaves_out_the_outlier_and_only_it(symmetric: bool) -> None:
    weight = torch.cat((normal(4, 255).clamp(-0.2, 0.2), torch.full((4, 1), 30.0)), 1)
    options = Options(symmetric=symmetric, range="percentile", percentile=99.0)
    grid = integer.fit(weight, options)
    far = (grid.values(grid.nearest(weight)) - weight).abs()
    assert float(far[:, :255].max()) < 0.002
    assert float(far[:, 255].min()) > 29


def test_a_percentile_covers_a_lone_value_among_zeros() -> None:
    weight = torch.zeros(2, 64)
    weight[:, 7] = torch.tensor([5.0, -5.0])
    for symmetric in (True, False):
        options = Options(symmetric=symmetric, range="percentile", percentile=90.0)
        grid = integer.fit(weight, options)
        assert torch.allclose(grid.values(grid.nearest(weight)), weight, rtol=1e-6)


@pytest.mark.parametrize("options", integer.LEVELS + MORE, ids=str)
def test_decoding_is_what_the_numbers_say(options: Options) -> None:
    weight = normal(4, 256)
    grid = integer.fit(weight, options)
    integers, back = integer.restore(integer.store(grid.nearest(weight), grid, options), 256, options)
    wanted = slow.values(integers, back.scales, back.zeros, back.group)
    assert torch.equal(back.values(integers), wanted.float())


def test_half_scales_are_half_numbers_before_integers_are_picked() -> None:
    weight, options = normal(8, 64), Options(bits=4, group=32, scale="float16")
    grid = integer.fit(weight, options)
    assert torch.equal(grid.scales.half().float(), grid.scales)
    assert integer.store(grid.nearest(weight), grid, options)["scales"].dtype == torch.float16


def test_what_half_scales_cannot_hold() -> None:
    options = Options(scale="float16")
    with pytest.raises(UsageError, match=r"65,504.*choose float32"):
        integer.fit(torch.full((2, 64), 1e9), options)
    small = torch.full((2, 64), 3e-7)
    grid = integer.fit(small, options)
    assert float((grid.values(grid.nearest(small)) - small).abs().max()) <= 2**-25


@pytest.mark.parametrize("options", [Options(group="tensor"), Options(scale="float16")], ids=str)
def test_scales_that_would_change_are_not_stored(options: Options) -> None:
    weight = normal(3, 16)
    grid = integer.fit(weight, options)
    changed = Grid(grid.low, grid.high, grid.group, grid.scales * torch.tensor([[1.001], [1.0], [0.9]]))
    with pytest.raises(UsageError, match="what is stored must be float"):
        integer.store(grid.nearest(weight), changed, options)


def test_bytes_by_hand() -> None:
    assert integer.nbytes(10, 64, Options()) == 10 * 64 + 10 * 4
    assert integer.nbytes(10, 64, Options(bits=3, group=32, scale="float16")) == 10 * 24 + 20 * 2
    assert integer.nbytes(10, 64, Options(bits=4, group=16, symmetric=False)) == 10 * 32 + 40 * 4 + 10 * 2
    assert integer.nbytes(10, 63, Options(bits=6, group="tensor", symmetric=False)) == 10 * 48 + 4 + 1


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((4, 40), Options(group=32), "its 40 inputs do not divide into groups of 32"),
        ((4, 1), Options(), "its channels have one input each"),
        ((4, 1), Options(group=16), "its 1 inputs do not divide into groups of 16"),
        ((0, 8), Options(), "the weight has no entries"),
        ((1, 1), Options(group="tensor"), "it would take 5 bytes, as float32 it takes 4"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_words(shape: tuple[int, int], options: Options, reason: str) -> None:
    assert reason in str(integer.refuse(*shape, options))
    with pytest.raises(UsageError, match=reason):
        integer.fit(torch.ones(shape), options)


def test_a_column_fits_with_one_scale_for_all() -> None:
    weight = normal(64, 1)
    grid = integer.fit(weight, Options(group="tensor"))
    assert grid.scales.shape == (64, 1)
    assert float((grid.values(grid.nearest(weight)) - weight).abs().max()) <= float(grid.scales[0]) * 0.6


def test_how_many_entries_are_not_finite_is_said() -> None:
    weight = normal(4, 16)
    weight[1, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    with pytest.raises(ModelError, match="3 of 64"):
        integer.fit(weight, Options())


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 7}, {"bits": 1}, {"group": 48}, {"group": "row"}, {"range": "max"}, {"scale": "float64"},
        {"percentile": 49.0}, {"percentile": math.nan}, {"symmetric": False, "full": True}, {"reduced": True, "full": True},
        {"symmetric": False, "reduced": True},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="must be"):
        Options(**wrong)  # type: ignore[arg-type]


def test_dead_inputs_count_where_nothing_else_does() -> None:
    weight = normal(4, 64)
    energy = torch.cat((torch.ones(32), torch.zeros(32)))
    options = Options(bits=2, group=32)
    grid = integer.fit(weight, options, energy)
    assert torch.equal(grid.scales[:, 1], integer.fit(weight, options).scales[:, 1])
