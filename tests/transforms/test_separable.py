"""Convolutions that look at each channel by itself and mix: exact where they can be, least squares where not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flyweight import transforms
from flyweight.analysis import gram
from flyweight.analysis.sites import analyse
from flyweight.errors import UsageError
from flyweight.inputs.check import run
from flyweight.records import Plan, Step
from flyweight.transforms import Context

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = list(torch.randn(4, 4, 6, 7, 7, generator=torch.Generator().manual_seed(1)) + 0.5)


def model(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(6, 16, 3, padding=1, bias=bias), nn.ReLU(), nn.Conv2d(16, 3, 1)).eval()


def applied(net: nn.Module, *steps: Step) -> nn.Module:
    found = analyse(net, EXAMPLES)
    known = gram.lazily(net, [site.name for site in found.sites], EXAMPLES)
    return transforms.apply(
        net, Plan(steps), found.sites, Context(found.statistics, known, examples=EXAMPLES)
    )


def separate(kernels: int, bias: bool = True) -> tuple[nn.Sequential, nn.Module]:
    net = model(bias)
    return net, applied(net, Step("separable", "0", {"kernels": kernels}))


def test_a_convolution_that_is_separable_comes_out_as_it_is() -> None:
    net = model()
    looking, mixing = torch.randn(6, 2, 3, 3), torch.randn(16, 6, 2)
    with torch.no_grad():
        net[0].weight.copy_(torch.einsum("oim,imhw->oihw", mixing, looking))
    small = applied(net, Step("separable", "0", {"kernels": 2}))
    assert (small[0].first.groups, small[0].first.weight.shape) == (6, (12, 1, 3, 3))
    assert small[0].second.weight.shape == (16, 12, 1, 1)
    assert torch.allclose(run(small, EXAMPLES[0]), run(net, EXAMPLES[0]), atol=2e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_the_mixture_is_that_of_least_squares_with_its_bias(bias: bool) -> None:
    net, small = separate(2, bias)
    x = torch.cat(EXAMPLES)
    with torch.no_grad():
        wanted = net[0](x).movedim(1, -1).flatten(0, 2)
        seen = small[0].first(x).movedim(1, -1).flatten(0, 2)
        found = small[0](x).movedim(1, -1).flatten(0, 2)
    design = torch.cat([seen, torch.ones(len(seen), 1)], 1) if bias else seen
    best = (wanted - design @ torch.linalg.lstsq(design, wanted).solution).square().sum()
    assert best <= (wanted - found).square().sum() < 1.02 * best


def test_more_kernels_are_nearer_and_all_are_the_convolution() -> None:
    errors = []
    for kernels in (1, 2, 4):
        net, small = separate(kernels)
        errors.append(float((run(small, EXAMPLES[0]) - run(net, EXAMPLES[0])).norm()))
    assert errors == sorted(errors, reverse=True)


def test_layers_inside_are_quantized_in_the_same_plan_and_weights_come_back() -> None:
    net = model()
    steps = (Step("separable", "0"), Step("weight_only", "0.second"), Step("static_int8", "0.first"))
    small = applied(net, *steps)
    fresh = transforms.apply(model(), Plan(steps), analyse(net, EXAMPLES).sites, Context(rebuilding=True))
    fresh.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(run(fresh, EXAMPLES[0]), run(small, EXAMPLES[0]))


@pytest.mark.parametrize(
    ("site", "options", "words"),
    [
        ("0", {"kernels": 8}, "not smaller"),
        ("0", {"kernels": 0}, "kernels must be"),
        ("2", {}, "not smaller"),
    ],
)
def test_what_does_not_pay_is_refused(site: str, options: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        applied(model(), Step("separable", site, options))


def test_grouped_convolutions_and_layers_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(6, 6, 3, groups=2), nn.Flatten(), nn.Linear(150, 3)).eval()
    for site in ("0", "2"):
        with pytest.raises(UsageError, match="output channels all read all inputs"):
            applied(net, Step("separable", site))
