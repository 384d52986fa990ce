"""Tuning block by block and as a whole: it pays on inputs that no step has seen, and never hands back something worse."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from flyweight import transforms
from flyweight.analysis.sites import analyse
from flyweight.errors import UsageError
from flyweight.records import Batch, Plan, Step
from flyweight.transforms import Context, QuantizedLayer, distilled

pytestmark = pytest.mark.usefixtures("one_thread")

TWO: dict[str, Any] = {"bits": 2, "group": 16, "symmetric": False, "scale": "float16"}
CODES: list[dict[str, Any]] = [
    TWO, {"bits": 3, "group": "tensor"}, {"bits": 4}, {"code": "ternary"}, {"code": "palette", "bits": 2},
    {"code": "palette", "bits": 2, "scaled": True, "rows": 8},
]  # fmt: skip


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = hidden_states + self.down(torch.relu(self.up(hidden_states)))
        return found


class Chained(nn.Module):
    """Blocks in a row, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        found: torch.Tensor = self.head(x)
        return found


class Tied(nn.Module):
    """A tiny language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = (
            nn.Embedding(24, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 24, bias=False),
        )
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(torch.tanh(self.mix(self.embed(ids))))
        return found


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def numbers(count: int, seed: int = 1) -> list[Batch]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 16, generator=source) for _ in range(count)]


def stacked(data: Sequence[Batch]) -> torch.Tensor:
    return torch.cat([one for one in data if isinstance(one, torch.Tensor)])


def tokens(count: int, seed: int = 1) -> list[Batch]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 24, (8, 6), generator=source) for _ in range(count)]


def applied(
    model: nn.Module,
    data: list[Batch],
    method: str = "distilled",
    said: list[str] | None = None,
    **options: Any,
) -> nn.Module:
    analysis = analyse(model, data)
    plan = Plan(tuple(Step(method, site.name, options) for site in analysis.sites))
    heard = [] if said is None else said
    context = Context(analysis.statistics, examples=data, say=heard.append)
    return transforms.apply(model, plan, analysis.sites, context)


def far(model: nn.Module, found: nn.Module, data: list[Batch]) -> float:
    with torch.no_grad():
        return float(
            torch.stack([(model(x) - found(x)).square().sum() / model(x).square().sum() for x in data]).mean()
        )


@pytest.mark.parametrize("options", CODES, ids=json.dumps)
def test_tuning_beats_rounding_on_inputs_not_seen(options: dict[str, Any]) -> None:
    model, data, others = seeded(Chained), numbers(16), numbers(8, 2)
    rounded = applied(model, data, "weight_only", **options)
    tuned = applied(model, data, block_passes=2.0, passes=2.0, **options)
    few = options.get("code") == "palette" and not options.get("scaled")  # a layer has four values to move
    assert far(model, tuned, others) < (1.0 if few else 0.95) * far(model, rounded, others)


@pytest.mark.parametrize(
    "own", [{"block_passes": 3.0, "passes": 0.0}, {"block_passes": 0.0, "passes": 3.0}], ids=str
)
def test_each_stage_by_itself_pays(own: dict[str, Any]) -> None:
    model, data, others = seeded(Chained), numbers(16), numbers(8, 2)
    rounded, tuned = applied(model, data, "weight_only", **TWO), applied(model, data, **TWO, **own)
    assert far(model, tuned, others) < 0.95 * far(model, rounded, others)


def test_without_any_pass_it_is_weight_only() -> None:
    model, data = seeded(Chained), numbers(4)
    found = applied(model, data, block_passes=0.0, passes=0.0, **TWO).state_dict()
    wanted = applied(model, data, "weight_only", **TWO).state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_what_tuning_cannot_better_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are far too large spoil the training examples, and the examples kept apart tell."""
    model, data = seeded(Chained), numbers(8)
    monkeypatch.setattr(distilled, "_LEVELS", 50.0)
    monkeypatch.setattr(distilled, "_OTHERS", 5.0)
    said: list[str] = []
    found, wanted = applied(model, data, said=said, **TWO), applied(model, data, "weight_only", **TWO)
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in wanted.state_dict().items())
    told = "was not tuned: on the examples kept apart that did no better"
    assert [told in note for note in said[:2]] == [True, True]
    assert said[0].startswith("blocks.0 ")
    assert "the model was not tuned as a whole" in said[2]


def test_tuning_that_is_kept_says_nothing() -> None:
    said: list[str] = []
    applied(seeded(Chained), numbers(16), said=said, block_passes=2.0, passes=2.0, **TWO)
    assert said == []


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    model, data = seeded(Chained), numbers(6)
    first, second, third = (applied(model, data, seed=seed, **TWO).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert any(not torch.equal(third[name], tensor) for name, tensor in first.items())


def test_the_model_and_its_slopes_stay_as_they_were() -> None:
    model, data = seeded(Chained), numbers(4)
    before = copy.deepcopy(model.state_dict())
    found = applied(model, data, **TWO)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    layers = [m for m in found.modules() if isinstance(m, QuantizedLayer)]
    assert len(layers) == 5
    assert all(layer.code == "integer" for layer in layers)


def test_a_tied_weight_is_tuned_once_and_stays_tied() -> None:
    model, data, others = seeded(Tied), tokens(16), tokens(8, 2)
    options: dict[str, Any] = {"bits": 3, "symmetric": False}
    rounded, tuned = (
        applied(model, data, "weight_only", **options),
        applied(model, data, passes=4.0, **options),
    )
    assert far(model, tuned, others) < 0.9 * far(model, rounded, others)
    head, embed = tuned.get_submodule("head"), tuned.get_submodule("embed")
    assert isinstance(head, QuantizedLayer)
    assert isinstance(embed, QuantizedLayer)
    assert head.integers is embed.integers


def test_a_convolution_is_tuned_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4),
    ).eval()  # fmt: skip
    source = torch.Generator().manual_seed(3)
    data: list[Batch] = [torch.randn(64, 3, 8, 8, generator=source) for _ in range(24)]
    options: dict[str, Any] = {"bits": 3, "symmetric": False}
    rounded = applied(model, data[:16], "weight_only", **options)
    tuned = applied(model, data[:16], passes=1.0, **options)
    assert far(model, tuned, data[16:]) < 0.95 * far(model, rounded, data[16:])


def test_time_that_is_over_ends_the_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, now = seeded(Chained), numbers(8), [0.0]
    rates: list[list[float]] = []

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    class Counted(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    monkeypatch.setattr("flyweight.transforms._teaching.time.monotonic", clock)
    monkeypatch.setattr("flyweight.transforms.distilled.torch.optim.Adam", Counted)
    applied(model, data, block_passes=0.0, passes=1000.0, seconds=6.0, **TWO)
    assert len(rates) == 5  # until the sixth second
    assert {len(one) for one in rates} == {5 * 2}  # two tensors in each of five layers
    assert rates == sorted(rates, reverse=True)


def test_inputs_of_very_different_size_are_tuned_alike() -> None:
    """A channel a thousand times as large as others has slopes as much larger; the others' integers move all the same."""
    model, data, others = seeded(Chained), numbers(32), numbers(8, 2)
    with torch.no_grad():
        for block in model.blocks:
            first = next(layer for layer in block.modules() if isinstance(layer, nn.Linear))
            first.weight[:, ::7] *= 1e3
    rounded, tuned = applied(model, data, "weight_only", **TWO), applied(model, data, **TWO, block_passes=4.0)
    assert far(model, tuned, others) < 0.95 * far(model, rounded, others)


def test_batches_are_split_where_they_are_few() -> None:
    model = seeded(Chained)
    found = distilled.pieces(model, numbers(4))
    assert len(found) == 64
    assert torch.equal(stacked(found), stacked(numbers(4)))
    named: list[Batch] = [{"x": torch.zeros(6, 16)}]
    shapes = [one["x"].shape for one in distilled.pieces(model, named) if isinstance(one, dict)]
    assert shapes == [(1, 16)] * 6
    unlike: list[Batch] = [{"x": torch.zeros(6, 16), "y": torch.zeros(3)}]
    assert distilled.pieces(model, unlike) == unlike


def test_sites_must_agree_on_how_long() -> None:
    model, data = seeded(Chained), numbers(4)
    analysis = analyse(model, data)
    steps = tuple(
        Step("distilled", site.name, {**TWO, "passes": 1.0 + at}) for at, site in enumerate(analysis.sites)
    )
    with pytest.raises(UsageError, match="the same at all sites"):
        transforms.apply(model, Plan(steps), analysis.sites, Context(analysis.statistics, examples=data))


BAD = [
    ({"passes": -1.0}, "passes"), ({"block_passes": 2000}, "block_passes"), ({"seconds": 0}, "seconds"),
    ({"seed": -1}, "seed"), ({"passes": True}, "a number"), ({"passes": None}, "a number"), ({"passes": "1"}, "a number"),
    ({"code": "entropy"}, "code"), ({"bits": 5.5}, "bits"), ({"pases": 1}, "unknown option"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "said"), BAD, ids=str)
def test_bad_options_are_refused_by_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        distilled.read(options, "steps[0].options")


def test_options_go_to_plain_values_and_back() -> None:
    options = distilled.read({**TWO, "rounding": "error_feedback", "passes": 2.0, "seconds": 30}, "here")
    assert distilled.read(options.plain(), "here") == options
    assert options.plain()["seconds"] == 30
    assert distilled.Options().plain() == {}
