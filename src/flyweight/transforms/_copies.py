"""Models with other modules at some paths: as copies of their own, or as views that share all tensors with the model."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from flyweight.analysis.bare import is_bare, layer_at


def substitute(model: nn.Module, changes: Mapping[str, nn.Module]) -> nn.Module:
    """A deep copy of a model with other modules at some paths; shared modules and tied parameters stay shared.

    So does a bias that another module holds too, where the new module has one that is equal. A module in the place of a
    parameter gives its `weight` to whoever reads that.
    """
    memo = _planted(model, changes)
    found = _reading(copy.deepcopy(model, memo))
    for path, new in changes.items():
        for name, own in layer_at(model, path).named_parameters(recurse=False):
            for module in (new, getattr(new, "inner", None)):
                _tie(module, name, memo.get(id(own)))
    return found


def view(model: nn.Module, changes: Mapping[str, nn.Module]) -> nn.Module:
    """As `substitute`, but parameters and buffers are the model's own: to look through, not to keep or to change."""
    own = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return _reading(copy.deepcopy(model, {**own, **_planted(model, changes)}))


def _tie(module: nn.Module | None, name: str, held: Any) -> None:
    """Give a module the parameter that the copy of another one holds, if its own of that name is equal."""
    own = None if module is None else module._parameters.get(name)
    if module is not None and own is not None and isinstance(held, nn.Parameter) and torch.equal(own, held):
        module._parameters[name] = held


def _planted(model: nn.Module, changes: Mapping[str, nn.Module]) -> dict[int, Any]:
    found = {path: layer_at(model, path) for path in changes}
    return {id(layer.weight if is_bare(layer) else layer): changes[path] for path, layer in found.items()}


def _reading(model: nn.Module) -> nn.Module:
    """The model, whose modules read a parameter's value from the module that was planted in its place."""
    for module in list(model.modules()):
        given: Mapping[str, Any] = module._parameters
        held = {name: new for name, new in given.items() if isinstance(new, nn.Module)}
        for name, new in held.items():
            del module._parameters[name]
            module._modules[name] = new
        if held:
            _read(module, tuple(held))
    return model


def _read(module: nn.Module, names: tuple[str, ...]) -> None:
    """Make attributes of a module the weights of its children of those names; recurrent layers list theirs anew."""
    module.__class__ = _reader(cast(Any, type(module)), names)
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)


@functools.cache
def _reader(kind: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """One class for all modules that read the same, so that they count as alike."""
    known: dict[str, Any] = {name: property(functools.partial(_weight, name=name)) for name in names}
    if issubclass(kind, nn.RNNBase):
        known["_flat_weights"] = property(_flat_weights, lambda self, value: None)
        known["_update_flat_weights"] = lambda self: None
    return type(kind.__name__, (kind,), known)


def _weight(module: nn.Module, name: str) -> Any:
    return cast(nn.Module, module._modules[name]).weight


def _flat_weights(module: nn.RNNBase) -> list[torch.Tensor]:
    return [getattr(module, name) for name in module._flat_weights_names]
