"""Takes units of coupled groups out of a model, and proves on an example that what is left computes what it should.

The reference is the model in which everything that belongs to the units is zero: there a unit gives nothing to anyone. A
group whose removal gives another output than that is refused, whatever the trace said.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from flyweight.analysis.answers import floats_of
from flyweight.analysis.coupling import Coupling, Group, Place
from flyweight.errors import FlyweightError, ModelError, UsageError, foreign
from flyweight.inputs.check import arguments, call
from flyweight.records import Batch

Kept: TypeAlias = Mapping[str, Sequence[int]]
"""The units that stay, by the group's name; groups that are not named keep all."""
_TOLERANCE = 1e-3
"""Of the change that the removal makes, what rounding may account for."""
_ROUNDING = 2e-6
"""Of the output itself, what rounding may account for."""
_WIDTHS: Mapping[type[nn.Module], Mapping[str, int]] = {
    nn.Linear: {"out_features": 0, "in_features": 1},
    nn.modules.conv._ConvTransposeNd: {"in_channels": 0, "out_channels": 1},
    nn.modules.conv._ConvNd: {"out_channels": 0, "in_channels": 1},
    nn.modules.batchnorm._NormBase: {"num_features": 0},
    nn.GroupNorm: {"num_channels": 0},
    nn.Embedding: {"embedding_dim": 1},
}
"""Attributes that tell a weight's size and that no operation reads, by the first class that fits: the weight's axis."""


def check(model: nn.Module, groups: Sequence[Group]) -> None:
    """Raise UsageError unless every place of the groups is in the model, with its size."""
    held = dict(_tensors(model))
    for group in groups:
        for place in group.places:
            if _size(model, held, place) != place.size:
                rule = "a group must be one of the model's"
                raise UsageError(rule, got=f"another size of {place.name}", where=group.name)


def indices(groups: Sequence[Group], kept: Kept) -> dict[str, dict[int, torch.Tensor]]:
    """Which indices (K,) of each tensor's dimensions stay, of those from which any goes."""
    return _by_name({key: np.flatnonzero(mask) for key, mask in _cuts(groups, kept).items()})


def removed(
    model: nn.Module, groups: Sequence[Group], kept: Kept, values: Mapping[str, torch.Tensor] | None = None
) -> nn.Module:
    """A new model without the units that are not kept; shared modules stay shared, and tied parameters tied.

    values: other values of parameters, in their old shapes. Raises UsageError for an unknown group, for units that it does
    not have, or where none would stay.
    """
    cuts, new = indices(groups, kept), values or {}
    changes = {name: cuts.get(name, {}) for name in {**cuts, **new}}
    found = _copied(model, changes, lambda name, tensor: _sliced(new.get(name, tensor), changes[name]))
    for (name, axis), mask in _cuts(groups, kept).items():
        if axis is None:
            _assign(found, name, int(mask.sum()))
    for module in found.modules():
        _widths(module)
    return found


def silenced(model: nn.Module, groups: Sequence[Group], kept: Kept) -> nn.Module:
    """A new model of the old shape in which all parameters of the units that are not kept are zero."""
    gone = {key: np.flatnonzero(~mask) for key, mask in _cuts(groups, kept).items()}
    places = _by_name(gone)
    return _copied(model, places, lambda name, tensor: _zeroed(tensor, places[name]))


def proven(model: nn.Module, coupling: Coupling, batch: Batch) -> Coupling:
    """The coupling with the groups alone whose removal computes what it should; the others are fixed, with the reason.

    About a quarter of each group's units is taken out: first of one group of each kind by itself, then of all at once. Models
    of half precision are proven in float32.
    """
    model, (batch,) = widened(model, [batch])
    reasons: dict[str, str] = {}

    def fits(together: Sequence[Group], told: Sequence[Group]) -> bool:
        reason = refuted(model, together, {group.name: _most(group) for group in together}, batch)
        reasons.update({group.name: reason for group in told if reason})
        return not reason

    def sift(accepted: list[Group], candidates: Sequence[Group]) -> list[Group]:
        if not candidates or fits([*accepted, *candidates], candidates if len(candidates) == 1 else ()):
            return [*accepted, *candidates]
        half = len(candidates) // 2
        return sift(sift(accepted, candidates[:half]), candidates[half:]) if half else accepted

    alike: dict[object, list[Group]] = {}
    for group in coupling.groups:
        alike.setdefault(_form(group), []).append(group)
    alone = [group for groups in alike.values() if fits(groups[:1], groups) for group in groups]
    names = {group.name for group in sift([], alone)}
    groups = tuple(group for group in coupling.groups if group.name in names)
    return dataclasses.replace(coupling, groups=groups, fixed={**coupling.fixed, **reasons})


def refuted(model: nn.Module, groups: Sequence[Group], kept: Kept, batch: Batch) -> str:
    """Why a removal does not compute what the silenced model computes, on one batch; empty where it does.

    Where the model takes a batch of no samples, the smaller one must too.
    """
    small, none = removed(model, groups, kept), _without_samples(batch)
    try:
        with foreign(ModelError, "it must run"):
            found, wanted, before = (
                _answer(one, batch) for one in (small, silenced(model, groups, kept), model)
            )
            if _takes(model, none):
                _answer(small, none)
    except FlyweightError as failure:
        return f"the model does not run without some of its units: {failure.got or failure}"
    if [one.shape for one in found] != [one.shape for one in wanted]:
        return "the output has another shape without some of its units"
    error, change, size = (_distance(wanted, other) for other in (found, before, None))
    if not error <= _TOLERANCE * change + _ROUNDING * size:
        return f"the output without some units is {error:.3g} from where it should be, of a change by {change:.3g}"
    return ""


def _form(group: Group) -> object:
    """What is equal for groups of one kind in layers that only differ by their numbers."""
    names = [re.sub(r"\d+", "#", name) for name in (group.name, *(place.name for place in group.places))]
    return group.units, *names, *((place.axis, place.size) for place in group.places)


def _most(group: Group) -> Sequence[int]:
    """About three quarters of the units, spread."""
    gone = set(range(1, group.units, 4))
    return [unit for unit in range(group.units) if unit not in gone]


def widened(model: nn.Module, batches: Sequence[Batch]) -> tuple[nn.Module, list[Batch]]:
    """A model and its inputs in float32, where they have less."""
    half = (torch.float16, torch.bfloat16)
    if not any(tensor.dtype in half for _, tensor in _tensors(model)):
        return model, list(batches)

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.dtype in half else tensor

    found: list[Batch] = []
    for args, kwargs in map(arguments, batches):
        found.append({name: wide(tensor) for name, tensor in kwargs.items()} or tuple(map(wide, args)))
    return copy.deepcopy(model).float(), found


def _answer(model: nn.Module, batch: Batch) -> Sequence[torch.Tensor]:
    with torch.no_grad():
        return floats_of(call(model, batch))


def _without_samples(batch: Batch) -> Batch:
    args, kwargs = arguments(batch)
    named = {name: tensor[:0] if tensor.ndim else tensor for name, tensor in kwargs.items()}
    return named or tuple(tensor[:0] if tensor.ndim else tensor for tensor in args)


def _takes(model: nn.Module, batch: Batch) -> bool:
    try:
        with foreign(ModelError, "it must run"):
            _answer(model, batch)
    except FlyweightError:
        return False
    return True


def _distance(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor] | None) -> float:
    """The root of the summed squares of a difference, or of the first alone."""
    pairs = itertools.zip_longest(one, other or [])
    squares = [float(((a - b) if b is not None else a).double().square().sum()) for a, b in pairs]
    return float(np.sqrt(sum(squares)))


_Key: TypeAlias = tuple[str, int | None]


def _cuts(groups: Sequence[Group], kept: Kept) -> dict[_Key, Any]:
    """Which indices of each dimension stay: (size,) bool."""
    known = {group.name: group for group in groups}
    found: dict[_Key, Any] = {}
    for name, units in kept.items():
        if name not in known:
            raise UsageError("a group must be one of the model's", got=repr(name))
        gone = _gone(known[name], units)
        for place in known[name].places if gone else ():
            mask = found.setdefault((place.name, place.axis), np.ones(place.size, dtype=bool))
            mask[place.indices(gone)] = False
    return found


def _gone(group: Group, units: Sequence[int]) -> list[int]:
    stay = set(units)
    if not stay or not stay <= set(range(group.units)):
        rule = f"of a group's units some must stay, and they are numbered from 0 to {group.units - 1}"
        raise UsageError(rule, got=f"{len(stay)} units" if stay else "none", where=group.name)
    return [unit for unit in range(group.units) if unit not in stay]


def _by_name(indices: Mapping[_Key, Any]) -> dict[str, dict[int, torch.Tensor]]:
    """The indices of each tensor's axes."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for (name, axis), some in indices.items():
        if axis is not None:
            found.setdefault(name, {})[axis] = torch.from_numpy(some)
    return found


def _copied(
    model: nn.Module, names: Collection[str], change: Callable[[str, torch.Tensor], torch.Tensor]
) -> nn.Module:
    """A deep copy of a model with some tensors changed on the way, whoever holds them."""
    memo: dict[int, Any] = {}
    for name, tensor in _tensors(model):
        if name in names and id(tensor) not in memo:
            with torch.no_grad():
                new = change(name, tensor.detach())
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    return copy.deepcopy(model, memo)


def _size(model: nn.Module, held: Mapping[str, torch.Tensor], place: Place) -> int | None:
    """What the model has at a place: a dimension's size, or a module's number."""
    if place.axis is not None:
        shape = held[place.name].shape if place.name in held else ()
        return shape[place.axis] if place.axis < len(shape) else None
    path, _, attribute = place.name.partition(":")
    module = dict(model.named_modules()).get(path)
    owner, _, inner = attribute.partition(".")
    value = vars(module).get(owner) if module is not None else None
    if inner:
        value = getattr(value, "__dict__", {}).get(inner)
    return value if type(value) is int else None


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _sliced(tensor: torch.Tensor, axes: Mapping[int, torch.Tensor]) -> torch.Tensor:
    for axis, indices in axes.items():
        tensor = tensor.index_select(axis, indices.to(tensor.device))
    return tensor.contiguous()


def _zeroed(tensor: torch.Tensor, axes: Mapping[int, torch.Tensor]) -> torch.Tensor:
    tensor = tensor.clone()
    for axis, indices in axes.items():
        tensor.index_fill_(axis, indices.to(tensor.device), 0)
    return tensor


def _assign(model: nn.Module, name: str, value: int) -> None:
    """Set a module's number; one in an object of its own, which other modules may hold too, in a copy of that."""
    path, _, attribute = name.partition(":")
    module = model.get_submodule(path)
    owner, _, inner = attribute.partition(".")
    if inner:
        vars(module)[owner] = copy.copy(vars(module)[owner])
        vars(vars(module)[owner])[inner] = value
    else:
        vars(module)[attribute] = value


def _widths(module: nn.Module) -> None:
    """Make what a module says of its sizes true."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.RNNBase):
        module.input_size = module.get_parameter("weight_ih_l0").shape[1]
        module.hidden_size = module.get_parameter("weight_hh_l0").shape[1]
    kind = next((kind for kind in _WIDTHS if isinstance(module, kind)), None)
    if weight is None or kind is None:
        return
    groups = vars(module).get("groups", 1)
    for name, axis in _WIDTHS[kind].items():
        setattr(module, name, weight.shape[axis] * (groups if axis == 1 else 1))
