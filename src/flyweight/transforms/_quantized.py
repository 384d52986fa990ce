"""A layer whose weight is stored in a code; its activations may be rounded to 8 bits too.

In PyTorch the weight is decoded on the fly and activations are rounded in floating point: that is the meaning of the
layer. Runtimes that compute with integers read the same buffers (`flyweight.runtimes._lower`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call

from flyweight import discover
from flyweight.analysis.bare import is_bare
from flyweight.codes import Grid

Activations = Literal["float", "dynamic", "rows", "static", "blocks"]


class Decoded(torch.Tensor):
    """A weight handed out to code that asks for it.

    Being no plain tensor, it keeps PyTorch's fused transformer layers from computing past the layer, which rounds its input.
    What is computed from it is plain.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What the function gives for plain tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class QuantizedLayer(nn.Module):
    """The layer `inner` with its weight in a code.

    Buffers: what the code stores, integers among them; input_grid and output_grid, (2,) float32 scale and zero point, when
    static.
    """

    integers: torch.Tensor
    input_grid: torch.Tensor
    output_grid: torch.Tensor

    def __init__(
        self,
        inner: nn.Module,
        code: str,
        options: Any,
        encoded: tuple[torch.Tensor, Grid],
        *,
        transposed: bool,
    ) -> None:
        """inner: the layer, of which a copy without weight is kept; encoded: the integers on a grid of the code.

        transposed: the layer's own weight is (I, O).
        """
        super().__init__()
        weight = inner.get_parameter("weight")
        self.shape, self.dtype = tuple(weight.shape), weight.dtype
        self.rows, self.columns = len(encoded[0]), encoded[0].shape[1] * encoded[1].width
        self.code, self.options, self.transposed = code, options, transposed
        self.activations: Activations = "float"
        self.top = 255
        self.inner = shell(inner)
        stored = discover.method("codes", code).store(*encoded, options)
        self.names = tuple(stored)
        self.sharing: list[QuantizedLayer] = [self]
        """The layers that hold these stored tensors, of modules whose weights were tied."""
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)

    def recoded(self, integers: torch.Tensor, grid: Grid) -> QuantizedLayer:
        """A layer like this one with other integers (O, I) on a grid of its code; tied with no other."""
        twin = copy.copy(self)
        nn.Module.__init__(twin)
        twin.inner, twin.training, twin.sharing = copy.deepcopy(self.inner), self.training, [twin]
        stored = discover.method("codes", self.code).store(integers, grid, self.options)
        for name, tensor in {**self._buffers, **stored}.items():
            twin.register_buffer(name, tensor)
        return twin

    def beside(self, inner: nn.Module, *, rounding: bool) -> QuantizedLayer:
        """A layer with the same stored tensors for a module whose weight is tied with this one's.

        rounding: its inputs are rounded as this one's are.
        """
        twin = copy.copy(self)
        nn.Module.__init__(twin)  # buffers, modules and hooks of its own
        twin.inner, twin.training = shell(inner), self.training
        twin.activations = self.activations if rounding else "float"
        for name, tensor in self._buffers.items():
            if rounding or name in self.names:
                twin.register_buffer(name, tensor)
        self.sharing.append(twin)
        return twin

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedLayer:
        """Move or cast, and let the layers that share the weight go on sharing it."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for other in self.sharing:
            other._buffers.update({name: self._buffers[name] for name in self.names})
        return self

    def static(
        self, input_grid: tuple[float, int], output_grid: tuple[float, int] | None, top: int = 255
    ) -> QuantizedLayer:
        """Round inputs to the unsigned grid (scale, zero point) of integers from 0 to top: 255 of 8 bits, 15 of 4.

        A runtime may also round outputs to their 8-bit grid.
        """
        self.activations, self.top = "static", top
        for name, found in (("input", input_grid), ("output", output_grid)):
            if found is not None:
                self.register_buffer(f"{name}_grid", torch.tensor(found, dtype=torch.float32))
        return self

    def dynamic(self, *, rows: bool = False) -> QuantizedLayer:
        """Round inputs to an unsigned 8-bit grid that is found anew for each input, or for each row of it."""
        self.activations = "rows" if rows else "dynamic"
        return self

    def blocks(self) -> QuantizedLayer:
        """Round each group of inputs with a common weight scale to signed 8-bit integers, found anew for each input."""
        self.activations = "blocks"
        return self

    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors that hold the weight, by the code's names."""
        return {name: self.get_buffer(name) for name in self.names}

    def encoded(self) -> tuple[torch.Tensor, Grid]:
        """The int16 integers (O, I) and the grid that they are on."""
        found: tuple[torch.Tensor, Grid] = discover.method("codes", self.code).restore(
            self.stored(), self.columns, self.options
        )
        return found

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight in the layer's own shape and dtype."""
        return self._decoded().as_subclass(Decoded)

    def _decoded(self) -> torch.Tensor:
        integers, grid = self.encoded()
        decoded = grid.values(integers).to(self.dtype)
        return (decoded.T if self.transposed else decoded).reshape(self.shape)

    def plain(self) -> nn.Module:
        """What computes the same in less time but more memory: the layer with its weight decoded, if its inputs stay."""
        if self.activations != "float":
            return self
        layer = copy.deepcopy(self.inner)
        layer.register_parameter("weight", nn.Parameter(self._decoded(), requires_grad=False))
        return layer

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's bias; None if it has none."""
        return getattr(self.inner, "bias", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the inner layer computes with the decoded weight and the rounded input."""
        if self.activations != "float":
            args, kwargs = map_first(self._round, args, kwargs)
        return functional_call(self.inner, {"weight": self._decoded()}, args, kwargs)

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        if self.activations == "static":
            return round_to(x, self.input_grid[0], self.input_grid[1], self.top)
        if not x.numel():
            return x
        if self.activations == "blocks":
            return round_blocks(x, self.encoded()[1].group)
        low, high = x.aminmax(dim=-1, keepdim=True) if self.activations == "rows" else x.aminmax()
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / 255).clamp(min=1e-30)
        return round_to(x, scale, (-low / scale).round().clamp(0, 255))


def unfit(module: nn.Module) -> str | None:
    """Why no method can round the inputs of a layer, or change it at all, or None."""
    if isinstance(module, QuantizedLayer):
        return "it is quantized already"
    return (
        "its weight is read, and no layer called whose inputs could be rounded" if is_bare(module) else None
    )


def shell(layer: nn.Module) -> nn.Module:
    """A copy of a layer without its weight."""
    hollow = copy.deepcopy(layer, {id(layer._parameters.get("weight")): None})
    hollow.register_parameter("weight", None)
    return hollow


def round_to(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int = 255) -> torch.Tensor:
    """The nearest points of an unsigned grid with integers from 0 to top."""
    codes = (x / scale).round_().add_(zero).clamp_(0, top)
    return codes.sub_(zero).mul_(scale).to(x.dtype)


def round_blocks(x: torch.Tensor, group: int) -> torch.Tensor:
    """Inputs (..., I) at the nearest of 255 points from -m to m, m being the largest magnitude of each group of inputs."""
    groups = x.unflatten(-1, (-1, group))
    steps = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    found: torch.Tensor = (groups / steps).round_().mul_(steps).flatten(-2).to(x.dtype)
    return found


def rows(module: nn.Module, kind: str) -> torch.Tensor:
    """A layer's weight as (output channels, inputs of each)."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module, kind) else weight.flatten(1)


def is_transposed(module: nn.Module, kind: str) -> bool:
    """Whether the weight is (inputs, outputs), as in GPT-2's own linear layer."""
    return kind == "linear" and not isinstance(module, nn.Linear)


def map_first(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with a function applied to the first of them."""
    if args:
        return (function(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: function(kwargs[name])}
