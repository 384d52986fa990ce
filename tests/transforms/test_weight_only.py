"""Which sites take which widths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flyweight.transforms import Context, plain_site, weight_only
from flyweight.transforms.weight_only import Options


def test_levels_go_from_gentle_to_small() -> None:
    assert weight_only.levels(plain_site(nn.Linear(4, 4), "")) == (
        Options(), Options(bits=4, group=32, symmetric=False),
    )  # fmt: skip
    assert weight_only.levels(plain_site(nn.Conv2d(4, 4, 3), "")) == (Options(),)
    assert weight_only.levels(plain_site(nn.Embedding(4, 4), "")) == (Options(),)


@pytest.mark.parametrize(
    ("layer", "options", "reason"),
    [
        (nn.Linear(64, 4), Options(bits=4, group=32), None),
        (nn.Linear(40, 4), Options(bits=4, group=32), "its 40 inputs do not divide into groups of 32"),
        (
            nn.Conv2d(4, 4, 3),
            Options(bits=4),
            "4 bits and groups are for linear layers here; use 8 bits without groups",
        ),
        (
            nn.Conv2d(16, 4, 2),
            Options(group=64),
            "4 bits and groups are for linear layers here; use 8 bits without groups",
        ),
        (nn.Linear(64, 4), Options(group=64), None),
        (nn.Embedding(5, 32), Options(), None),
    ],
)
def test_refusals(layer: nn.Module, options: Options, reason: str | None) -> None:
    assert weight_only.refuse(plain_site(layer, ""), options, layer) == reason


def test_the_inputs_of_a_transposed_layer_are_its_first_dimension() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 64))

    reason = weight_only.refuse(plain_site(Turned(), ""), Options(bits=4, group=32), Turned())
    assert reason == "its 16 inputs do not divide into groups of 32"


def test_eight_bits_keep_every_weight_within_half_a_step_and_four_bits_cost_half_a_byte() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    site = plain_site(model, "0")
    eight = weight_only.replace(model, site, Options(), Context())["0"]
    assert bool(((eight._decoded() - model[0].weight).abs() <= eight.scales * 0.50001).all())
    four = weight_only.replace(model, site, Options(bits=4, group=32, symmetric=False), Context())["0"]
    assert four.codes.numel() == 64 * 32 // 2
    assert four.scales.numel() == four.zeros.numel() == 64
