"""Low-bit floats against PyTorch's own, and scales against a slow search."""

from __future__ import annotations

import math

import pytest
import torch
from codes import slow
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.codes import low_float
from flyweight.codes.low_float import Options
from flyweight.errors import ArtifactError, UsageError
from flyweight.testing.conformance import check_code, failures

pytestmark = pytest.mark.usefixtures("one_thread")

MORE = (
    Options(group="tensor"),
    Options(format="e5m2", group=32, scale="e8m0"),
    Options(format="e2m1", group=16, scale="e8m0", range="minmax"),
    Options(format="e2m1", scale="float16", range="minmax"),
)  # fmt: skip
OWN = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def loss(weight: torch.Tensor, options: Options, energy: torch.Tensor | None = None) -> float:
    grid = low_float.fit(weight, options, energy)
    square = (grid.values(grid.nearest(weight)).double() - weight.double()).square()
    return float((square if energy is None else square * energy).sum())


@pytest.mark.parametrize("options", MORE, ids=str)
def test_settings_that_are_no_levels_keep_the_contract_too(options: Options) -> None:
    assert not failures(check_code("low_float", [options]))


@pytest.mark.parametrize("name", OWN)
def test_the_numbers_and_their_bits_are_pytorchs(name: str) -> None:
    own = torch.arange(256, dtype=torch.uint8).view(OWN[name]).float()
    finite = own[torch.isfinite(own)].unique()
    options = Options(format=name, group="tensor")
    grid = low_float.fit(finite[None], options)
    assert grid.table is not None
    assert torch.equal(grid.table[0], finite)
    values = grid.table * grid.scales
    stored = low_float.store(grid.nearest(values), grid, options)["integers"]
    back = stored.view(OWN[name]).float() * grid.scales
    assert torch.equal(back, values)


def test_the_numbers_of_e2m1() -> None:
    grid = low_float.fit(normal(1, 32), Options(format="e2m1", group=32))
    assert grid.table is not None
    assert grid.table[0].tolist() == [-x for x in E2M1[:0:-1]] + list(E2M1)
    integers = torch.arange(-7, 8, dtype=torch.int16)[None]
    stored = low_float.store(integers, grid, Options(format="e2m1"))["integers"][0].tolist()
    nibbles = [half for byte in stored for half in (byte & 15, byte >> 4)][:15]
    assert nibbles == [15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("name", OWN)
@given(entries=st.lists(st.floats(-400, 400, width=32), min_size=8, max_size=8))
@settings(max_examples=60, deadline=None)
def test_rounding_is_pytorchs_but_for_ties(name: str, entries: list[float]) -> None:
    weight = torch.tensor([entries])
    grid = low_float.fit(weight, Options(format=name, range="minmax"))
    assert grid.table is not None
    found = grid.table[0][grid.nearest(weight).long() - grid.low]
    levels = weight / grid.scales
    wanted = levels.to(OWN[name]).float()
    assert torch.all((found == wanted) | ((found - levels).abs() == (wanted - levels).abs()))


@pytest.mark.parametrize("options", low_float.LEVELS, ids=str)
@pytest.mark.parametrize("heavy", [False, True])
def test_the_search_is_never_worse_than_the_whole_range(options: Options, heavy: bool) -> None:
    weight = normal(6, 64) * (normal(6, 64).abs() + 0.01 if heavy else 1)
    energy = torch.linspace(0, 2, 64)
    whole = Options(format=options.format, group=options.group, scale=options.scale, range="minmax")
    for counts in (None, energy):
        assert loss(weight, options, counts) <= loss(weight, whole, counts) * (1 + 1e-6)


def test_the_search_comes_near_the_best_scale() -> None:
    weight, energy = normal(3, 32), torch.linspace(0.1, 1.9, 32)
    signed = [*(-x for x in E2M1), *E2M1]
    wanted = math.fsum(
        min(slow.error(x, c, [step / 400 * v for v in signed]) for step in range(1, 400))
        for x, c in slow.groups(weight, energy, 16)
    )
    assert loss(weight, Options(format="e2m1", group=16), energy / energy.mean()) <= wanted * 1.03


@pytest.mark.parametrize("reach", ["minmax", "mse"])
def test_powers_of_two_as_scales(reach: str) -> None:
    weight, options = normal(4, 64), Options(format="e2m1", group=32, scale="e8m0", range=reach)
    grid = low_float.fit(weight, options)
    assert torch.equal(grid.scales, torch.exp2(grid.scales.log2().round()))
    stored = low_float.store(grid.nearest(weight), grid, options)["scales"]
    assert stored.dtype == torch.uint8
    assert torch.equal(torch.exp2(stored.double() - 127).float(), grid.scales)
    if reach == "minmax":
        peaks = weight.view(4, 2, 32).abs().amax(-1)
        assert torch.all((6 * grid.scales >= peaks) & (3 * grid.scales < peaks))


def test_powers_of_two_at_their_ends() -> None:
    options = Options(format="e2m1", scale="e8m0")
    for size in (1e-29, 1e30):
        weight = torch.full((2, 16), size)
        grid = low_float.fit(weight, options)
        back = low_float.restore(low_float.store(grid.nearest(weight), grid, options), 16, options)[1]
        assert torch.equal(back.scales, grid.scales)


def test_bits_that_are_no_number_are_refused() -> None:
    weight = normal(2, 8)
    grid = low_float.fit(weight, Options())
    stored = low_float.store(grid.nearest(weight), grid, Options())
    stored["integers"][1, 3] = 0xFF
    with pytest.raises(ArtifactError, match=r"finite, got 1 of 16"):
        low_float.restore(stored, 8, Options())


def test_minus_nought_is_nought() -> None:
    options = Options(format="e2m1", group=16)
    grid = low_float.fit(normal(1, 16), options)
    stored = low_float.store(torch.zeros(1, 16, dtype=torch.int16), grid, options)
    stored["integers"].fill_(0x88)
    assert not low_float.restore(stored, 16, options)[0].any()


def test_bytes_by_hand() -> None:
    assert low_float.nbytes(10, 64, Options()) == 10 * 64 + 10 * 4
    assert low_float.nbytes(10, 64, Options(format="e2m1", group=32, scale="e8m0")) == 10 * 32 + 20
    assert low_float.nbytes(10, 64, Options(format="e2m1", group=16, scale="float16")) == 10 * 32 + 40 * 2


@pytest.mark.parametrize(
    "wrong", [{"format": "e3m4"}, {"group": 5}, {"scale": "e4m3"}, {"range": "percentile"}], ids=str
)
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="must be"):
        Options(**wrong)  # type: ignore[arg-type]
