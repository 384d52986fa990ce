"""Grids against a slow reference in float64, and the bounds that rounding must keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.analysis.sites import Range
from flyweight.transforms._grid import activation_grid, decode, encode, grid, pack, unpack

KINDS = [(8, None, True), (4, None, True), (4, 16, True), (4, 16, False), (4, None, False), (8, 16, True)]
WEIGHTS = {
    "normal": lambda: torch.randn(5, 32, generator=torch.Generator().manual_seed(0)),
    "one row": lambda: torch.randn(1, 16, generator=torch.Generator().manual_seed(1)),
    "one weight": lambda: torch.tensor([[0.37]]),
    "odd": lambda: torch.randn(3, 37, generator=torch.Generator().manual_seed(2)),
    "zeros": lambda: torch.zeros(2, 16),
    "zero channel": lambda: torch.cat((torch.zeros(1, 16), torch.randn(1, 16))),
    "constant": lambda: torch.full((2, 16), -0.7),
    "outlier": lambda: torch.cat((torch.full((1, 1), 1e4), torch.randn(1, 31)), 1),
    "denormal": lambda: torch.full((2, 16), 1e-40),
    "all positive": lambda: torch.rand(2, 16) + 3,
}


def slow_decode(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
    """One weight at a time."""
    width = math.ceil(codes.shape[1] / scales.shape[1])
    found = np.zeros(codes.shape)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            zero = 0 if zeros is None else int(zeros[row, column // width])
            found[row, column] = (int(codes[row, column]) - zero) * float(scales[row, column // width])
    return found


def slow_codes(
    weight: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, low: int, high: int
) -> np.ndarray:
    width = math.ceil(weight.shape[1] / scales.shape[1])
    found = np.zeros(weight.shape, dtype=int)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            zero = 0 if zeros is None else int(zeros[row, column // width])
            quotient = np.float32(weight[row, column]) / scales[row, column // width]
            found[row, column] = min(high, max(low, int(np.rint(quotient)) + zero))
    return found


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_and_values_are_the_slow_reference_s(name: str, kind: tuple[int, int | None, bool]) -> None:
    weight = WEIGHTS[name]()
    on = grid(*kind) if weight.shape[1] % (kind[1] or 1) == 0 else grid(kind[0], None, kind[2])
    found = encode(weight, on)
    zeros = None if found.zeros is None else found.zeros.numpy()
    wanted = slow_codes(weight.numpy(), found.scales.numpy(), zeros, on.low, on.high)
    assert np.array_equal(found.codes.numpy(), wanted)
    assert np.allclose(
        decode(found).numpy(), slow_decode(found.codes.numpy(), found.scales.numpy(), zeros), rtol=1e-6
    )
    assert found.scales.shape == (len(weight), weight.shape[1] // (on.group or weight.shape[1]))
    assert found.codes.min() >= on.low
    assert found.codes.max() <= on.high


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("reduced", [False, True])
def test_eight_bits_round_to_within_half_a_step(name: str, reduced: bool) -> None:
    weight, on = WEIGHTS[name](), grid(8, None, True, reduced)
    found = encode(weight, on)
    assert on.high == (64 if reduced else 127)
    assert bool(((decode(found) - weight).abs() <= found.scales * 0.5 * (1 + 1e-5)).all())
    assert torch.allclose(found.scales[:, 0] * on.high, weight.abs().amax(1), rtol=1e-5) or name in (
        "zeros", "zero channel", "denormal",
    )  # fmt: skip


def test_zeros_decode_to_exact_zeros() -> None:
    for kind in KINDS:
        found = encode(torch.zeros(3, 32), grid(*kind))
        assert torch.equal(decode(found), torch.zeros(3, 32))
        assert torch.equal(found.scales, torch.ones_like(found.scales))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4), columns=st.sampled_from([1, 7, 16, 32, 48]), seed=st.integers(0, 99), size=st.floats(1e-6, 1e6),
    kind=st.sampled_from(KINDS),
)  # fmt: skip
def test_the_search_never_loses_to_the_whole_range(
    rows: int, columns: int, seed: int, size: float, kind: tuple[int, int | None, bool]
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    kind = kind if columns % 16 == 0 else (kind[0], None, kind[2])
    on = grid(*kind)
    found = encode(weight, on)
    error = (decode(found) - weight).square().sum()
    plain = slow_range_error(weight.double().numpy(), kind, on.low, on.high)
    assert float(error) <= plain * (1 + 1e-3) + 1e-12 * size**2
    assert torch.isfinite(decode(found)).all()
    # zero stays zero, whatever the zero point
    weight[:, 0] = 0
    assert not decode(encode(weight, on))[:, 0].any()


def slow_range_error(weight: np.ndarray, kind: tuple[int, int | None, bool], low: int, high: int) -> float:
    """Squared error of the grid that just covers every group."""
    _, group, symmetric = kind
    total = 0.0
    for row in weight:
        for start in range(0, len(row), group or len(row)):
            part = row[start : start + (group or len(row))]
            least, most = min(part.min(), 0.0), max(part.max(), 0.0)
            scale = np.abs(part).max() / high if symmetric else (most - least) / high
            if scale == 0:
                continue
            zero = 0 if symmetric else min(high, max(0, round(-least / scale)))
            codes = np.clip(np.rint(part / scale) + zero, low, high)
            total += float((((codes - zero) * scale - part) ** 2).sum())
    return total


def test_energy_draws_precision_to_the_inputs_that_matter() -> None:
    weight = torch.cat(
        (torch.full((1, 1), 8.0), torch.randn(1, 15, generator=torch.Generator().manual_seed(0))), 1
    )
    energy = torch.ones(16)
    energy[0] = 1e-6  # the outlier hardly counts
    on = grid(4, None, True)
    even, weighted = (decode(encode(weight, on, e)) for e in (None, energy))
    error = [((found - weight).square() * energy).sum() for found in (even, weighted)]
    assert error[1] < 0.5 * error[0]


def test_no_scale_is_below_its_floor() -> None:
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 1e-6
    floor = torch.tensor([1.0, 0.0, 1e-9])
    found = encode(weight, grid(8, None, True), floor=floor)
    assert found.scales[0] == 1
    assert not found.codes[0].any()
    assert bool((found.scales[:, 0] >= floor).all())
    assert torch.equal(found.scales[1:], encode(weight, grid(8, None, True)).scales[1:])


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 33), seed=st.integers(0, 99), symmetric=st.booleans())
def test_packing_keeps_every_integer(rows: int, columns: int, seed: int, symmetric: bool) -> None:
    source = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8 if symmetric else 0, 8 if symmetric else 16, (rows, columns), generator=source)
    codes = codes.to(torch.int8 if symmetric else torch.uint8)
    packed = pack(codes)
    assert packed.shape == (rows, (columns + 1) // 2)
    assert packed.dtype == torch.uint8
    for row in range(rows):
        for column in range(columns):
            nibble = int(packed[row, column // 2]) >> 4 * (column % 2) & 15
            assert nibble == int(codes[row, column]) & 15
    found = unpack(packed, columns, symmetric)
    assert found.dtype == codes.dtype
    assert torch.equal(found, codes)


def spread(low: float, high: float) -> Range:
    return Range(low, high, torch.linspace(low, high, 2001))


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 6.0), (-5.0, -1.0), (2.0, 3.0), (-1e-6, 1e-6)])
def test_activation_grids_hold_zero_and_the_range(low: float, high: float, method: str) -> None:
    scale, zero = activation_grid(spread(low, high), method)
    assert scale > 0
    assert 0 <= zero <= 255
    least, most = -zero * scale, (255 - zero) * scale
    assert least <= 0 <= most
    if method == "minmax":
        assert least <= min(low, 0) + scale
        assert most >= max(high, 0) - scale
        assert scale == pytest.approx((max(high, 0) - min(low, 0)) / 255)


def test_a_range_of_zero_gets_scale_one() -> None:
    assert activation_grid(Range(0.0, 0.0, torch.zeros(4)), "mse") == (1.0, 0)
    assert activation_grid(Range(0.0, 0.0, torch.zeros(0)), "minmax") == (1.0, 0)


def test_an_outlier_is_cut_off_by_percentile_and_mse_only_where_that_pays() -> None:
    values = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    values[0] = 100.0
    seen = Range(float(values.min()), float(values.max()), values)
    scales = {method: activation_grid(seen, method)[0] for method in ("minmax", "percentile", "mse")}
    assert scales["percentile"] < 0.1 * scales["minmax"]
    assert scales["mse"] < scales["minmax"]
