"""Follows through a running model what changes by the same factor when a layer's output channel does.

Every element of a tensor that is proportional to one output channel of a norm or linear layer carries that channel's number;
operations that keep the proportion carry the numbers on, a layer's matrix reads them, and all others freeze the channels that
they meet. What is left unfrozen can be scaled in the one layer and scaled back in the others. Nothing is told by names or
classes: only the operations that run count, as the dispatcher sees them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from flyweight.analysis.calls import tensors_in

_SAME = (
    "clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh", "relu", "relu_", "leaky_relu", "leaky_relu_",
    "neg", "abs",
)  # fmt: skip
"""Keep shape and proportion; factors are above 0."""
_SHAPED = ("view", "_unsafe_view", "reshape", "_reshape_alias")
"""Keep the elements' order; numbers may lie otherwise in memory, so they are reshaped."""
_MOVED = (
    "transpose", "permute", "t", "expand", "unsqueeze", "squeeze", "slice", "select", "split", "split_with_sizes",
    "unbind", "index_select", "index", "repeat", "flip", "roll",
)  # fmt: skip
"""Move elements: done to the numbers as well."""
_PRODUCTS = ("mul", "mul_", "div", "div_")
_SUMS = ("add", "add_", "sub", "sub_")
_NORMS = ("native_layer_norm", "_fused_rms_norm")
_ATTENTIONS = (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
)  # fmt: skip
_FORMS = (
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "new_empty", "new_zeros", "new_ones", "new_full",
)  # fmt: skip
"""Read a tensor's form, not its values."""


@dataclass(frozen=True, eq=False)
class Channels:
    """Which output channel of a layer each element of a tensor is proportional to."""

    layer: str
    numbers: torch.Tensor  # int64, the tensor's shape


@dataclass(frozen=True)
class _Matrix:
    """A layer's weight as an operation meets it."""

    layer: str
    turned: bool = False
    """Transposed, as against the layer's own."""


@dataclass
class Findings:
    """What one or more passes told."""

    frozen: dict[str, torch.Tensor] = field(default_factory=dict)
    """By layer, which output channels (C,) cannot be scaled; layers that cannot give a scale are missing."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why the first channels of a layer were frozen."""
    reads: dict[str, list[Channels | None]] = field(default_factory=dict)
    """What each linear layer read, call by call: the channels (I,) of its inputs; None: proportional to no layer's."""
    turned: dict[str, bool] = field(default_factory=dict)
    """By linear layer, whether its weight is (outputs, inputs), and so transposed when it is used."""
    misused: dict[str, str] = field(default_factory=dict)
    """Layers whose weight is used otherwise, by what."""
    branches: bool = False
    """Whether a value was handed to Python, which may have decided something by it."""

    def freeze(self, channels: Channels | None, reason: str) -> None:
        """Rule out the channels of a tensor."""
        if channels is not None and channels.numbers.numel():
            self.frozen[channels.layer][channels.numbers.reshape(-1)] = True
            self.reasons.setdefault(channels.layer, reason)

    def freeze_layer(self, layer: str, reason: str) -> None:
        """Rule out all channels of a layer."""
        if layer in self.frozen:
            self.frozen[layer].fill_(True)
            self.reasons.setdefault(layer, reason)


class Follow(TorchDispatchMode):
    """Fills findings with what a model in eval mode does while this mode is entered."""

    def __init__(self, model: nn.Module, findings: Findings) -> None:
        """Give each layer's output channels their numbers."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = findings
        self._channels = WeakTensorKeyDictionary()
        self._matrices = WeakTensorKeyDictionary()
        for path, vectors, matrix in _layers(model):
            for vector in vectors:
                findings.frozen.setdefault(path, _none(len(vector)))
                self._channels[vector] = Channels(path, torch.arange(len(vector)))
            if matrix is not None:
                self._matrices[matrix] = _Matrix(path)

    def of(self, tensor: Any) -> Channels | None:
        """The channels of a tensor; None where it has none, or none that are not frozen."""
        found: Channels | None = self._channels.get(tensor) if isinstance(tensor, torch.Tensor) else None
        return None if found is None or bool(self.found.frozen[found.layer].all()) else found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation as it is, and carry on, read or freeze what it meets."""
        kwargs = kwargs or {}
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:  # in inference mode operations come before they are taken apart
            return parts
        result = func(*args, **kwargs)
        self.found.branches |= func is torch.ops.aten._local_scalar_dense.default
        given = [t for t in tensors_in((args, kwargs)) if self.of(t) is not None or t in self._matrices]
        if given:
            self._after(func, args, kwargs, result, given)
        return result

    def _after(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        given: list[torch.Tensor],
    ) -> None:
        name = func.overloadpacket.__name__
        if name in _FORMS:
            return
        changed = name.endswith("_") and not name.startswith("_")
        rule = _RULES.get(name)
        if (
            rule is None
            or (changed and self.of(args[0]) is None)
            or not rule(self, func, args, kwargs, result)
        ):
            self._refuse(given, name)

    def _refuse(self, given: list[torch.Tensor], name: str) -> None:
        """Freeze all that an operation without a rule met."""
        for tensor in given:
            self.found.freeze(self.of(tensor), f"{name} reads its output")
            matrix = self._matrices.get(tensor)
            if matrix is not None:
                self.found.misused.setdefault(matrix.layer, name)

    def _set(self, tensor: torch.Tensor, layer: str, numbers: torch.Tensor) -> bool:
        self._channels[tensor] = Channels(layer, numbers.expand(tensor.shape))
        return True

    def _moved(self, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
        """Views and copies."""
        name, tensor = func.overloadpacket.__name__, args[0]
        matrix = self._matrices.get(tensor)
        if matrix is not None:
            return self._moved_matrix(name, args, matrix, result)
        own = self.of(tensor)
        if own is None or func._overloadname == "dtype":
            return False
        if name in _SAME:
            return self._set(result, own.layer, own.numbers)
        if name in _SHAPED:
            return self._set(result, own.layer, own.numbers.reshape(result.shape))
        numbers = func(own.numbers, *args[1:], **kwargs)
        several = (result, numbers) if isinstance(result, list | tuple) else ((result,), (numbers,))
        for one, two in zip(*several, strict=True):
            self._set(one, own.layer, two)
        return True

    def _moved_matrix(self, name: str, args: Any, matrix: _Matrix, result: Any) -> bool:
        turned = name == "t" or (name == "transpose" and {a % 2 for a in args[1:]} == {0, 1})
        if not turned and name not in ("detach", "alias"):
            return False
        self._matrices[result] = dataclasses.replace(matrix, turned=matrix.turned != turned)
        return True

    def _joined(self, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
        """Tensors put together: all parts that hold anything must be of one layer."""
        parts = [part for part in args[0] if part.numel()]
        own = [self.of(part) for part in parts]
        layers = {one.layer if one is not None else None for one in own}
        if len(layers) != 1 or None in layers:
            return False
        known = [one for one in own if one is not None]
        return self._set(result, known[0].layer, func([one.numbers for one in known], *args[1:], **kwargs))

    def _product(self, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
        """Elementwise products: one factor is followed, another one that could be is frozen."""
        if len(args) < 2 or args[1] is args[0] or "rounding_mode" in kwargs:
            return False
        first, second = self.of(args[0]), self.of(args[1])
        divided = func.overloadpacket.__name__.startswith("div")
        if divided and first is None:
            return False
        if first is not None and second is not None:
            self.found.freeze(second, "it is multiplied with another layer's output")
        own = first if first is not None else second
        return own is not None and self._set(result, own.layer, own.numbers)

    def _sum(self, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
        """Sums of what is proportional to the same channels."""
        first, second = (self.of(one) for one in (*args, None, None)[:2])
        if first is None or second is None or not _alike(first, second):
            return False
        return self._set(result, first.layer, first.numbers.expand(result.shape))

    def _norm(self, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
        """A norm's weight and bias give its output; its input is forgotten."""
        self.found.freeze(self.of(args[0]), "a norm reads its output")
        weight = self.of(args[2])
        bias = args[3] if isinstance(args[3], torch.Tensor) else None
        if weight is None:
            return self.of(bias) is None
        shift = self.of(bias)
        if bias is not None and (shift is None or not _alike(weight, shift)):
            return False
        return self._set(result[0], weight.layer, weight.numbers)

    def _attention(self, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
        """Attention mixes the values (B, H, L, D) of one channel over the places L; heads may share values."""
        query, key, value = args[:3]
        for other in tensors_in((query, key, args[3:], kwargs)):
            self.found.freeze(self.of(other), "attention compares by its output")
        own, shape = self.of(value), result[0].shape
        if own is None:
            return True
        numbers = own.numbers[..., :1, :]
        if not torch.equal(numbers.expand(value.shape), own.numbers) or shape[1] % value.shape[1]:
            return False
        return self._set(result[0], own.layer, numbers.repeat_interleave(shape[1] // value.shape[1], 1))

    def _matmul(self, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
        """mm, bmm and addmm: a layer's own weight reads and gives channels; other products mix what they sum over."""
        bias, x, other = args if len(args) == 3 else (None, *args)
        matrix = self._matrices.get(other)
        if matrix is not None and x not in self._matrices:
            return self._linear(matrix, bias, x, result)
        if bias is not None or x in self._matrices or matrix is not None:
            return False
        left, right = self.of(x), self.of(other)
        if left is not None and right is not None:
            return False
        own, dim = (left, -1) if left is not None else (right, -2)
        if own is None:
            return False
        numbers = own.numbers.narrow(dim, 0, 1)
        return torch.equal(numbers.expand(own.numbers.shape), own.numbers) and self._set(
            result, own.layer, numbers
        )

    def _linear(self, matrix: _Matrix, bias: Any, x: torch.Tensor, result: torch.Tensor) -> bool:
        """A layer reads the rows x (n, I) and gives its own channels (n, O)."""
        layer, count = matrix.layer, result.shape[-1]
        own = Channels(layer, torch.arange(count))
        if len(self.found.frozen.setdefault(layer, _none(count))) != count:
            return False
        if self.found.turned.setdefault(layer, matrix.turned) != matrix.turned:
            return False
        if x.shape[0]:
            self.found.reads.setdefault(layer, []).append(self._read(layer, x))
        shift = self._channels.get(bias) if bias is not None else own
        if shift is None or not _alike(own, shift):
            self.found.freeze_layer(layer, "what is added to its product is not its own")
            self.found.freeze(self.of(bias), f"it is added to the output of {layer}")
        return self._set(result, layer, own.numbers)

    def _read(self, layer: str, x: torch.Tensor) -> Channels | None:
        """The channels (I,) that a layer's inputs are proportional to, the same in all rows; None: there are none."""
        read = self.of(x)
        if read is None:
            return None
        row = read.numbers[:1]
        if torch.equal(row.expand(x.shape), read.numbers):
            return Channels(read.layer, row[0])
        self.found.freeze(read, f"{layer} reads a mixture of its channels")
        return None


_Rule = Callable[[Follow, Any, Any, Any, Any], bool]
_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys((*_SAME, *_SHAPED, *_MOVED), Follow._moved),
    **dict.fromkeys(_PRODUCTS, Follow._product),
    **dict.fromkeys(_SUMS, Follow._sum),
    **dict.fromkeys(_NORMS, Follow._norm),
    **dict.fromkeys(_ATTENTIONS, Follow._attention),
    **dict.fromkeys(("mm", "bmm", "addmm"), Follow._matmul),
    "cat": Follow._joined,
}
"""What an operation does to channels: False where it freezes all that it meets."""


def _layers(model: nn.Module) -> Iterator[tuple[str, list[torch.Tensor], torch.Tensor | None]]:
    """Path, vectors and matrix of each module without children whose parameters are its own."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for path, module in model.named_modules():
        own = {name: p for name, p in module._parameters.items() if p is not None}
        if own and next(module.children(), None) is None and all(holders[id(p)] == 1 for p in own.values()):
            weight = own.get("weight")
            matrix = weight if weight is not None and weight.ndim == 2 else None
            vectors = [p for p in own.values() if p is not matrix]
            if all(p.ndim == 1 for p in vectors) and len({len(p) for p in vectors}) <= 1:
                yield path, vectors, matrix


def matrices(model: nn.Module) -> tuple[str, ...]:
    """Layers that have a matrix of their own as `weight`: linear layers, unless they are never used as such."""
    return tuple(path for path, _, matrix in _layers(model) if matrix is not None)


def _none(count: int) -> torch.Tensor:
    """No channel is frozen."""
    return torch.zeros(count, dtype=torch.bool)


def _alike(first: Channels, second: Channels) -> bool:
    """Whether two tensors that can be broadcast are proportional to the same channels."""
    if first.layer != second.layer:
        return False
    one, two = torch.broadcast_tensors(first.numbers, second.numbers)
    return torch.equal(one, two)
