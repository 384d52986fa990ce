"""Ranges fixed by what was seen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flyweight.analysis.sites import analyse
from flyweight.transforms import Context, plain_site, static_int8
from flyweight.transforms.static_int8 import Options


def built(options: Options, scale: float = 1.0) -> tuple[nn.Module, torch.Tensor, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    x = scale * torch.randn(50, 16)
    analysis = analyse(model, [x])
    layer = static_int8.replace(model, analysis.sites[0], options, Context(analysis.statistics))["0"]
    return model, x, layer


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_min_max_covers_what_was_seen(scale: float) -> None:
    model, x, layer = built(Options(range="minmax"), scale)
    step = float(layer.input_grid[0])
    assert step == pytest.approx(float(x.max() - x.min()) / 255, rel=1e-5)
    assert (
        float((layer._round(x) - x).abs().max()) <= step * 0.5001 + step * 0.5
    )  # the zero point is rounded too
    with torch.no_grad():
        assert float((layer(x) - model(x)).norm() / model(x).norm()) < 0.03


def test_the_output_s_grid_covers_the_output() -> None:
    model, x, layer = built(Options(range="minmax"))
    out = model(x).detach()
    assert float(layer.output_grid[0]) == pytest.approx(float(out.max() - out.min()) / 255, rel=1e-4)


def test_values_outside_the_range_are_clipped() -> None:
    _, x, layer = built(Options(range="minmax"))
    found = layer._round(torch.full((1, 16), 100.0))
    assert float(found.max()) <= float(x.max()) + float(layer.input_grid[0])


def test_without_statistics_the_ranges_are_placeholders() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    layer = static_int8.replace(model, plain_site(model, "0"), Options(), Context())["0"]
    assert float(layer.input_grid[0]) == float(layer.output_grid[0]) == 1.0


def test_embeddings_are_refused() -> None:
    table = nn.Embedding(4, 4)
    site = plain_site(table, "")
    assert not static_int8.levels(site)
    assert "weight_only" in str(static_int8.refuse(site, Options(), table))
