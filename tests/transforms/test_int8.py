"""Ranges of activations, and integer weights whose scales cover all of a channel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flyweight.analysis.sites import Range
from flyweight.transforms._int8 import activation_grid, int8


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


@pytest.mark.parametrize(("reduced", "high"), [(False, 127), (True, 64)])
def test_scales_cover_all_of_a_channel(reduced: bool, high: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 8)
    integers, grid = int8(layer, "linear", reduced=reduced).encoded()
    assert torch.equal(integers.abs().amax(1), torch.full((8,), high, dtype=torch.int16))
    assert torch.allclose(grid.scales[:, 0], layer.weight.abs().amax(1) / high)


def test_no_scale_is_below_what_the_bias_needs() -> None:
    layer = nn.Linear(64, 8)
    nn.init.constant_(layer.weight, 1e-9)
    nn.init.constant_(layer.bias, 2.0)
    _, grid = int8(layer, "linear", reduced=False, input_scale=0.5).encoded()
    assert torch.allclose(grid.scales, torch.full((8, 1), 2.0 / (0.5 * 2**30)))
