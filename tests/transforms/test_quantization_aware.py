"""Layers that learn to be stored: frozen they are what the other methods store, and training pays."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

from flyweight import transforms
from flyweight.analysis.sites import analyse
from flyweight.errors import UsageError
from flyweight.records import Plan, Step
from flyweight.testing.zoo import ZOO
from flyweight.transforms import Context, frozen, plain_site, quantization_aware
from flyweight.transforms._learned import LearningLayer

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4),
    ).eval()  # fmt: skip


def applied(
    model: nn.Module, data: list[torch.Tensor], method: str, training: bool = False, **options: Any
) -> nn.Module:
    analysis = analyse(model, data)
    steps = tuple(Step(method, site.name, options) for site in analysis.sites)
    return transforms.apply(
        model, Plan(steps), analysis.sites, Context(analysis.statistics, training=training)
    )


def images(count: int = 3) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, 9, 9, generator=source) for _ in range(count)]


def learn(
    model: nn.Module, data: list[torch.Tensor], wanted: list[torch.Tensor], steps: int, rate: float = 3e-3
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for at in range(steps):
        optimizer.zero_grad()
        (model(data[at % len(data)]) - wanted[at % len(data)]).square().mean().backward()
        optimizer.step()
        schedule.step()
    model.eval()


ALL = [
    {"bits": 8}, {"bits": 6, "symmetric": False}, {"bits": 5, "scale": "float16"}, {"bits": 4, "group": "tensor"},
    {"bits": 3, "symmetric": False}, {"bits": 2}, {"code": "ternary"}, {"bits": 8, "reduced": True, "range": "minmax"},
]  # fmt: skip


CASES = [(options, ("lsq", "ste")[at % 2], (None, 8, 4)[at % 3]) for at, options in enumerate(ALL)]


@pytest.mark.parametrize(("options", "gradient", "activations"), CASES, ids=str)
def test_freezing_changes_no_bit_before_and_after_training(
    options: dict[str, Any], gradient: str, activations: int | None
) -> None:
    own = {"gradient": gradient} | ({} if activations is None else {"activations": activations})
    model, data = network(), images()
    found = applied(model, data, "quantization_aware", True, **options, **own)
    assert torch.equal(found(data[0]), frozen(found)(data[0]))
    learn(found, data, [model(x).detach() for x in data], 3, 2e-2)
    same = frozen(found)
    assert not any(isinstance(m, LearningLayer) for m in same.modules())
    for x in data:
        assert torch.equal(found(x), same(x))
    at_once = applied(model, data, "quantization_aware", **options, **own)
    assert {k: t.shape for k, t in same.state_dict().items()} == {
        k: t.shape for k, t in at_once.state_dict().items()
    }
    at_once.load_state_dict(same.state_dict(), strict=True)
    assert torch.equal(at_once(data[0]), same(data[0]))


@pytest.mark.parametrize("options", ALL, ids=str)
def test_untrained_it_is_weight_only(options: dict[str, Any]) -> None:
    model, data = network(), images()
    found, wanted = (
        applied(model, data, method, **options) for method in ("quantization_aware", "weight_only")
    )
    ours = dict(found.state_dict())
    energy_free = transforms.apply(
        model, Plan(tuple(Step("weight_only", s.name, options) for s in analyse(model, data).sites)),
        analyse(model, data).sites, Context(),
    ).state_dict()  # fmt: skip
    assert set(ours) == set(wanted.state_dict())
    assert all(torch.equal(ours[k], t) for k, t in energy_free.items())


def test_untrained_with_activations_it_is_static_int8() -> None:
    model, data = network(), images()
    found = applied(
        model, data, "quantization_aware", activations=8, reduced=True, range="minmax"
    ).state_dict()
    wanted = applied(model, data, "static_int8", bias="keep").state_dict()
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=1e-6), name
        assert torch.equal(found[name], tensor) or name.endswith("output_grid"), name


TRAINED = [
    ("mlp", {"bits": 2}), ("mlp", {"bits": 2, "symmetric": False, "gradient": "ste"}),
    pytest.param("conv_norm", {"bits": 2}, marks=pytest.mark.heavy),
    pytest.param("conv_norm", {"bits": 2, "gradient": "ste"}, marks=pytest.mark.heavy),
    pytest.param("conv_norm", {"code": "ternary"}, marks=pytest.mark.heavy),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), TRAINED, ids=str)
def test_training_beats_rounding_by_far(name: str, options: dict[str, Any]) -> None:
    """A few hundred steps towards the original's own outputs, judged on inputs that no step has seen."""
    entry = next(entry for entry in ZOO if entry.name == name)
    model = entry.build().eval()
    source = torch.Generator().manual_seed(2)
    data = [torch.randn(64, *entry.examples()[0].shape[1:], generator=source) for _ in range(9)]  # type: ignore[union-attr]
    analysis = analyse(model, data[:8])
    layers = [s.name for s in analysis.sites if model.get_submodule(s.name).weight[0].numel() >= 16]  # type: ignore[index, union-attr, operator]
    plan = Plan(tuple(Step("quantization_aware", site, options) for site in layers))
    make = functools.partial(transforms.apply, model, plan, analysis.sites)
    found = make(Context(analysis.statistics, training=True))
    wanted = [model(x).detach() for x in data]
    learn(found, data[:8], wanted[:8], 300)
    size = wanted[8].var()
    with torch.no_grad():
        rounded = float((make(Context(analysis.statistics))(data[8]) - wanted[8]).square().mean() / size)
        trained = float((frozen(found)(data[8]) - wanted[8]).square().mean() / size)
    assert trained < 0.5 * rounded


def test_the_state_of_a_model_in_training_comes_back() -> None:
    model, data = network(), images()
    found = applied(model, data, "quantization_aware", True, bits=3, symmetric=False, activations=4)
    learn(found, data, [model(x).detach() for x in data], 2)
    sites = [plain_site(model, site.name) for site in analyse(model, data).sites]
    steps = tuple(
        Step("quantization_aware", s.name, {"bits": 3, "symmetric": False, "activations": 4}) for s in sites
    )
    fresh = transforms.apply(copy.deepcopy(model), Plan(steps), sites, Context(training=True))
    fresh.load_state_dict(found.state_dict(), strict=True)
    assert torch.equal(fresh(data[0]), found(data[0]))
    twin = copy.deepcopy(found).train().eval()
    assert torch.equal(twin(data[0]), found(data[0]))


def test_the_model_is_not_changed_and_shares_nothing() -> None:
    model, data = network(), images()
    before = copy.deepcopy(model.state_dict())
    found = applied(model, data, "quantization_aware", True, bits=2)
    learn(found, data, [model(x).detach() for x in data], 2)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    kept = copy.deepcopy(found.state_dict())
    with torch.no_grad():
        for tensor in frozen(found).state_dict().values():
            tensor.zero_()
    assert all(torch.equal(t, kept[k]) for k, t in found.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    data = [x.to(dtype) for x in images()]
    found = applied(model, data, "quantization_aware", True, bits=4, activations=8)
    assert found(data[0]).dtype == dtype
    assert torch.equal(found(data[0]), frozen(found)(data[0]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"code": "palette"}, "code must be one of integer, ternary"),
        ({"rounding": "error_feedback"}, "rounding must be nearest"),
        ({"gradient": "none"}, "gradient must be one of lsq, ste"),
        ({"activations": 3}, "activations must be 8, 4 or None"),
        ({"activations": True}, "activations must be 8, 4 or None"),
        ({"bitz": 3}, "unknown option, got 'bitz'"),
    ],
)  # fmt: skip
def test_options_that_are_not_there(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        quantization_aware.read(given, "options")


def test_refusals() -> None:
    model, data = network(), images()
    found = applied(model, data, "quantization_aware", True, bits=4)
    site = plain_site(model, "0")
    options = quantization_aware.read({"bits": 4}, "")
    assert "in training" in str(quantization_aware.refuse(site, options, found[0]))
    assert "quantized" in str(quantization_aware.refuse(site, options, frozen(found)[0]))
    table = nn.Embedding(8, 32)
    rounded = quantization_aware.read({"activations": 8}, "")
    assert "no inputs" in str(quantization_aware.refuse(plain_site(table, ""), rounded, table))


def test_fused_transformer_layers_do_not_compute_past_the_layer() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    found = transforms.apply(
        model, Plan((Step("quantization_aware", "linear1", {"bits": 2}),)), [plain_site(model, "linear1")],
        Context(training=True),
    )  # fmt: skip
    with torch.no_grad():
        fused = found(x)
        gap = float((fused - model(x)).abs().max())
    assert torch.allclose(fused, found(x), atol=1e-6)
    assert gap > 1e-3
