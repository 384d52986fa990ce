"""Takes a model's output apart into tensors and puts it together again, in this process or from JSON in another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from flyweight.errors import ModelError
from flyweight.records import JSON


def leaves(value: Any) -> list[torch.Tensor]:
    """The tensors in an output, in order; None and plain numbers are not tensors."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for _, part in _parts(value) for leaf in leaves(part)]


def rebuild(template: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """An output of the template's structure, with other tensors."""
    if isinstance(template, torch.Tensor):
        return next(tensors)
    parts = [(name, rebuild(part, tensors)) for name, part in _parts(template)]
    if isinstance(template, Mapping):
        return type(template)(dict(parts))  # type: ignore[call-arg]
    if hasattr(template, "_fields"):
        return type(template)(*(part for _, part in parts))
    if dataclasses.is_dataclass(template) and not isinstance(template, type):
        return dataclasses.replace(template, **dict(parts))
    return type(template)(part for _, part in parts) if isinstance(template, tuple | list) else template


def describe(value: Any) -> JSON:
    """The structure as JSON: "tensor", {"dict": {...}}, {"tuple": [...]}, or {"constant": value}."""
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
        return {"dict": {str(name): describe(part) for name, part in _parts(value)}}
    if isinstance(value, tuple | list):
        return {"tuple": [describe(part) for _, part in _parts(value)]}
    return {"constant": value}


def restore(structure: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The output that `describe` described, from plain dicts and tuples."""
    if structure == "tensor":
        return next(tensors)
    if "dict" in structure:
        return {name: restore(part, tensors) for name, part in structure["dict"].items()}
    if "tuple" in structure:
        return tuple(restore(part, tensors) for part in structure["tuple"])
    return structure["constant"]


def _parts(value: Any) -> Sequence[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple | list):
        return [(str(index), part) for index, part in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(item.name, getattr(value, item.name)) for item in dataclasses.fields(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return []
    raise ModelError(
        "a model's output must be tensors in dicts, tuples, lists or dataclasses",
        got=type(value).__name__,
        way_out="return tensors, or wrap the model in a module that picks them",
    )
