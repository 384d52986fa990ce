"""Which indices of a model's tensors must go together when a part of it is taken out: channels, heads, neurons, units.

The model is traced by torch.export with made-up values: operations say which dimensions are one, which are joined, cut, or
seen as products. What comes in and what goes out keeps its size; so does what an operation without a rule touches. What is
left free is a `Group`: its unit k is all the indices, in all parameters, that go when index k goes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.fx.traceback
from torch import nn

from flyweight.analysis._attributes import Marking, remembering
from flyweight.analysis._rules_of_layers import RULES as LAYERS
from flyweight.analysis._rules_of_shapes import RULES as SHAPES
from flyweight.analysis._walk import Walk
from flyweight.analysis.answers import floats_of
from flyweight.analysis.calls import unfused
from flyweight.analysis.dimensions import Dim, Indices, Span
from flyweight.errors import FlyweightError, ModelError, UsageError, foreign
from flyweight.inputs.check import arguments, call
from flyweight.records import Batch, Record

_KINDS = ("heads", "channels of a head", "recurrent units", "channels", "neurons")
"""From the one that tells most to the one that tells least."""
_NOT_THEIRS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
"""Where the code of PyTorch and of flyweight is."""
_INNER = "model"
"""What the traced model is called in what is traced."""


@dataclass(frozen=True)
class Place(Record):
    """A dimension of a tensor in which a group stands, or a module's number that is its size."""

    name: str
    """Of a parameter or buffer; or a module's path, a colon and its attribute, where there is no axis."""
    axis: int | None
    size: int
    """Of the whole dimension."""
    spans: tuple[Span, ...]
    """Where: unit u has the indices offset + o * stride + u * inner + i, for all o below outer and i below inner."""

    def indices(self, units: Sequence[int]) -> Indices:
        """The indices (K,) of the dimension that belong to some units, ascending."""
        each = np.asarray(units, dtype=np.int64)[None, :, None]
        found = [
            (offset + np.arange(outer)[:, None, None] * stride + each * inner + np.arange(inner)).ravel()
            for offset, outer, stride, inner in self.spans
        ]
        return np.unique(np.concatenate(found))


@dataclass(frozen=True)
class Group(Record):
    """Indices that can be taken out of a model, each with all that belongs to it."""

    name: str
    """The path of the first module that it stands in, a colon, and its kind."""
    kind: str
    """What its units are, in a word or two."""
    units: int
    places: tuple[Place, ...]


def group_from_json(value: Any, where: str) -> Group:
    """The group of `to_json`'s values; raises UsageError that names the place of what is wrong."""
    try:
        places = [
            Place(one["name"], one["axis"], one["size"], tuple(_span(span) for span in one["spans"]))
            for one in value["places"]
        ]
        group = Group(value["name"], value["kind"], value["units"], tuple(places))
    except (KeyError, TypeError, ValueError):
        raise UsageError("a group has name, kind, units and places", where=where) from None
    sound = _is_count(group.units) and all(_is_sound(place, group.units) for place in places)
    if not sound or not all(isinstance(part, str) for part in (group.name, group.kind)):
        raise UsageError("a group's indices must lie within its dimensions", where=where)
    return group


def _span(value: Any) -> Span:
    offset, outer, stride, inner = value
    return offset, outer, stride, inner


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_sound(place: Place, units: int) -> bool:
    """Whether no index leaves the dimension; what is read from a file may be anything."""
    numbers = [place.size, *(number for span in place.spans for number in span)]
    return (
        isinstance(place.name, str)
        and (place.axis is None or _is_count(place.axis))
        and all(map(_is_count, numbers))
        and all(
            max(1, outer) * max(1, inner) * units <= place.size
            and offset + max(outer - 1, 0) * stride + units * inner <= place.size
            for offset, outer, stride, inner in place.spans
        )
    )


@dataclass(frozen=True)
class Coupling:
    """What the trace of a model tells."""

    groups: tuple[Group, ...] = ()
    """In the order of the parameters."""
    fixed: Mapping[str, str] = field(default_factory=dict)
    """Dimensions that keep their size, as "weight's name:axis", and why."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Operations without a rule, and where in the model's code the first stands."""
    reason: str = ""
    """Why there is no graph at all, and where in the model's code that shows."""


def couple(model: nn.Module, batch: Batch) -> Coupling:
    """The groups of a model in eval mode, traced on one batch; one that cannot be traced gives the reason alone.

    Numbers that the code computes from a tensor's shape follow a removal by themselves; numbers that are attributes are among
    the places of a group. The model is not changed.
    """
    outer = _Answering(remembering(model))
    args, kwargs = arguments(batch)
    try:
        with (
            foreign(ModelError, "traceable", where=_line),
            warnings.catch_warnings(),
            torch.no_grad(),
            unfused(),
        ):
            warnings.simplefilter("ignore")
            with Marking(), torch.fx.traceback.preserve_node_meta():
                program = torch.export.export(outer, args, kwargs, strict=False)
    except FlyweightError as error:
        place = f" (at {error.where})" if error.where else ""
        return Coupling(reason=f"the model cannot be traced: {error.got or error}{place}")
    return _told(Walk(program, {**LAYERS, **SHAPES}))


class _Answering(nn.Module):
    """A model that gives the floating tensors of its output, and no caches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.add_module(_INNER, model)

    def forward(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        output = call(self.get_submodule(_INNER), kwargs or args)
        return floats_of(output)


def _line(error: BaseException) -> str:
    """File and line of the last code outside of PyTorch that an error came through."""
    found, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(_NOT_THEIRS):
            found = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _told(walk: Walk) -> Coupling:
    """What a walk found, as plain records."""
    free: dict[int, list[Place]] = {}
    fixed: dict[str, str] = {}
    for name, axis, dim in _dimensions(walk):
        for atom in dict.fromkeys(walk.space.atoms(dim)):
            reason = walk.space.frozen(atom)
            if not reason:
                place = Place(name, axis, walk.size(dim), walk.space.spans(dim, atom))
                free.setdefault(atom, []).append(place)
            elif axis is not None:
                fixed.setdefault(f"{name}:{axis}", reason)
    groups: dict[str, Group] = {}
    kinds = _kinds(walk)
    for atom, places in free.items():
        if walk.space.width(atom) > 1 and any(
            f"{_INNER}.{place.name}" in walk.parameters for place in places
        ):
            kind = kinds.get(atom, "channels")
            name = _unused(f"{places[0].name.rpartition('.')[0]}:{kind}", groups)
            groups[name] = Group(name, kind, walk.space.width(atom), tuple(places))
    return Coupling(tuple(groups.values()), fixed, dict(walk.unknown))


def _dimensions(walk: Walk) -> Iterator[tuple[str, int | None, Dim]]:
    """Every dimension of a parameter or buffer, and then the modules' numbers, by the names in the model itself."""
    for name, dims in walk.tensors.items():
        for axis, dim in enumerate(dims):
            yield name.removeprefix(f"{_INNER}."), axis, dim
    for name, dim in walk.attributes.items():
        yield name, None, dim


def _kinds(walk: Walk) -> dict[int, str]:
    """What the units of each atom are."""
    found: dict[int, str] = {}
    for kind in _KINDS:
        for dim in (dim for said, dim in walk.kinds if said == kind):
            for atom in walk.space.atoms(dim):
                found.setdefault(atom, kind)
    return found


def _unused(name: str, taken: Mapping[str, Group]) -> str:
    numbered = (f"{name} {number}" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(one for one in numbered if one not in taken)
