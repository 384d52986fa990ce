"""Models with other modules at some paths: as copies of their own, or as views that share all tensors with the model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def substitute(model: nn.Module, changes: Mapping[str, nn.Module]) -> nn.Module:
    """A deep copy of a model with other modules at some paths; shared modules and tied parameters stay shared.

    So does a bias that another module holds too, where the new module has one that is equal.
    """
    memo = _planted(model, changes)
    found = copy.deepcopy(model, memo)
    for path, new in changes.items():
        for name, own in model.get_submodule(path).named_parameters(recurse=False):
            for module in (new, getattr(new, "inner", None)):
                _tie(module, name, memo.get(id(own)))
    return found


def view(model: nn.Module, changes: Mapping[str, nn.Module]) -> nn.Module:
    """As `substitute`, but parameters and buffers are the model's own: to look through, not to keep or to change."""
    own = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, {**own, **_planted(model, changes)})


def _tie(module: nn.Module | None, name: str, held: Any) -> None:
    """Give a module the parameter that the copy of another one holds, if its own of that name is equal."""
    own = None if module is None else module._parameters.get(name)
    if module is not None and own is not None and isinstance(held, nn.Parameter) and torch.equal(own, held):
        module._parameters[name] = held


def _planted(model: nn.Module, changes: Mapping[str, nn.Module]) -> dict[int, Any]:
    return {id(model.get_submodule(path)): new for path, new in changes.items()}
