"""Which sites take which widths."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from flyweight import discover
from flyweight.analysis.gram import lazily
from flyweight.analysis.sites import analyse
from flyweight.errors import UsageError
from flyweight.records import Plan, Step
from flyweight.transforms import Context, apply, plain_site, weight_only
from flyweight.transforms.weight_only import Options


def options(**given: object) -> Options:
    return weight_only.read(given, "options")


def test_options_are_the_code_s_and_the_rounding_s_in_one_record() -> None:
    given = {"code": "palette", "bits": 3, "scaled": True, "rounding": "error_feedback", "act_order": False}
    found = options(**given)
    assert (found.code, found.coding.bits, found.rounding) == ("palette", 3, "error_feedback")
    assert options(**found.plain()) == found
    assert options() == Options()
    assert Options().plain() == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bitz": 4}, "unknown option, got 'bitz'"),
        ({"code": "palette", "symmetric": False}, "unknown option, got 'symmetric'"),
        ({"code": "int9"}, "unknown method in codes"),
        ({"rounding": "up"}, "unknown method in roundings"),
        ({"code": 4}, "code must be a name"),
        ({"bits": 7}, "bits must be one of 8, 6, 5, 4, 3, 2"),
    ],
)
def test_options_that_are_not_there(given: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        options(**given)


@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.Conv2d(8, 8, 3), nn.Embedding(64, 64)])
def test_levels_go_from_gentle_to_small(layer: nn.Module) -> None:
    site = plain_site(layer, "")
    found = weight_only.levels(site)
    assert found[0] == Options()
    assert all(weight_only.refuse(site, level, layer) is None for level in found)


@pytest.mark.parametrize(
    ("layer", "given", "reason"),
    [
        (nn.Linear(64, 4), {"bits": 4, "group": 32}, None),
        (nn.Linear(40, 4), {"bits": 4, "group": 32}, "its 40 inputs do not divide into groups of 32"),
        (nn.Conv2d(4, 4, 3), {"bits": 4}, None),
        (nn.Conv2d(16, 4, 2), {"group": 64}, None),
        (nn.Embedding(5, 32), {}, None),
        (
            nn.Conv2d(8, 8, 3, groups=2), {"code": "entropy", "rounding": "waterfilling", "level": 0.1},
            "waterfilling takes layers whose output channels all read the same inputs",
        ),
        (
            nn.Embedding(5, 32), {"rounding": "error_feedback"},
            "embeddings have no inputs that error_feedback could learn from; round to nearest",
        ),
    ],
)  # fmt: skip
def test_refusals(layer: nn.Module, given: dict[str, object], reason: str | None) -> None:
    assert weight_only.refuse(plain_site(layer, ""), options(**given), layer) == reason


@pytest.mark.parametrize(
    "rounding",
    [name for name in discover.methods("roundings") if name not in ("waterfilling", "alternating")],
)
@pytest.mark.parametrize(
    "given",
    [
        {"bits": 3},
        {"code": "ternary"},
        {"code": "palette", "bits": 2},
        {"code": "low_float", "format": "e2m1"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_every_rounding_works_with_every_code(rounding: str, given: dict[str, object], kind: str) -> None:
    torch.manual_seed(0)
    layer = {
        "linear": nn.Linear(24, 12),
        "conv": nn.Conv2d(4, 12, 3),
        "grouped": nn.Conv2d(8, 12, 3, groups=2),
    }[kind]
    model = nn.Sequential(layer)
    shape = (64, 24) if kind == "linear" else (16, layer.in_channels, 9, 9)
    data = [torch.randn(shape) * torch.linspace(0.1, 3, shape[1]).reshape(-1, *[1] * (len(shape) - 2))]
    analysis = analyse(model, data)
    context = Context(analysis.statistics, lazily(model, ["0"], data))
    found = {}
    for name in ("nearest", rounding):
        changed = apply(
            model, Plan((Step("weight_only", "0", {**given, "rounding": name}),)), analysis.sites, context
        )
        with torch.no_grad():
            found[name] = float((changed(data[0]) - model(data[0])).square().mean())
    assert found[rounding] <= found["nearest"] * 1.35


def test_error_feedback_keeps_more_of_the_output_than_nearest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    data = [torch.randn(512, 8) @ torch.randn(8, 64) + 0.3 * torch.randn(512, 64)]
    context = Context(analyse(model, data).statistics, lazily(model, ["0"], data))
    gaps = {}
    for name in ("nearest", "error_feedback", "coordinate"):
        plan = Plan((Step("weight_only", "0", {"bits": 3, "group": 32, "rounding": name}),))
        changed = apply(model, plan, [plain_site(model, "0")], context)
        with torch.no_grad():
            gaps[name] = float((changed(data[0]) - model(data[0])).square().mean())
    assert gaps["error_feedback"] < 0.5 * gaps["nearest"]
    assert gaps["coordinate"] <= gaps["error_feedback"]


def test_a_rounding_that_must_know_the_inputs_says_so() -> None:
    model = nn.Sequential(nn.Linear(64, 4))
    with pytest.raises(UsageError, match="error_feedback must know the layer's inputs"):
        weight_only.replace(model, plain_site(model, "0"), options(rounding="error_feedback"), Context())


def test_rebuilding_needs_no_inputs_and_no_weights() -> None:
    model = nn.Sequential(nn.Linear(64, 4))
    given = options(code="palette", rounding="error_feedback")
    found = weight_only.replace(model, plain_site(model, "0"), given, Context(rebuilding=True))["0"]
    assert set(found.stored()) == {"integers", "table"}


def test_the_inputs_of_a_transposed_layer_are_its_first_dimension() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 64))

    reason = weight_only.refuse(plain_site(Turned(), ""), options(bits=4, group=32), Turned())
    assert reason == "its 16 inputs do not divide into groups of 32"


def test_eight_bits_keep_every_weight_within_half_a_step_and_four_bits_cost_half_a_byte() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    site = plain_site(model, "0")
    eight = weight_only.replace(model, site, Options(), Context())["0"]
    assert float((eight._decoded() - model[0].weight.detach()).abs().max()) < float(eight.scales.max())
    four = weight_only.replace(model, site, options(bits=4, group=32, symmetric=False), Context())["0"]
    assert four.integers.numel() == 64 * 32 // 2
    assert four.scales.numel() == 64
    assert four.zeros.numel() == 32


def test_rare_rows_of_a_tied_weight_count_as_the_mean_row_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 40, bias=False))
    model[1].weight = model[0].weight
    data = [torch.randint(40, (8, 16))]
    counts = torch.zeros(40)
    counts[:10] = 4.0  # of mean 1
    context = Context(analyse(model, data).statistics, lazily(model, ["1"], data), rows=lambda _: counts)
    scales = {}
    for tied in (True, False):
        site = dataclasses.replace(plain_site(model, "1"), tied=("0",) if tied else ())
        given = options(code="entropy", rounding="waterfilling", level=0.05, scale="float32")
        scales[tied] = weight_only.replace(model, site, given, context)["1"].scales[:, 0]
    quiet = 0.05  # what waterfilling adds itself, of the mean it is given
    assert float(scales[False][20] / scales[False][0]) == pytest.approx(
        ((4 + quiet) / quiet) ** 0.5, rel=1e-4
    )
    assert float(scales[True][20] / scales[True][0]) == pytest.approx(
        ((5 + 2 * quiet) / (1 + 2 * quiet)) ** 0.5, rel=1e-4
    )
