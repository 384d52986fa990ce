"""Tells models apart whose printed form is the same: by their classes, their attributes and the functions they hold.

Deep copies of one model have one identity; two models that may compute different things never do.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_ATOMS = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
_KEPT: dict[int, Any] = {}
"""Classes and functions that are part of an identity: kept alive, so that no other gets their id."""


def identity(module: nn.Module, without: Collection[str] = ()) -> str:
    """What decides how a module computes, apart from its parameters, buffers and children, as a digest in hex.

    without: attributes that are left aside.
    """
    aside = {"_parameters", "_buffers", "_modules", "training", *without}
    state = {k: v for k, v in vars(module).items() if k not in aside}
    digest = hashlib.sha256()
    for part in _parts((type(module), state), {id(module)}):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _parts(value: Any, seen: set[int]) -> Iterator[str]:
    """A value in words, the same for deep copies; what cannot be read is told by its address, which no copy shares."""
    if isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r}"
    elif isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)} {tensor_digest(value)}"
    elif isinstance(value, _ATOMS):
        _KEPT[id(value)] = value
        yield f"{getattr(value, '__qualname__', '')} {id(value)}"
    elif id(value) in seen:
        yield "again"
    else:
        yield from _inside(value, {*seen, id(value)})


def _inside(value: Any, seen: set[int]) -> Iterator[str]:
    yield from _parts(type(value), seen)
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _parts(key, seen)
            yield from _parts(item, seen)
    elif isinstance(value, list | tuple):
        yield str(len(value))
        for item in value:
            yield from _parts(item, seen)
    elif isinstance(value, set | frozenset):
        yield repr(sorted("\0".join(_parts(item, seen)) for item in value))
    elif isinstance(value, types.MethodType):
        yield from _parts((value.__func__, value.__self__), seen)
    elif hasattr(value, "__dict__"):
        yield from _parts(vars(value), seen)
    else:
        _KEPT[id(value)] = value
        yield f"at {id(value)}"


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hex."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
