"""The peers' own weight quantization, each in a process and an environment of its own: one file, one tool.

A file holds

    ENVIRONMENT                  the folder of its environment, which `make peers` makes
    PACKAGES                     the packages whose versions its results depend on
    VARIANTS                     peer name -> what differs from the tool's other settings
    settings(name, bits, kind)   all settings as plain JSON values, or why the tool cannot: one sentence
    run(job) -> Done             quantize in the peer's own process

`python -m benchmarks.weight_peers REQUEST.json`, run by the peer's own Python, loads the model, quantizes it, and writes
the weights as they are computed with, in float32, and a small JSON beside them. Nothing of flyweight is imported there. Each
tool quantizes the linear layers of the blocks; embeddings and the head stay float.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def peers() -> dict[str, ModuleType]:
    """The file of each peer, by the peer's name; a file may hold several variants of a tool."""
    files = [info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in sorted(files)]
    return {name: module for module in modules for name in module.VARIANTS}
