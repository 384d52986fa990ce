"""Ranges of activations, and integer weights whose scales cover all of a channel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flyweight.analysis.sites import Range, analyse
from flyweight.transforms import Context, dynamic_int8, plain_site, static_int8
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


def test_fewer_bits_have_fewer_points_over_the_same_range() -> None:
    scale, zero = activation_grid(spread(-1.0, 3.0), "minmax", 15)
    assert scale == pytest.approx(4 / 15)
    assert zero == 4
    values = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    seen = Range(float(values.min()), float(values.max()), values)
    errors = {}
    for method in ("minmax", "mse"):
        scale, zero = activation_grid(seen, method, 15)
        rounded = ((values / scale).round() + zero).clamp(0, 15).sub(zero).mul(scale)
        errors[method] = float((rounded - values).square().mean())
    assert errors["mse"] < 0.8 * errors["minmax"]


LAYERS = {
    "linear": (lambda: nn.Linear(24, 6), (40, 24)),
    "sequence": (lambda: nn.Linear(24, 6), (4, 10, 24)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (5, 4, 9, 9)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding="same"), (5, 4, 9, 9)),
    "depthwise": (lambda: nn.Conv1d(4, 4, 5, groups=4), (5, 4, 12)),
}


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_corrected_bias_gives_the_mean_output_of_the_float_layer(name: str, reduced: bool) -> None:
    """The reference is what both layers give, in float64, on the inputs that were seen."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    model = nn.Sequential(layer).eval()
    data = [torch.rand(shape) + 0.3, torch.rand(shape) - 0.1]
    analysis = analyse(model, data)
    means = {}
    for bias in ("keep", "correct"):
        options = static_int8.Options(reduced=reduced, bias=bias)
        found = static_int8.replace(model, analysis.sites[0], options, Context(analysis.statistics))["0"]
        found.activations = "float"  # the rounding of weights alone
        gaps = torch.cat(
            [(found.plain().double()(x.double()) - layer.double()(x.double())).detach() for x in data]
        )
        layer.float()
        others = [
            d
            for d in range(gaps.ndim)
            if d != (1 if "conv" in type(layer).__name__.lower() else gaps.ndim - 1)
        ]
        means[bias] = float(gaps.mean(others).abs().max())
    assert means["correct"] < 1e-6
    assert means["correct"] < 0.01 * means["keep"]


@pytest.mark.parametrize("method", [static_int8, dynamic_int8])
def test_a_layer_without_bias_is_left_out_or_gets_one(method: object) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4, bias=False)).eval()
    analysis = analyse(model, [torch.rand(30, 16)])
    site, context = analysis.sites[0], Context(analysis.statistics)
    kinds = {
        b: method.replace(model, site, method.Options(bias=b), context)["0"]
        for b in ("keep", "correct", "add")
    }  # type: ignore[attr-defined]
    assert kinds["keep"].bias is None
    assert kinds["correct"].bias is None
    assert kinds["add"].bias.shape == (4,)
    assert float(kinds["add"].bias.detach().abs().max()) > 0
    rebuilt = method.replace(
        model, plain_site(model, "0"), method.Options(bias="add"), Context(rebuilding=True)
    )["0"]  # type: ignore[attr-defined]
    assert set(rebuilt.state_dict()) == set(kinds["add"].state_dict())
    assert float(rebuilt.bias.detach().abs().max()) == 0
    assert model[0].bias is None


def test_a_class_without_a_place_for_a_bias_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 4))

    reason = dynamic_int8.refuse(plain_site(Bare(), ""), dynamic_int8.Options(bias="add"), Bare())
    assert reason == "its class has no place for a bias"
