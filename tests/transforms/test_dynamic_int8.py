"""Dynamic ranges, for linear layers only."""

from __future__ import annotations

import torch
from torch import nn

from flyweight.transforms import Context, dynamic_int8, plain_site
from flyweight.transforms.dynamic_int8 import Options


def test_only_linear_layers_take_it() -> None:
    assert len(dynamic_int8.levels(plain_site(nn.Linear(4, 4), ""))) == 3
    assert not dynamic_int8.levels(plain_site(nn.Conv1d(4, 4, 3), ""))
    assert dynamic_int8.refuse(plain_site(nn.Embedding(4, 4), ""), Options(), nn.Embedding(4, 4))


def test_the_reduced_grid_stays_within_64() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    for reduced, most in ((True, 64), (False, 127)):
        layer = dynamic_int8.replace(model, plain_site(model, "0"), Options(reduced=reduced), Context())["0"]
        assert int(layer.encoded()[0].abs().max()) == most
        assert layer.activations == "dynamic"


def test_each_input_has_its_own_range() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    layer = dynamic_int8.replace(model, plain_site(model, "0"), Options(), Context())["0"]
    x = torch.randn(3, 16)
    wanted = layer(x)
    assert torch.allclose(layer(1000 * x) - layer.bias, 1000 * (wanted - layer.bias), rtol=1e-3, atol=1e-2)


def test_each_row_has_its_own_range_and_does_not_see_the_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    layer = dynamic_int8.replace(model, plain_site(model, "0"), Options(per_row=True), Context())["0"]
    x = torch.randn(2, 5, 16) * torch.logspace(-3, 3, 5)[:, None]
    found = layer._round(x)
    for sample, rounded in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        low, high = min(0.0, float(sample.min())), max(0.0, float(sample.max()))
        scale = (high - low) / 255
        zero = round(-low / scale)
        wanted = ((sample.double() / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)
        assert torch.allclose(rounded.double(), wanted, atol=1e-5 * high, rtol=1e-5)
        assert torch.equal(layer._round(sample), rounded)
    whole = dynamic_int8.replace(model, plain_site(model, "0"), Options(), Context())["0"]
    gaps = [float(((one._round(x) - x).norm(dim=-1) / x.norm(dim=-1)).max()) for one in (layer, whole)]
    assert gaps[0] < 0.01
    assert gaps[1] > 0.5


def test_rows_that_are_zero_constant_or_absent() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    layer = dynamic_int8.replace(model, plain_site(model, "0"), Options(per_row=True), Context())["0"]
    x = torch.stack([torch.zeros(16), torch.full((16,), 3.0), torch.full((16,), -3.0)])
    assert torch.allclose(layer._round(x), x, atol=1e-6)
    assert layer(torch.zeros(0, 16)).shape == (0, 8)
