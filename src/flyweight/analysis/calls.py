"""Watches which weights a model really uses, in which operation, on which input.

Layers are recognized by the operation that consumes their weight, not by their class alone, so that subclasses
(a convolution that pads by itself, for example) are layers like any other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

_LINEAR, _CONV, _EMBEDDING, _ADDMM = "linear", "conv", "embedding", "addmm"
OPERATIONS: Mapping[Callable[..., Any], str] = {
    F.linear: _LINEAR,
    F.conv1d: _CONV,
    F.conv2d: _CONV,
    F.conv3d: _CONV,
    F.embedding: _EMBEDDING,
    F.embedding_bag: _EMBEDDING,
    torch.addmm: _ADDMM,
}
"""The operations that consume a layer's weight, and their kind."""


@dataclass(frozen=True)
class Call:
    """One use of a weight by one of OPERATIONS."""

    kind: str
    """linear, conv, embedding or addmm (the transposed linear layer of GPT-2)."""
    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    output: torch.Tensor
    layout: Mapping[str, Any]
    """Of a convolution: stride, padding, dilation, groups as the operation got them."""


def operands(
    kind: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """(input, weight, bias, layout) of a call of one of OPERATIONS, whatever way its arguments were passed."""
    if kind == _ADDMM:
        named = dict(zip(("input", "mat1", "mat2"), args, strict=False)) | dict(kwargs)
        return named["mat1"], named["mat2"], named["input"], {}
    if kind == _EMBEDDING:
        # of F.embedding; the third of F.embedding_bag is its offsets
        named = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False)) | dict(kwargs)
        return named["input"], named["weight"], None, {"max_norm": named.get("max_norm")}
    order = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    named = dict(zip(order, args, strict=False)) | dict(kwargs)
    layout = {name: named.get(name, default) for name, default in zip(order[3:], (1, 0, 1, 1), strict=True)}
    return named["input"], named["weight"], named.get("bias"), layout if kind == _CONV else {}


class Functions(TorchFunctionMode):
    """Stands between a program and PyTorch's functions while it is entered."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What is given instead of the function's result."""
        return self.instead(func, args, dict(kwargs or {}))

    def instead(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a function that is called with these arguments."""
        return func(*args, **kwargs)


class Watch(Functions):
    """Hands every use of the given weights to `seen(path, call)`, and any other use to `other(path, function)`."""

    def __init__(
        self,
        weights: Mapping[int, str],
        seen: Callable[[str, Call], None],
        other: Callable[[str, str], None],
    ) -> None:
        """weights: id(parameter) -> path of the module that owns it."""
        super().__init__()
        self._weights, self._seen, self._other = weights, seen, other

    def instead(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function as it is and report what it used."""
        result = func(*args, **kwargs)
        kind = OPERATIONS.get(func)
        owned = None
        if kind is not None:
            x, weight, bias, layout = operands(kind, args, kwargs)
            owned = self._weights.get(id(weight))
            if owned is not None:
                self._seen(owned, Call(kind, x, weight, bias, result, layout))
        for path in {
            self._weights[id(a)] for a in tensors_in((*args, *kwargs.values())) if id(a) in self._weights
        }:
            if path != owned and getattr(func, "__name__", "") != "__get__":
                self._other(path, getattr(func, "__name__", str(func)))
        return result


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among values, and in lists, tuples and dicts among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
        elif isinstance(value, Mapping):
            yield from tensors_in(value.values())


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Keep PyTorch's transformer layers from reading weights past the layers that own them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def owners(model: nn.Module) -> dict[int, str]:
    """id(weight) -> path of the first module that has it as its parameter `weight` of at least one dimension."""
    return {number: paths[0] for number, paths in _holders(model).items()}


def sharers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The path of the first module that holds a weight -> the paths of all that hold it, that one among them."""
    return {paths[0]: tuple(paths) for paths in _holders(model).values()}


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """id(weight) -> the paths of the modules that have it as their parameter `weight`, in the model's order."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            found.setdefault(id(weight), []).append(path)
    return found
