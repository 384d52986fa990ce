"""The border: what passes comes in as a copy, what does not is named."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flyweight.errors import DataError, ModelError
from flyweight.inputs.check import check, check_model, digest, run_example
from flyweight.records import Task
from flyweight.testing.zoo import ZOO, Zoo, missing


def task(model: object, examples: object) -> Task:
    return Task(name="t", model=model, examples=examples, score=lambda predict: 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_every_awkward_model_comes_in_or_is_refused_by_name(entry: Zoo) -> None:
    if reason := missing(entry):
        pytest.skip(reason)
    model = entry.build()
    before, modes = digest(model.state_dict()), [module.training for module in model.modules()]
    given_task = task(model, list(entry.examples()))
    if "no_parameters" in entry.traits:
        with pytest.raises(ModelError, match="must have parameters"):
            check(given_task)
        return
    found, notes = check(given_task)
    assert found.model is not model
    assert not any(module.training for module in found.model.modules())
    assert digest(found.model.state_dict()) == before == digest(model.state_dict())
    assert [module.training for module in model.modules()] == modes
    assert any("training mode" in note for note in notes) == ("training" in entry.traits)


def test_the_copy_shares_no_memory() -> None:
    model = nn.Linear(3, 2)
    found, _ = check(task(model, [torch.ones(1, 3)]))
    with torch.no_grad():
        found.model.weight.zero_()  # type: ignore[operator, union-attr]
    assert model.weight.abs().sum() > 0


@given(st.integers(0, 19), st.sampled_from([math.nan, math.inf, -math.inf]), st.booleans())
def test_one_bad_weight_is_found_in_its_place(index: int, bad: float, in_bias: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 20))
    with torch.no_grad():
        (model[1].bias if in_bias else model[0].weight.view(-1))[index] = bad  # type: ignore[operator, union-attr]
    place = [index] if in_bias else [index // 4, index % 4]
    name = "1.bias" if in_bias else "0.weight"
    with pytest.raises(ModelError) as caught:
        check_model(model)
    assert caught.value.where == f"{name}, first at {place}"
    assert caught.value.got == "1 of 20 values NaN or infinite"


def test_parameters_that_share_memory_without_being_one_are_said() -> None:
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight = nn.Parameter(one.weight.data)
    note = "0.weight, 1.weight share memory, but are parameters of their own and come apart"
    assert [n for n in check_model(nn.Sequential(one, two)) if n.startswith(note)]
    two.weight = one.weight
    assert check_model(nn.Sequential(one, two)) == []


def test_a_mask_may_hold_infinities_but_no_nan() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    assert check_model(model) == []
    model.register_buffer("mask", torch.tensor([0.0, math.nan]))
    with pytest.raises(ModelError, match="mask"):
        check_model(model)


def test_an_example_that_the_model_refuses_is_named() -> None:
    class Short(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] > 3:
                raise ValueError("too many rows")
            return super().forward(x)

    examples = [torch.ones(1, 2), torch.ones(4, 2)]
    assert run_example(Short(2, 2), examples, 0).shape == (1, 2)
    with pytest.raises(DataError, match=r"too many rows \(at examples\[1\], float32 4x2\)"):
        run_example(Short(2, 2), examples, 1)


@pytest.mark.parametrize(
    ("examples", "where"),
    [
        ([torch.tensor([1.0, math.nan])], "examples[0], index [1]"),
        ([(torch.ones(1), torch.tensor([[math.inf]]))], "examples[0][1], index [0, 0]"),
        ([{"x": torch.ones(1)}, {"x": torch.tensor([-math.inf])}], "examples[1][x], index [0]"),
        ([torch.ones(2), [1.0]], "examples[1]"),
        ([(torch.ones(2), None)], "examples[0][1]"),
        ([()], "examples[0]"),
    ],
)
def test_a_bad_example_is_named(examples: Sequence[object], where: str) -> None:
    with pytest.raises(DataError) as caught:
        check(task(nn.Linear(2, 1), examples))
    assert caught.value.where == where
    assert caught.value.way_out


@pytest.mark.parametrize(
    "examples", [None, 3, "text", {"x": torch.ones(1)}, iter([torch.ones(1)]), torch.ones(2, 2)]
)
def test_examples_must_be_a_sequence(examples: object) -> None:
    with pytest.raises(DataError, match="sequence of batches"):
        check(task(nn.Linear(2, 1), examples))


def test_a_batch_that_is_a_mapping_of_another_class_is_told_how_to_become_a_dict() -> None:
    from collections import UserDict

    with pytest.raises(DataError, match=r"got UserDict .*dict\(batch\)"):
        check(task(nn.Linear(2, 1), [UserDict(input=torch.ones(1, 2))]))


@given(st.lists(st.floats(-5, 5, width=32), min_size=50, max_size=200))
def test_usual_examples_are_not_remarked_upon(values: list[float]) -> None:
    values = [*values, 1.0, -1.0] * 5
    _, notes = check(task(nn.Linear(1, 1).eval(), [torch.tensor(values)[:, None]]))
    assert notes == ()


def test_whole_numbers_have_no_range() -> None:
    _, notes = check(task(nn.Embedding(3, 2).eval(), [torch.zeros(4, dtype=torch.long)]))
    assert notes == ()


def test_equal_tensors_have_equal_digests() -> None:
    one = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor(True),
        "c": torch.ones(2, dtype=torch.bfloat16),
    }
    assert digest(one) == digest({name: value.clone() for name, value in one.items()})
    transposed = {**one, "a": one["a"].reshape(3, 2)}
    renamed = {"x": one["a"], "b": one["b"], "c": one["c"]}
    flipped = {**one, "b": torch.tensor(False)}
    assert len({digest(state) for state in (one, transposed, renamed, flipped)}) == 4
