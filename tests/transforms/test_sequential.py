"""Layers changed in order: what each learns is compared with plain sums in the whole model as changed before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from flyweight.analysis.bare import is_bare, layer_at
from flyweight.analysis.gram import grams, lazily
from flyweight.analysis.sites import analyse, plain_site
from flyweight.errors import UsageError
from flyweight.inputs.check import digest, run
from flyweight.records import Batch, Plan, Step
from flyweight.testing.zoo import ZOO, missing
from flyweight.transforms import (
    Context,
    QuantizedLayer,
    _sequential,
    apply,
    substitute,
    weight_only,
    with_tied,
)

pytestmark = pytest.mark.usefixtures("one_thread")
TWO = weight_only.read({"bits": 2, "group": None}, "")
"""Rounding to nearest: what it does to a layer does not depend on what it knows of it."""


class Block(nn.Module):
    """Two layers that read one tensor, one that reads what they gave, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, shift: float) -> torch.Tensor:
        return x + self.out(torch.tanh(self.left(x)) * self.right(x)) + shift


class Net(nn.Module):
    """A layer before, blocks, and a layer after."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.stem = nn.Linear(8, 3), nn.Linear(8, 8)  # not in the order in which they run
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> Any:
        x = torch.tanh(self.stem(x))
        for index, block in enumerate(self.blocks):
            x = block(x, shift=0.1 * index)
        return self.head(torch.tanh(x))


def data(count: int = 4, *shape: int) -> list[Batch]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(*(shape or (5 + index, 8)), generator=random) for index in range(count)]


def inputs(model: nn.Module, path: str, examples: list[Batch]) -> torch.Tensor:
    """All rows that a linear layer reads, float64."""
    found: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any) -> None:
        found.append(args[0].detach().reshape(-1, args[0].shape[-1]).double())

    hook = model.get_submodule(path).register_forward_pre_hook(keep)
    for batch in examples:
        run(model, batch)
    hook.remove()
    return torch.cat(found)


class Spy:
    """Rounds each site to 2 bits, and compares what it could have learned with the whole model as changed so far."""

    def __init__(self, model: nn.Module, examples: list[Batch], learning: list[str]) -> None:
        self.model, self.examples, self.learning = model, examples, learning
        self.done: dict[str, nn.Module] = {}
        self.order: list[str] = []

    def __call__(self, path: str, context: Context) -> Mapping[str, nn.Module]:
        self.order.append(path)
        if path in self.learning:
            own, cross = context.gram(path), context.cross(path)
            assert own is not None
            now = inputs(substitute(self.model, self.done), path, self.examples)
            before = inputs(self.model, path, self.examples)
            assert torch.allclose(own.double(), now.T @ now / len(now), rtol=1e-3, atol=1e-4), path
            expected = before.T @ now / len(now)
            assert torch.allclose(
                expected, (own if cross is None else cross).double(), rtol=1e-3, atol=1e-4
            ), path
        new = weight_only.replace(self.model, plain_site(self.model, path), TWO, Context())
        self.done.update(new)
        return new


def spied(model: nn.Module, examples: list[Batch], learning: list[str], others: list[str]) -> Spy:
    spy = Spy(model, examples, learning)
    work = _sequential.Work(learning, others, set(learning), Context(examples=examples), spy)
    found = _sequential.in_order(model, work)
    assert found == spy.done
    assert {*learning, *others} == set(found)
    return spy


def test_each_layer_learns_behind_the_changes_before_it() -> None:
    model = Net().eval()
    inner = [f"blocks.{index}.{name}" for index in range(3) for name in ("out", "left", "right")]
    found = spied(model, data(), ["head", *inner, "stem"], []).order
    within = [f"blocks.{index}.{name}" for index in range(3) for name in ("left", "right", "out")]
    assert found == ["stem", *within, "head"]


def test_layers_that_need_not_learn_are_changed_too() -> None:
    model = Net().eval()
    found = spied(
        model, data(), ["blocks.1.out", "blocks.2.left"], ["stem", "blocks.0.left", "blocks.1.left", "head"]
    )
    assert found.order[:2] == ["stem", "blocks.0.left"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["mlp", "encoder", "layer_norm", "tiny_bert", "tiny_llama"])
def test_models_of_the_zoo(name: str) -> None:
    entry = next(one for one in ZOO if one.name == name)
    if missing(entry):
        pytest.skip(str(missing(entry)))
    model, examples = entry.build().eval(), list(entry.examples())
    sites = analyse(model, examples).sites
    learning = [s.name for s in sites if s.kind == "linear" and not is_bare(layer_at(model, s.name))]
    others = [site.name for site in sites if site.name not in learning and site.kind != "conv"]
    before = digest(model.state_dict())
    spied(model, examples, learning, others)
    assert digest(model.state_dict()) == before


def test_convolutions_with_groups() -> None:
    entry = next(one for one in ZOO if one.name == "depthwise_conv")
    model, examples = entry.build().eval(), list(entry.examples())
    learning = [site.name for site in analyse(model, examples).sites]
    done: dict[str, nn.Module] = {}

    def change(path: str, context: Context) -> Mapping[str, nn.Module]:
        expected = grams(substitute(model, done), [path], examples)[path]
        found = context.gram(path)
        assert found is not None
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        done.update(weight_only.replace(model, plain_site(model, path), weight_only.Options(), Context()))
        return {path: done[path]}

    work = _sequential.Work(learning, [], set(learning), Context(examples=examples), change)
    assert _sequential.in_order(model, work) == done
    assert list(done) == learning


def test_a_layer_that_runs_twice_in_a_block_counts_both_times() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.inner(torch.tanh(self.inner(x)))) + x

    torch.manual_seed(0)
    spied(nn.Sequential(Twice(), Twice()).eval(), data(), ["0.inner", "1.inner"], [])


def plan(model: nn.Module, options: Mapping[str, Any]) -> Plan:
    sites = analyse(model, data()).sites
    return Plan(
        tuple(
            Step("weight_only", site.name, {"bits": 2, "group": None, "symmetric": False, **options})
            for site in sites
        )
    )


def applied(model: nn.Module, context: Context, options: Mapping[str, Any]) -> nn.Module:
    return apply(model, plan(model, options), analyse(model, data()).sites, context)


def error(model: nn.Module, found: nn.Module, examples: list[Batch]) -> float:
    pairs = [(run(model, batch), run(found, batch)) for batch in examples]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs))


def contexts(model: nn.Module, examples: list[Batch]) -> tuple[Context, Context]:
    """What is learned in the original, and what is learned in order."""
    analysis = analyse(model, examples)
    gram = lazily(model, [site.name for site in analysis.sites], examples)
    return Context(analysis.statistics, gram), Context(analysis.statistics, gram, examples=examples)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 4 * self.outer(torch.relu(self.inner(x)))


@pytest.mark.parametrize("rounding", ["error_feedback", "coordinate"])
def test_a_deep_model_comes_out_better_where_each_layer_makes_up_for_those_before(rounding: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Residual() for _ in range(6)]).eval()
    mix = torch.randn(4, 16)
    examples = [torch.randn(256, 4) @ mix + 0.1 * torch.randn(256, 16) for _ in range(6)]
    still, ordered = contexts(model, examples[:4])
    sites = analyse(model, examples).sites
    given = {"bits": 3, "group": None, "symmetric": False, "rounding": rounding}
    found = []
    for context, drift in ((still, 0.0), (ordered, 0.5)):
        steps = Plan(tuple(Step("weight_only", site.name, {**given, "drift": drift}) for site in sites))
        found.append(error(model, apply(model, steps, sites, context), examples[4:]))
    assert found[1] < 0.7 * found[0]


def test_the_model_stays_and_the_answer_is_the_same_each_time() -> None:
    model, examples = Net().train(), data()
    context = contexts(model, examples)[1]
    before = digest(model.state_dict())
    first, second = (applied(model, context, {"rounding": "error_feedback", "drift": 0.5}) for _ in range(2))
    assert digest(first.state_dict()) == digest(second.state_dict())
    assert digest(model.state_dict()) == before
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not own & {tensor.untyped_storage().data_ptr() for tensor in first.state_dict().values()}
    assert sum(isinstance(module, QuantizedLayer) for module in first.modules()) == 11


def test_without_a_chain_all_is_learned_in_the_original() -> None:
    entry = next(one for one in ZOO if one.name == "dict_output")
    model, examples = entry.build().eval(), list(entry.examples())
    still, ordered = contexts(model, examples)
    sites = analyse(model, examples).sites
    steps = Plan(
        tuple(Step("weight_only", site.name, {"bits": 3, "rounding": "error_feedback"}) for site in sites)
    )
    one, other = (apply(model, steps, sites, context) for context in (still, ordered))
    assert digest(one.state_dict()) == digest(other.state_dict())


def test_examples_that_take_another_way_leave_it_at_that() -> None:
    class Skipping(Net):
        def forward(self, x: torch.Tensor) -> Any:
            x = torch.tanh(self.stem(x))
            for index, block in enumerate(self.blocks):
                x = x if len(x) == 1 and index == 1 else block(x, shift=0.0)
            return self.head(x)

    model = Skipping().eval()
    work = _sequential.Work(
        ["blocks.1.out"], [], set(), Context(examples=[*data(), torch.ones(1, 8)]), Spy(model, [], [])
    )
    assert _sequential.in_order(model, work) is None


def test_a_refused_step_is_named_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net().eval()
    context = contexts(model, data())[1]
    monkeypatch.setattr(_sequential, "in_order", lambda *given: pytest.fail("computed"))
    steps = Plan(
        (
            Step("weight_only", "stem", {"rounding": "error_feedback"}),
            Step("weight_only", "head", {"group": 16}),
        )
    )
    with pytest.raises(UsageError, match=r"head.*steps\[1\]"):
        apply(model, steps, analyse(model, data()).sites, context)


def test_a_layer_that_no_example_reaches_is_named() -> None:
    class Branch(Block):
        def forward(self, x: torch.Tensor, shift: float) -> torch.Tensor:
            return super().forward(x, shift) if x.numel() > 1000 else x + self.left(x)

    model = Net().eval()
    model.blocks[1] = Branch()
    context = Context(examples=data())
    site = plain_site(model, "blocks.1.out")
    step = Step("weight_only", site.name, {"rounding": "error_feedback"})
    with pytest.raises(UsageError, match=r"blocks\.1\.out"):
        apply(model, Plan((step,)), [site], context)


class Talk(nn.Module):
    """Blocks between a lookup and a head that hold one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, shift=0.1)
        found: torch.Tensor = self.head(x)
        return found


def test_a_tied_weight_is_changed_first_and_blocks_see_its_change() -> None:
    model, examples = Talk(), [torch.randint(12, (3, 5 + index)) for index in range(3)]
    seen = analyse(model, examples)
    told: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]] = {}

    def change(site: str, context: Context) -> Mapping[str, nn.Module]:
        told[site] = context.gram(site), context.cross(site)
        found = weight_only.replace(model, known[site], TWO, context)
        return with_tied(model, known[site], found)

    known = {site.name: site for site in seen.sites}
    context = Context(seen.statistics, examples=examples)
    tied = {"head": known["head"].tied}
    work = _sequential.Work(list(known), [], set(known), context, change, tied)
    changes = _sequential.in_order(model, work)
    assert changes is not None
    assert next(iter(told)) == "head"
    assert told["head"][1] is None  # nothing has changed before it
    wanted = grams(model, ["head"], examples)["head"]
    assert torch.allclose(told["head"][0], wanted, rtol=1e-4, atol=1e-6)
    behind = substitute(model, {path: changes[path] for path in ("head", "embed")})
    entering = [behind.embed(tokens).reshape(-1, 8).detach() for tokens in examples]
    rows = torch.cat(entering).double()
    assert torch.allclose(told["blocks.0.left"][0].double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
    assert told["blocks.0.left"][1] is not None


def test_blocks_that_share_a_weight_are_not_changed_one_by_one() -> None:
    model, examples = Net(), data()
    model.blocks[1].left.weight = model.blocks[0].left.weight
    seen = analyse(model, examples)
    tied = {site.name: site.tied for site in seen.sites if site.tied}
    assert tied == {"blocks.0.left": ("blocks.1.left",)}
    names = [site.name for site in seen.sites]
    work = _sequential.Work(names, [], set(), Context(examples=examples), lambda *_: {}, tied)
    assert _sequential.in_order(model, work) is None
