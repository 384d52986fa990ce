"""Blocks go for good: what stands in their place, what takes over, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from flyweight import transforms
from flyweight.analysis.influence import answers_of, damage
from flyweight.analysis.sites import analyse
from flyweight.errors import UsageError
from flyweight.inputs.check import run
from flyweight.records import Plan, Step
from flyweight.transforms import Context, drop
from flyweight.transforms._removal import removed
from flyweight.transforms._takeover import taken_over

pytestmark = pytest.mark.usefixtures("one_thread")


class Branch(nn.Module):
    """What is added to the stream: a norm, two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(relu(self.up(x)))


class Layer(nn.Module):
    """A block with its residual path inside, that gives a tuple as older transformers do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(width), Branch(width)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, None]:
        return x + scale * self.branch(self.norm(x)), None


class Model(nn.Module):
    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, width), nn.Linear(width, 3)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, scale=1.0)[0]
        return self.head(x)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def examples() -> list[torch.Tensor]:
    return list(torch.randn(6, 20, 4, generator=torch.Generator().manual_seed(1)))


def applied(model: nn.Module, plan: Plan, examples: list[torch.Tensor]) -> nn.Module:
    found = analyse(model, examples)
    return transforms.apply(model, plan, found.sites, Context(found.statistics, examples=examples))


def step(path: str, **options: object) -> Plan:
    return Plan((Step("drop", path, options),))


def test_a_block_becomes_its_input_and_a_branch_nothing(model, examples) -> None:
    plain = copy.deepcopy(model)
    plain.layers = nn.ModuleList([model.layers[0], model.layers[2]])
    small = applied(model, step("layers.1", compensate=False), examples)
    assert torch.equal(run(small, examples[0]), run(plain, examples[0]))
    assert not list(small.layers[1].parameters())
    half = applied(model, step("layers.1.branch", compensate=False), examples)
    assert torch.equal(run(half, examples[0]), run(plain, examples[0]))
    assert not list(half.layers[1].parameters())  # the norm that only the branch read is gone too
    assert len(list(model.layers[1].parameters())) == 6


def test_a_layer_before_takes_over_by_least_squares(model, examples) -> None:
    """Against the plain regression of the missing part on the inputs of the layer before, penalty aside."""
    many = list(torch.randn(40, 50, 4, generator=torch.Generator().manual_seed(2)))
    small = applied(model, step("layers.1", compensate=False), many)
    values = taken_over(model, small, "layers.1", many)
    assert set(values) == {"layers.0.branch.down.weight", "layers.0.branch.down.bias"}
    x = torch.cat(many)
    with torch.no_grad():
        stem = model.stem(x)
        hidden = relu(model.layers[0].branch.up(model.layers[0].norm(stem)))
        before = model.layers[0](stem)[0]
        wanted = model.layers[1](before)[0] - stem
        design = torch.cat([hidden, torch.ones(len(x), 1)], 1)
        best = (wanted - design @ torch.linalg.lstsq(design, wanted).solution).square().sum()
        new = torch.cat(
            [values["layers.0.branch.down.weight"], values["layers.0.branch.down.bias"][:, None]], 1
        )
        found = (wanted - design @ new.T).square().sum()
        nothing = (wanted - model.layers[0].branch(model.layers[0].norm(stem))).square().sum()
    assert best <= found < 1.05 * best
    assert found < 0.9 * nothing


def test_what_takes_over_makes_the_output_nearer_or_is_left(model, examples) -> None:
    wanted = answers_of(model, examples)
    for path in ("layers.0", "layers.1", "layers.2.branch"):
        plain, better = (
            damage(wanted, answers_of(applied(model, step(path, compensate=some), examples), examples))
            for some in (False, True)
        )
        assert better <= plain
        assert better < 0.9 * plain or path == "layers.0"  # the stem has few inputs to give more


class Normed(nn.Module):
    """Norms behind the sums, as in BERT: the state between blocks is what a norm gives."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.head = Branch(8), norm, Layer(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.norm(x + self.first(x)))[0])


class Offset(nn.Module):
    """A norm whose factors are its weight and 1: twice the weight is not twice the output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + self.weight)


def test_a_norm_takes_over_by_its_factors_where_they_are_factors() -> None:
    torch.manual_seed(0)
    examples = list(torch.randn(6, 30, 8))
    for norm, names in (
        (nn.LayerNorm(8), {"norm.weight", "norm.bias"}),
        (nn.RMSNorm(8), {"norm.weight"}),
        (Offset(), set()),
    ):
        model = Normed(norm).eval()
        small = applied(model, step("second", compensate=False), examples)
        values = taken_over(model, small, "second", examples)
        assert set(values) == names
        wanted = answers_of(model, examples)
        new = removed(small, (), {}, values)
        assert damage(wanted, answers_of(new, examples)) <= damage(wanted, answers_of(small, examples))


def test_a_completed_plan_brings_the_structure_back_without_data(model, examples) -> None:
    context = Context(examples=examples)
    plan = transforms.complete(model, step("layers.1.branch"), context)
    assert [one.site for one in plan.steps] == ["layers.1.branch", "layers.1.norm"]
    plan = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    small = applied(model, plan, examples)
    torch.manual_seed(5)
    fresh = transforms.apply(Model().eval(), plan, [], Context(rebuilding=True))
    fresh.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(run(fresh, examples[0]), run(small, examples[0]))


def test_layers_of_what_is_left_are_quantized_in_the_same_plan_and_others_are_no_sites(
    model, examples
) -> None:
    steps = (
        Step("drop", "layers.1"),
        Step("dynamic_int8", "head"),
        Step("prune", "layers.0.branch.up:neurons"),
    )
    small = applied(model, Plan(steps), examples)
    assert small.layers[0].branch.up.out_features == 12
    assert bool(torch.isfinite(run(small, examples[0])).all())
    with pytest.raises(UsageError, match="a step's site must be a layer"):
        applied(model, Plan((*steps, Step("weight_only", "layers.1.branch.up"))), examples)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("layers.7", "did you mean layers"),
        ("", "the path of a module"),
        ("head", "has the shape of no argument"),
        ("layers", "does not run"),
    ],
)
def test_what_is_no_block_is_refused_with_the_reason(model, examples, path: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        applied(model, step(path), examples)


def test_the_only_block_a_nested_one_and_missing_examples_are_refused(model, examples) -> None:
    only = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU())).eval()
    with pytest.raises(UsageError, match="depend on some of its weights"):
        applied(only, step("0"), examples)
    with pytest.raises(UsageError, match="it is in layers"):
        applied(model, Plan((Step("drop", "layers.1"), Step("drop", "layers.1.branch"))), examples)
    with pytest.raises(UsageError, match="by examples"):
        transforms.apply(model, step("layers.1"), [], Context())
    with pytest.raises(UsageError, match="one step of each stage"):
        transforms.check(model, Plan(step("layers.1").steps * 2), [])


class Needy(nn.Module):
    """What a block gives besides its first tensor is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = Pair(), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = self.pair(x)
        return self.head(one + other)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(x), x


def test_blocks_without_which_the_model_does_not_run_and_blocks_that_run_twice_are_refused() -> None:
    examples = [torch.randn(5, 8)]
    with pytest.raises(UsageError, match="must run without a block"):
        applied(Needy().eval(), step("pair"), examples)
    shared = Branch(8)
    twice = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 3)).eval()
    with pytest.raises(UsageError, match="runs 2 times"):
        applied(twice, step("0"), examples)


@pytest.mark.parametrize(
    "options", [{"gives": "noise"}, {"source": "0"}, {"elements": -1}, {"compensate": 1}]
)
def test_bad_options_are_refused_when_they_are_read(model, options) -> None:
    with pytest.raises(UsageError):
        transforms.check(model, step("layers.1", **options), [])


def test_a_model_in_training_mode_is_looked_at_in_eval_mode_and_left_as_it_is(model, examples) -> None:
    training = nn.Sequential(
        model.stem, nn.BatchNorm1d(8), model.layers[0].branch, nn.Dropout(), model.head
    ).train()
    before = copy.deepcopy(training.state_dict())
    small = transforms.apply(training, step("2"), [], Context(examples=examples))
    assert (small.training, training.training) == (False, True)
    assert all(torch.equal(value, before[name]) for name, value in training.state_dict().items())


def test_tied_weights_stay_tied_and_are_not_fitted(examples) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    model.layers[2].branch = model.layers[0].branch  # one branch in two layers
    small = applied(model, step("layers.1"), examples)
    assert small.layers[2].branch is small.layers[0].branch
    assert torch.equal(small.layers[0].branch.down.weight, model.layers[0].branch.down.weight)


def test_the_blocks_that_are_missed_least_are_found(model, examples) -> None:
    with torch.no_grad():
        model.layers[1].branch.down.weight *= 1e-3
        model.layers[1].branch.down.bias *= 0
    layers = [f"layers.{index}" for index in range(3)]
    for by in ("damage", "influence"):
        assert drop.plan(model, examples, 1, within=layers, by=by).steps[0].site == "layers.1"
    both = drop.plan(model, examples, 2, within=layers)
    assert len({one.site for one in both.steps}) == 2
    with pytest.raises(UsageError, match="must have 4 blocks"):
        drop.plan(model, examples, 4, within=layers, by="influence")
    assert set(drop.blocks(model, examples)) == {*layers, *(f"{one}.branch" for one in layers)}


class Picture(nn.Module):
    """Two residual branches of convolutions, with or without norms at their ends."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 3)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1),
                nn.BatchNorm2d(6) if normed else nn.Identity(),
            )
            for _ in range(2)
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(relu(x).mean((2, 3)))


@pytest.mark.parametrize(("normed", "taker"), [(False, "branches.0.2"), (True, "branches.0.3")])
def test_convolutions_and_their_norms_take_over_what_a_branch_gave(normed: bool, taker: str) -> None:
    torch.manual_seed(0)
    model = Picture(normed).eval()
    examples = list(torch.randn(4, 8, 3, 6, 6))
    small = applied(model, step("branches.1", compensate=False, gives="zeros"), examples)
    values = taken_over(model, small, "branches.1", examples)
    assert set(values) == {f"{taker}.weight", f"{taker}.bias"}
    wanted = answers_of(model, examples)
    new = removed(small, (), {}, values)
    assert damage(wanted, answers_of(new, examples)) < damage(wanted, answers_of(small, examples))
    if not normed:  # against the plain regression on all that the kernel reads
        seen, gone = [], []
        with torch.no_grad():
            for x in examples:
                stem = model.stem(x)
                rows = nn.functional.unfold(model.branches[0][:2](stem), 3, padding=1).mT.flatten(0, 1)
                seen.append(torch.cat([rows, torch.ones(len(rows), 1)], 1))
                gone.append(model.branches[1](stem + model.branches[0](stem)).movedim(1, -1).flatten(0, 2))
        design, missing = torch.cat(seen), torch.cat(gone)
        best = (missing - design @ torch.linalg.lstsq(design, missing).solution).square().sum()
        change = torch.cat(
            [
                (values[f"{taker}.weight"] - model.branches[0][2].weight).flatten(1),
                (values[f"{taker}.bias"] - model.branches[0][2].bias)[:, None],
            ],
            1,
        ).detach()
        assert best <= (missing - design @ change.T).square().sum() < 1.05 * best
