"""Turns a step's plain JSON options into a method's Options record and back, with kind refusals."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from types import ModuleType, UnionType
from typing import Any

from flyweight.errors import UsageError
from flyweight.records import JSON


def read(method: ModuleType, options: Mapping[str, JSON], where: str) -> Any:
    """The method's Options of plain values; raises UsageError that names the option and the place.

    A method whose options are not one flat record brings `read` of its own.
    """
    return method.read(options, where) if hasattr(method, "read") else flat(method.Options, options, where)


def flat(record: Any, options: Mapping[str, Any], where: str) -> Any:
    """A record of the values of its fields; raises UsageError that names the option and the place."""
    kinds = typing.get_type_hints(record)
    for name, value in options.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(kinds) or 'no options'}"
            raise UsageError("unknown option", got=repr(name), where=where, way_out=hint)
        if not _fits(value, kinds[name]):
            wanted = getattr(kinds[name], "__name__", str(kinds[name]))
            raise UsageError(f"{name} must be {wanted}", got=f"{type(value).__name__} {value!r}", where=where)
    try:
        return record(**options)
    except UsageError as error:
        raise error.at(f"{where}.{error.where}") from None


def plain(options: Any) -> dict[str, JSON]:
    """The options that differ from their defaults, as plain JSON values; a record that is not flat says them itself."""
    if hasattr(options, "plain"):
        return dict(options.plain())
    changed = {}
    for item in dataclasses.fields(options):
        value = getattr(options, item.name)
        if item.default is dataclasses.MISSING or value != item.default:
            changed[item.name] = value
    return changed


def _fits(value: object, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_fits(value, part) for part in kind.__args__)
    if kind is type(None):
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind
