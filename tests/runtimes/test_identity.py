"""Deep copies are one, anything that computes otherwise is another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtimes.nets import Function
from torch import nn

from flyweight.runtimes._identity import identity


class Config:
    """An object without a printed form."""

    def __init__(self, width: int) -> None:
        self.width, self.again = width, self


def holding(value: Any) -> nn.Module:
    module = nn.Linear(2, 2)
    module.held = value
    return module


VALUES: list[Callable[[], Any]] = [
    lambda: 3, lambda: [1, {"a": (2.5, None)}], lambda: {1, 2}, lambda: Config(3), lambda: torch.arange(3),
    lambda: torch.relu, lambda: nn.Linear, lambda: Config(4).__init__, lambda: range(3),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES[:-1])
def test_copies_have_one_identity(value: Callable[[], Any]) -> None:
    module = holding(value())
    assert identity(module) == identity(copy.deepcopy(module))


def test_different_values_classes_and_functions_have_different_identities() -> None:
    modules = [holding(value()) for value in VALUES]
    modules += [
        holding(Config(5)),
        holding(torch.arange(1, 4)),
        holding([1, {"a": (2.5, 0)}]),
        nn.Linear(2, 2),
    ]
    modules += [Function(lambda x: x + 1), Function(lambda x: x + 2), nn.Identity()]
    assert len({identity(module) for module in modules}) == len(modules)


def test_training_mode_and_weights_are_no_part_of_it() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2).eval()
    assert identity(first) == identity(second)
