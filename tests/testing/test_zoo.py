"""Every model of the zoo runs, is the same each time, and is awkward in just the ways it claims."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flyweight.records import Batch
from flyweight.testing.zoo import TRAITS, ZOO, Zoo, missing

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
TABLES = (nn.Embedding, nn.EmbeddingBag)
REQUIRED = {
    "tied", "reused", "dict_output", "tuple_output", "record_output", "grouped", "depthwise", "branching",
    "recurrent", "batchnorm", "relu6", "residual", "conv1d", "transposed", "embedding", "attention",
    "outside", "layernorm", "row", "no_parameters", "functional", "frozen", "shared_buffer", "dynamic",
    "training", "dropout", "bfloat16", "wide_range", "zero_channel", "constant_channel", "hf_conv1d",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def built(entry: Zoo) -> nn.Module:
    reason = missing(entry)
    if reason:
        pytest.skip(reason)
    return entry.build()


def run(model: nn.Module, batch: Batch) -> Any:
    with torch.no_grad():
        if isinstance(batch, Tensor):
            return model(batch)
        return model(**batch) if isinstance(batch, dict) else model(*batch)


def leaves(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if dataclasses.is_dataclass(output):
        return leaves([getattr(output, field.name) for field in dataclasses.fields(output)])
    if isinstance(output, Mapping):
        return leaves(list(output.values()))
    return [leaf for part in output or () for leaf in leaves(part)]


def calls(entry: Zoo) -> dict[str, int]:
    """How often one forward pass calls each module, by name."""
    model = built(entry).eval()
    counts = dict.fromkeys(dict(model.named_modules()), 0)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: counts.__setitem__(name, counts[name] + 1))
    run(model, entry.examples()[0])
    return counts


def has(*kinds: type[nn.Module]) -> Callable[[Zoo], bool]:
    return lambda entry: any(isinstance(module, kinds) for module in built(entry).modules())


def modules(entry: Zoo, *kinds: type[nn.Module]) -> list[Any]:
    return [module for module in built(entry).modules() if isinstance(module, kinds)]


def weights(entry: Zoo) -> list[Tensor]:
    return [weight for name, weight in built(entry).named_parameters() if name.endswith("weight")]


def output(entry: Zoo) -> Any:
    return run(built(entry).eval(), entry.examples()[0])


def shapes(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape[1:]) for leaf in leaves(batch)]


def shared(named: Callable[..., Any]) -> bool:
    found = [tensor.data_ptr() for _, tensor in named(remove_duplicate=False)]
    return len(found) > len(set(found))


def is_outside(entry: Zoo) -> bool:
    """There is a Linear that is never called, and the output depends on its weight."""
    before, uncalled = leaves(output(entry)), [name for name, count in calls(entry).items() if not count]
    model = built(entry).eval()
    for name in uncalled:
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                module.weight.zero_()
    after = leaves(run(model, entry.examples()[0]))
    return not all(torch.equal(left, right) for left, right in zip(before, after, strict=True))


def is_branching(entry: Zoo) -> bool:
    try:
        torch.fx.symbolic_trace(built(entry))
    except (torch.fx.proxy.TraceError, TypeError):
        return True
    return False


def is_residual(entry: Zoo) -> bool:
    graph = torch.fx.symbolic_trace(built(entry)).graph
    return any(node.target.__name__ == "add" for node in graph.nodes if node.op == "call_function")


def is_functional(entry: Zoo) -> bool:
    return any("." not in name for name, _ in built(entry).named_parameters())


def is_normed(entry: Zoo) -> bool:
    norms = modules(entry, nn.BatchNorm1d, nn.BatchNorm2d)
    return bool(norms) and all(norm.running_mean.any() and norm.running_var.std() > 0.1 for norm in norms)


def has_zero_channel(entry: Zoo) -> bool:
    layers = [layer for layer in modules(entry, nn.Linear) if layer.bias is not None]
    return any(bool((~layer.weight.any(1) & (layer.bias == 0)).any()) for layer in layers)


def has_constant_channel(entry: Zoo) -> bool:
    rows = [row for weight in weights(entry) if weight.dim() == 2 for row in weight if len(row) > 1]
    return any(row.min() == row.max() != 0 for row in rows)


def is_mostly_tables(entry: Zoo) -> bool:
    tables = sum(table.weight.numel() for table in modules(entry, *TABLES))
    return 2 * tables > sum(parameter.numel() for parameter in built(entry).parameters())


def range_of(weight: Tensor) -> float:
    found = weight.detach().abs()[weight != 0]
    return float(found.max() / found.min())


CHECKS: dict[str, Callable[[Zoo], bool]] = {
    "attention": lambda entry: any("Attention" in type(module).__name__ for module in built(entry).modules()),
    "batchnorm": is_normed,
    "bfloat16": lambda entry: {weight.dtype for weight in weights(entry)} == {torch.bfloat16},
    "branching": is_branching,
    "constant_channel": has_constant_channel,
    "conv1d": has(nn.Conv1d),
    "depthwise": lambda entry: any(c.groups == c.in_channels > 1 for c in modules(entry, *CONVOLUTIONS)),
    "dict_input": lambda entry: all(isinstance(batch, dict) for batch in entry.examples()),
    "dict_output": lambda entry: type(output(entry)) is dict,
    "dropout": lambda entry: any(drop.p > 0 for drop in modules(entry, nn.Dropout)),
    "dynamic": lambda entry: any(shapes(batch) != shapes(entry.examples()[0]) for batch in entry.examples()),
    "embedding": is_mostly_tables,
    "frozen": lambda entry: not all(parameter.requires_grad for parameter in built(entry).parameters()),
    "functional": is_functional,
    "grouped": lambda entry: any(1 < c.groups < c.in_channels for c in modules(entry, *CONVOLUTIONS)),
    "hf_conv1d": lambda entry: any(type(module).__name__ == "Conv1D" for module in built(entry).modules()),
    "layernorm": has(nn.LayerNorm),
    "no_parameters": lambda entry: not list(built(entry).parameters()),
    "outside": is_outside,
    "record_output": lambda entry: dataclasses.is_dataclass(output(entry)),
    "recurrent": has(nn.RNNBase, nn.RNNCellBase),
    "relu6": has(nn.ReLU6),
    "residual": is_residual,
    "reused": lambda entry: max(calls(entry).values()) > 1,
    "row": lambda entry: any(len(weight) == 1 for weight in weights(entry)),
    "shared_buffer": lambda entry: shared(built(entry).named_buffers),
    "tied": lambda entry: shared(built(entry).named_parameters),
    "training": lambda entry: built(entry).training,
    "transposed": has(nn.ConvTranspose2d),
    "tuple_input": lambda entry: all(isinstance(batch, tuple) for batch in entry.examples()),
    "tuple_output": lambda entry: type(output(entry)) is tuple,
    "wide_range": lambda entry: any(range_of(weight) > 1e9 for weight in weights(entry)),
    "zero_channel": has_zero_channel,
}
# Models may have these without being awkward for it.
LOOSE = {"attention", "branching", "dropout", "dynamic", "embedding", "layernorm", "relu6", "residual", "row"}


def each(entries: tuple[Zoo, ...] = ZOO) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("entry", entries, ids=[entry.name for entry in entries])


@each()
def test_runs_on_all_its_examples(entry: Zoo) -> None:
    model, examples = built(entry).eval(), entry.examples()
    assert 3 <= len(examples) <= 6
    assert all(tensor.shape[0] == 1 for tensor in leaves(examples[0]))
    for batch in examples:
        found = leaves(run(model, batch))
        assert found
        assert all(torch.isfinite(leaf.float()).all() for leaf in found)
        assert all(len(leaf) == len(leaves(batch)[0]) for leaf in found)
    assert sum(parameter.numel() for parameter in model.parameters()) < 20_000


@each()
def test_is_the_same_each_time_and_leaves_the_random_state_alone(entry: Zoo) -> None:
    state = torch.random.get_rng_state()
    one, other = built(entry), built(entry)
    inputs = [entry.examples(), entry.examples()]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    for batch, again in zip(*inputs, strict=True):
        for left, right in zip(leaves(run(one.eval(), batch)), leaves(run(other.eval(), again)), strict=True):
            assert torch.equal(left, right)


@each()
def test_answers_depend_on_the_input(entry: Zoo) -> None:
    model, batch = built(entry).eval(), entry.examples()[1]
    rows = leaves(run(model, batch))[0]
    assert not torch.equal(rows[0], rows[1])


@each()
def test_has_the_traits_it_claims(entry: Zoo) -> None:
    assert entry.traits <= set(TRAITS)
    for trait in sorted(entry.traits):
        assert CHECKS[trait](entry), f"{entry.name} claims to be {trait}: {TRAITS[trait]}"


@each(tuple(entry for entry in ZOO if entry.needs is None))
def test_has_no_trait_that_it_does_not_claim(entry: Zoo) -> None:
    for trait in sorted(set(TRAITS) - entry.traits - LOOSE):
        assert not CHECKS[trait](entry), f"{entry.name} does not claim to be {trait}: {TRAITS[trait]}"


@each(tuple(entry for entry in ZOO if "training" not in entry.traits))
def test_is_in_eval_mode(entry: Zoo) -> None:
    assert not any(module.training for module in built(entry).modules())


def test_the_model_in_training_mode_answers_differently_each_time() -> None:
    entry = next(entry for entry in ZOO if "training" in entry.traits)
    model, batch = entry.build(), entry.examples()[2]
    assert not torch.equal(run(model, batch), run(model, batch))
    assert not torch.equal(model[1].running_mean, entry.build()[1].running_mean)


@each()
def test_can_be_copied(entry: Zoo) -> None:
    model = built(entry).eval()
    batch = entry.examples()[0]
    for left, right in zip(leaves(run(model, batch)), leaves(run(copy.deepcopy(model), batch)), strict=True):
        assert torch.equal(left, right)


def test_the_zoo_is_large_and_named_apart() -> None:
    assert len(ZOO) >= 16
    assert len({entry.name for entry in ZOO}) == len(ZOO)
    assert len([entry for entry in ZOO if entry.needs is None]) >= 16
    assert all(entry.note for entry in ZOO)


def test_every_awkward_thing_is_in_the_zoo() -> None:
    assert {trait for entry in ZOO for trait in entry.traits} == set(TRAITS) == set(CHECKS)
    assert set(TRAITS) >= REQUIRED
    assert list(TRAITS) == sorted(TRAITS)


def test_a_missing_package_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    foreign = next(entry for entry in ZOO if entry.needs == "transformers")
    assert missing(foreign) == f"{foreign.name} needs the package transformers: pip install transformers"
    assert missing(next(entry for entry in ZOO if entry.needs is None)) is None
