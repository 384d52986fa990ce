"""Dynamic ranges, for linear layers only."""

from __future__ import annotations

import torch
from torch import nn

from flyweight.transforms import Context, dynamic_int8, plain_site
from flyweight.transforms.dynamic_int8 import Options


def test_only_linear_layers_take_it() -> None:
    assert len(dynamic_int8.levels(plain_site(nn.Linear(4, 4), ""))) == 2
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
