"""A layer whose weight is stored as integers; its activations may be rounded to 8 bits too.

In PyTorch the weight is decoded on the fly and activations are rounded in floating point: that is the meaning of the
layer. Runtimes that compute with integers read the same buffers (`flyweight.runtimes._lower`).
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call

from flyweight.transforms._grid import Encoded, Grid, decode, encode, pack, unpack

Activations = Literal["float", "dynamic", "static"]


class _Decoded(torch.Tensor):
    """A weight handed out to code that asks for it.

    Being no plain tensor, it keeps PyTorch's fused transformer layers from computing past the layer, which rounds its input.
    """


class QuantizedLayer(nn.Module):
    """The layer `inner` with its weight as integers.

    Buffers: codes, (O, I) int8 or (O, ceil(I / 2)) uint8 with two 4-bit integers a byte; scales, (O, G) float32;
    zeros, (O, G) uint8 when asymmetric; input_grid and output_grid, (2,) float32 scale and zero point, when static.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    input_grid: torch.Tensor
    output_grid: torch.Tensor

    def __init__(self, inner: nn.Module, on: Grid, encoded: Encoded, *, transposed: bool = False) -> None:
        """inner: the layer, of which a copy without weight is kept; transposed: its weight is (I, O)."""
        super().__init__()
        weight = inner.get_parameter("weight")
        self.shape, self.dtype = tuple(weight.shape), weight.dtype
        self.inputs, self.transposed = encoded.codes.shape[1], transposed
        self.on, self.activations = on, "float"
        self.inner = shell(inner)
        self.register_buffer("codes", pack(encoded.codes) if on.bits == 4 else encoded.codes)
        self.register_buffer("scales", encoded.scales)
        self.register_buffer("zeros", encoded.zeros)

    def static(self, input_grid: tuple[float, int], output_grid: tuple[float, int] | None) -> QuantizedLayer:
        """Round inputs to the unsigned 8-bit grid (scale, zero point); a runtime may also round outputs to theirs."""
        self.activations = "static"
        for name, found in (("input", input_grid), ("output", output_grid)):
            if found is not None:
                self.register_buffer(f"{name}_grid", torch.tensor(found, dtype=torch.float32))
        return self

    def dynamic(self) -> QuantizedLayer:
        """Round inputs to an unsigned 8-bit grid that is found anew for each input."""
        self.activations = "dynamic"
        return self

    def encoded(self) -> Encoded:
        """The integers, unpacked."""
        codes = unpack(self.codes, self.inputs, self.on.symmetric) if self.on.bits == 4 else self.codes
        return Encoded(codes, self.scales, self.zeros)

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight in the layer's own shape and dtype."""
        return self._decoded().as_subclass(_Decoded)

    def _decoded(self) -> torch.Tensor:
        decoded = decode(self.encoded()).to(self.dtype)
        return (decoded.T if self.transposed else decoded).reshape(self.shape)

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's bias; None if it has none."""
        return getattr(self.inner, "bias", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the inner layer computes with the decoded weight and the rounded input."""
        if self.activations != "float":
            args, kwargs = _map_first(self._round, args, kwargs)
        return functional_call(self.inner, {"weight": self._decoded()}, args, kwargs)

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        if self.activations == "static":
            return round_to(x, *self.input_grid)
        if not x.numel():
            return x
        low, high = torch.aminmax(x)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / 255).clamp(min=1e-30)
        return round_to(x, scale, (-low / scale).round().clamp(0, 255))


def shell(layer: nn.Module) -> nn.Module:
    """A copy of a layer without its weight."""
    hollow = copy.deepcopy(layer, {id(layer._parameters.get("weight")): None})
    hollow.register_parameter("weight", None)
    return hollow


def round_to(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The nearest points of an unsigned 8-bit grid."""
    codes = (x / scale).round_().add_(zero).clamp_(0, 255)
    return codes.sub_(zero).mul_(scale).to(x.dtype)


def quantized(
    module: nn.Module,
    kind: str,
    on: Grid,
    energy: torch.Tensor | None = None,
    input_scale: float | None = None,
) -> QuantizedLayer:
    """A quantized copy of a layer.

    energy: mean square per input channel, which weighs the scale search below 8 bits. input_scale: of static activations;
    no weight scale may then be so small that the bias overflows 32-bit integers in units of their product.
    """
    weight = module.get_parameter("weight").detach()
    bias = getattr(module, "bias", None)
    floor = None
    if input_scale is not None and bias is not None:
        floor = bias.detach().float().abs() / (input_scale * 2**30)
    encoded = encode(rows(module, kind), on, _spread(energy, weight, kind), floor)
    return QuantizedLayer(module, on, encoded, transposed=_is_transposed(module, kind))


def rows(module: nn.Module, kind: str) -> torch.Tensor:
    """A layer's weight as (output channels, inputs of each)."""
    weight = module.get_parameter("weight").detach()
    return weight.T if _is_transposed(module, kind) else weight.flatten(1)


def _is_transposed(module: nn.Module, kind: str) -> bool:
    """Whether the weight is (inputs, outputs), as in GPT-2's own linear layer."""
    return kind == "linear" and not isinstance(module, nn.Linear)


def _spread(energy: torch.Tensor | None, weight: torch.Tensor, kind: str) -> torch.Tensor | None:
    """Energy per input of one output channel; None where channels differ in what they see (grouped convolution)."""
    if energy is None or not bool(energy.any()):
        return None
    if kind != "conv":
        return energy
    if energy.numel() != weight.shape[1]:
        return None
    return energy.repeat_interleave(weight[0, 0].numel())


def _map_first(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (function(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: function(kwargs[name])}
