"""Finds methods: each file in a method folder is one method, and its file name is its name.

Files that start with an underscore are helpers, not methods. Third parties add methods through the entry-point
group "flyweight.methods"; the entry's name is "folder.method", for example "transforms.my_method".
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType, ModuleType

from flyweight.errors import MachineError, UsageError

GROUP = "flyweight.methods"


@functools.cache
def methods(folder: str) -> Mapping[str, ModuleType]:
    """The methods of a folder such as "transforms", by name, in alphabetical order.

    Raises MachineError when two methods have one name.
    """
    package = importlib.import_module(f"flyweight.{folder}")
    own = [info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_")]
    found = {name: importlib.import_module(f"flyweight.{folder}.{name}") for name in sorted(own)}
    for entry in importlib.metadata.entry_points(group=GROUP):
        place, _, name = entry.name.partition(".")
        if place != folder:
            continue
        if name in found:
            raise MachineError(
                "two methods must not have one name",
                got=f"{name} twice",
                where=entry.value,
                way_out="rename one",
            )
        found[name] = entry.load()
    return MappingProxyType(found)


def method(folder: str, name: str) -> ModuleType:
    """The one method of that name; raises UsageError with the nearest names when there is none."""
    known = methods(folder)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    raise UsageError(f"unknown method in {folder}", got=repr(name), way_out=hint)
