"""Watches which weights a model really uses, in which operation, on which input.

Layers are recognized by the operation that consumes their weight, not by their class alone, so that subclasses
(a convolution that pads by itself, for example) are layers like any other.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from flyweight.analysis import _recurrent

_LINEAR, _CONV, _EMBEDDING, _ADDMM, _MATMUL = "linear", "conv", "embedding", "addmm", "matmul"
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
_PRODUCTS: Mapping[Callable[..., Any], str] = dict.fromkeys(
    (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__), _MATMUL
)
"""Further ones that consume a model's own parameters."""
_attention = F.multi_head_attention_forward
ATTENTION = types.FunctionType(
    _attention.__code__, {**vars(F), "has_torch_function": lambda _: False}, argdefs=_attention.__defaults__
)
"""PyTorch's attention, which hands itself to whoever watches instead of showing what it does."""


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
    first: int = 0
    """The first output channel, where only some are computed."""


def operands(
    kind: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """(input, weight, bias, layout) of a call of one of OPERATIONS, whatever way its arguments were passed."""
    if kind == _ADDMM:
        named = dict(zip(("input", "mat1", "mat2"), args, strict=False)) | dict(kwargs)
        return named["mat1"], named["mat2"], named["input"], {}
    if kind == _MATMUL:
        x, weight = (*args, *kwargs.values())[:2]
        return x, weight, None, {}
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


@dataclass(frozen=True)
class _View:
    """A weight, some of its first dimension, or the whole matrix turned round."""

    tensor: torch.Tensor
    weight: torch.Tensor

    @property
    def turned(self) -> bool:
        """Whether it is the matrix the other way round; a square one is told by its strides."""
        return self.tensor.stride() == self.weight.stride()[::-1] != self.weight.stride()

    @property
    def first(self) -> int:
        """How many of the first dimension come before it."""
        return (self.tensor.storage_offset() - self.weight.storage_offset()) // max(self.weight.stride(0), 1)

    @property
    def is_plain(self) -> bool:
        """Whether it is no other view, and no copy."""
        if self.tensor.data_ptr() < self.weight.data_ptr() or self.tensor.dtype != self.weight.dtype:
            return False
        if self.tensor.untyped_storage().data_ptr() != self.weight.untyped_storage().data_ptr():
            return False
        if self.turned:
            return self.tensor.shape == self.weight.shape[::-1]
        return self.tensor.shape[1:] == self.weight.shape[1:] and self.tensor.stride() == self.weight.stride()

    def kind(self, operation: str) -> str | None:
        """What an operation on it is to the weight, as if it had read that; None where there is no such thing."""
        if self.turned:
            return {_LINEAR: _ADDMM, _MATMUL: _LINEAR}.get(operation)
        if len(self.tensor) < len(self.weight):
            return _LINEAR if operation == _LINEAR else None
        return _ADDMM if operation == _MATMUL else operation


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
        self._views: dict[int, _View] = {}

    def instead(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function as it is, or step by step, and report what it used."""
        if func is _attention:
            with self:
                return ATTENTION(*args, **kwargs)
        if (func in _recurrent.LAYERS or func in _recurrent.CELLS) and not kwargs:
            with self:
                return _recurrent.unrolled(func, args)
        result = func(*args, **kwargs)
        self._report(func, args, kwargs, result)
        return result

    def _report(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Tell of the weights that a function used: as a product, as another view of one, or otherwise."""
        used = {id(a): self._view(a) for a in tensors_in((*args, *kwargs.values())) if self._view(a)}
        kind, name = OPERATIONS.get(func) or _PRODUCTS.get(func), getattr(func, "__name__", str(func))
        if kind is not None:
            x, operand, bias, layout = operands(kind, args, kwargs)
            view = used.get(id(operand))
            seen_as = None if view is None else view.kind(kind)
            if view is not None and seen_as is not None:
                del used[id(operand)]
                call = Call(seen_as, x, view.weight, bias, result, layout, view.first)
                self._seen(self._weights[id(view.weight)], call)
        elif used and not _in_place(name) and self._keep_views(next(iter(used.values())), result):
            return
        for path in {self._weights[id(view.weight)] for view in used.values() if view is not None}:
            if name != "__get__":
                self._other(path, name)

    def _view(self, tensor: torch.Tensor) -> _View | None:
        """What a tensor is of a watched weight, or None."""
        own = _View(tensor, tensor) if id(tensor) in self._weights else None
        return self._views.get(id(tensor), own)

    def _keep_views(self, given: _View | None, result: Any) -> bool:
        """Whether a function only gave other views of a weight, which are watched from now on."""
        found = [] if given is None else [_View(one, given.weight) for one in tensors_in([result])]
        if not found or not all(view.is_plain for view in found):
            return False
        self._views |= {id(view.tensor): view for view in found}
        return True


def _in_place(name: str) -> bool:
    """Whether a function of this name changes what it is given."""
    return name.endswith("_") and not name.endswith("__")


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
    """id(weight) -> the first of its `sharers`."""
    return {number: names[0] for number, names in _holders(model).items()}


def sharers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The first holder of a weight -> all that hold it, that one among them.

    A layer holds what is its parameter `weight`, of at least one dimension, and goes by its path; other parameters of at
    least two go by their own.
    """
    return {names[0]: tuple(names) for names in _holders(model).values()}


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """id(weight) -> the names of those that hold it, in the model's order."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            if weight is not None and (name == "weight" or weight.ndim > 1):
                holder = path if name == "weight" else f"{path}.{name}".lstrip(".")
                found.setdefault(id(weight), []).append(holder)
    return found
