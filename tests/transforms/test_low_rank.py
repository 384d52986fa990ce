"""Two layers in the place of one against NumPy's singular values, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runtimes import nets
from torch import nn
from torch.nn import functional as F

from flyweight import discover
from flyweight.analysis import gram
from flyweight.analysis.sites import analyse
from flyweight.errors import UsageError
from flyweight.inputs.check import run
from flyweight.records import Plan, Step
from flyweight.runtimes._layout import load_state
from flyweight.transforms import Context, apply, check, inside, low_rank, plain_site
from flyweight.transforms.low_rank import LowRank, Options

pytestmark = pytest.mark.usefixtures("one_thread")


def context(model: nn.Module, examples: list[Any]) -> tuple[Any, Context]:
    analysis = analyse(model, examples)
    paths = [site.name for site in analysis.sites]
    grams = gram.lazily(model, paths, examples)
    return analysis.sites, Context(analysis.statistics, grams, examples=examples)


def inputs(*shape: int) -> torch.Tensor:
    """Channels, the second dimension, that go together, differ in size and have a mean."""
    source = torch.Generator().manual_seed(0)
    mix = torch.randn(shape[1], shape[1], generator=source) * torch.logspace(0, -2, shape[1])
    return torch.einsum("nc...,cd->nd...", torch.randn(shape, generator=source) + 0.5, mix)


LAYERS = {
    "linear": (lambda: nn.Linear(24, 16), (64, 24)),
    "no bias": (lambda: nn.Linear(24, 16, bias=False), (64, 24)),
    "tall": (lambda: nn.Linear(12, 40, bias=False), (64, 12)),
    "pixels": (lambda: nn.Conv2d(24, 16, 1), (4, 24, 5, 5)),
    "conv": (lambda: nn.Conv2d(6, 16, 3, padding=1, stride=2, bias=False), (4, 6, 9, 9)),
    "dilated": (
        lambda: nn.Conv2d(6, 16, (3, 1), dilation=2, padding_mode="circular", padding=1),
        (4, 6, 9, 9),
    ),
    "sequence": (lambda: nn.Conv1d(6, 16, 3), (4, 6, 12)),
    "volume": (lambda: nn.Conv3d(3, 12, 2), (2, 3, 4, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_no_weight_of_that_rank_is_nearer_at_the_output(name: str) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    model, x = nn.Sequential(build()).eval(), inputs(*shape)
    sites, known = context(model, [x])
    found = apply(model, Plan((Step("low_rank", "0", {"rank": 5}),)), sites, known)
    outputs = [one(x).detach().double().movedim(1, -1).flatten(0, -2).numpy() for one in (model, found)]
    centre = outputs[0].mean(0) if model[0].bias is not None else 0  # the bias is free
    values = np.linalg.svd(outputs[0] - centre, compute_uv=False)
    best = float((values[5:] ** 2).sum())
    error = float(((outputs[1] - outputs[0]) ** 2).sum())
    assert best * 0.999 <= error <= best * 1.001
    assert found[0].weight.shape == model[0].weight.shape
    assert np.linalg.matrix_rank(found[0].weight.detach().flatten(1).numpy()) == 5


def test_without_anything_seen_it_is_the_truncated_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16)).eval()
    found = apply(model, Plan((Step("low_rank", "0", {"rank": 4}),)), [plain_site(model, "0")], Context())
    u, s, v = np.linalg.svd(model[0].weight.detach().double().numpy(), full_matrices=False)
    assert torch.allclose(found[0].weight.double(), torch.from_numpy(u[:, :4] * s[:4] @ v[:4]), atol=1e-6)
    assert torch.equal(found[0].bias, model[0].bias)


def test_ranks_by_share() -> None:
    assert Options(keep=0.5).width(64, 64) == 16
    assert Options(keep=0.001).width(64, 64) == 1
    assert Options(rank=7).width(64, 64) == 7
    assert 16 * (64 + 64) == 0.5 * 64 * 64


class Wrapped(nn.Conv2d):
    """A convolution that pads by itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (1, 0, 1, 0)), self.weight, self.bias, self.stride)


class Rectified(nn.Linear):
    """More than a linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def test_subclasses_are_taken_where_numbers_agree() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Wrapped(8, 16, 2, stride=2)).eval(), inputs(3, 8, 9, 9)
    sites, known = context(model, [x])
    found = apply(model, Plan((Step("low_rank", "0", {"rank": 10}),)), sites, known)
    assert nets.gap(run(model, x), run(found, x)) < 0.2
    other = nn.Sequential(Rectified(24, 16)).eval()
    with pytest.raises(UsageError, match="does more than a linear layer"):
        apply(other, Plan((Step("low_rank", "0"),)), [plain_site(other, "0")], Context())


@pytest.mark.parametrize(
    ("layer", "options", "match"),
    [
        (nn.Linear(8, 8), {"rank": 4}, "two layers of rank 4 are not smaller than 8 x 8"),
        (nn.Linear(8, 1), {}, "two layers of rank 1 are not smaller than 1 x 8"),
        (nn.Conv2d(16, 16, 3, groups=16), {}, "its output channels read different inputs"),
        (nn.Embedding(50, 16), {}, "only layers that are called with what they multiply"),
        (nn.Linear(8, 8), {"keep": 1.0}, r"keep must be in \(0, 1\)"),
        (nn.Linear(8, 8), {"rank": 0}, "rank must be at least 1"),
    ],
    ids=str,
)
def test_refusals(layer: nn.Module, options: dict[str, Any], match: str) -> None:
    model = nn.Sequential(layer).eval()
    with pytest.raises(UsageError, match=match):
        apply(model, Plan((Step("low_rank", "0", options),)), [plain_site(model, "0")], Context())


def net() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 1, bias=False),
        nn.Flatten(),
        nn.Linear(512, 64),
    )
    return model.eval(), [inputs(2, 8, 4, 4), inputs(4, 8, 4, 4)]


FACTORS = tuple(Step("low_rank", path, {"keep": 0.6}) for path in ("0", "2", "4"))
STORED = (
    *(Step("weight_only", f"{path}.{part}") for path in ("0", "2") for part in ("first", "second")),
    Step("weight_only", "4.first", {"bits": 4, "rounding": "error_feedback"}),
    Step("dynamic_int8", "4.second"),
)


def test_what_is_inside_takes_steps_of_later_stages() -> None:
    model, examples = net()
    sites, known = context(model, examples)
    both, alone = (apply(model, Plan(steps), sites, known) for steps in ((*STORED, *FACTORS), FACTORS))
    assert isinstance(both[4], LowRank)
    assert both[4].first.code == "integer"
    assert both[4].second.activations == "dynamic"
    assert 0 < nets.gap(run(alone, examples[0]), run(both, examples[0])) < 0.1
    check(model, Plan((*FACTORS, *STORED)), sites)
    assert inside(FACTORS)["4"] == ["4.first", "4.second"]
    with pytest.raises(UsageError, match=r"must be a layer of the model, got '4'.*4\.first or 4\.second"):
        apply(model, Plan((*FACTORS, Step("weight_only", "4"))), sites, known)


def test_the_matrices_inside_are_those_of_the_new_layers() -> None:
    model, examples = net()
    _, known = context(model, examples)
    changes, after = low_rank.together(model, {"4": Options(keep=0.3)}, known)
    layer = changes["4"]
    assert isinstance(layer, LowRank)
    hidden = torch.cat([layer.first(model[:4](x)).detach() for x in examples])
    found = after.gram("4.second")
    assert found is not None
    assert torch.allclose(found, hidden.T @ hidden / len(hidden), atol=1e-4)
    assert set(after.statistics) == {"0", "2", "4.first", "4.second"}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_and_a_model_that_is_rebuilt(runtime: str, tmp_path: Path) -> None:
    if discover.method("runtimes", runtime).available():
        pytest.skip(f"{runtime} is not installed")
    model, examples = net()
    sites, known = context(model, examples)
    plan = Plan((*FACTORS, *STORED))
    changed = apply(model, plan, sites, known)
    predict = nets.prepared(runtime, changed, examples, tmp_path)
    for batch in examples:
        assert nets.gap(run(changed, batch), predict(batch)) < 1e-2  # dynamic inputs round otherwise there
    if runtime == "onnxruntime":
        from safetensors.torch import load_file

        fresh = apply(net()[0], plan, sites, Context(rebuilding=True))
        load_state(fresh, load_file(tmp_path / "weights.safetensors"), predict.layouts)
        assert torch.equal(fresh(examples[0]), changed(examples[0]))


def test_ranks_go_where_they_tell() -> None:
    torch.manual_seed(0)
    flat, steep = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
    with torch.no_grad():
        nn.init.orthogonal_(flat.weight)
        steep.weight.copy_(torch.diag(torch.logspace(0, -6, 32)))
    model, x = nn.Sequential(flat, steep).eval(), torch.randn(400, 32)
    sites, known = context(model, [x])
    for keep in (0.3, 0.6, 0.9):
        plan = low_rank.plan(model, sites, known, keep)
        ranks = {step.site: int(str(step.options["rank"])) for step in plan.steps}
        sizes = {path: ranks[path] * 64 if path in ranks else 1024 for path in ("0", "1")}
        assert sum(sizes.values()) <= keep * 2048
        assert sizes["1"] < sizes["0"] or keep == 0.3
        assert all(rank * 64 < 1024 for rank in ranks.values())
        apply(model, plan, sites, known)
    with pytest.raises(UsageError, match="keep must be"):
        low_rank.plan(model, sites, known, 1.5)


def test_embeddings_and_tied_heads_stay_as_they_are() -> None:
    sites, known = context(nets.words(), list(nets.TEXTS))
    plan = low_rank.plan(nets.words(), sites, known, 0.5)
    assert {step.site for step in plan.steps} == {"a", "b", "c"}
