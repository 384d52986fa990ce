"""A graph under construction: nodes, small constants, and what refers to the weights on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from onnx import helper

KINDS: Mapping[str, int] = {
    "int4": onnx.TensorProto.INT4,
    "uint4": onnx.TensorProto.UINT4,
    "int8": onnx.TensorProto.INT8,
    "uint8": onnx.TensorProto.UINT8,
    "int16": onnx.TensorProto.INT16,
}
"""Element types of stored integers, by their name in an artifact's layouts."""
TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.int8: onnx.TensorProto.INT8,
    torch.uint8: onnx.TensorProto.UINT8,
    torch.int16: onnx.TensorProto.INT16,
    torch.int32: onnx.TensorProto.INT32,
    torch.int64: onnx.TensorProto.INT64,
    torch.bool: onnx.TensorProto.BOOL,
}
"""Element types by torch's."""


@dataclass
class Lowered:
    """A graph under construction, and the weights it refers to."""

    graph: Any
    """The ModelProto."""
    weights: dict[str, torch.Tensor]
    """What goes to weights.safetensors, by state-dict key, or by onnx.NAME for constants of the graph alone."""
    layouts: dict[str, str] = field(default_factory=dict)
    """Keys whose tensor is stored otherwise than in the PyTorch model."""
    refers: dict[str, tuple[str, int, tuple[int, ...]]] = field(default_factory=dict)
    """Initializer name -> (key of weights, element type, dimensions)."""
    nodes: list[Any] = field(default_factory=list)
    grids: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Graph tensors that are to be rounded to an unsigned 8-bit grid."""
    tops: dict[str, int] = field(default_factory=dict)
    """The highest integer of those grids, where a layer has chosen it; else 255."""
    alone: set[str] = field(default_factory=set)
    """Those of them that only linear layers read rounded; a sum beside them gains nothing from rounding."""
    outputs: list[tuple[str, tuple[float, int]]] = field(default_factory=list)
    """Outputs of integer convolutions with their own grid, in order."""
    dynamic: set[str] = field(default_factory=set)
    keys: Mapping[str, str] = field(default_factory=dict)
    """Every key of the model's state dict -> the key of `weights` that its tensor has."""
    by_rows: set[str] = field(default_factory=set)
    """Prefixes of keys of weights whose rows are looked up, so that they are not turned; products turn them by a node."""

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Append a node with one output; returns the output's name."""
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def small(self, name: str, tensor: torch.Tensor) -> str:
        """A constant kept in the graph; returns its name."""
        values = tensor.detach().contiguous()
        self.graph.graph.initializer.append(
            helper.make_tensor(
                name, TYPES[values.dtype], tuple(values.shape), values.numpy().tobytes(), raw=True
            )
        )
        return name

    def stored(self, key: str, kind: int | None = None, shape: Sequence[int] | None = None) -> str:
        """A constant that lies in the weights under its key; returns its name: the key, and more for a second form of it."""
        tensor = self.weights[key]
        form = kind or TYPES[tensor.dtype], tuple(tensor.shape if shape is None else shape)
        name = key if self.refers.get(key, (key, *form))[1:] == form else f"{key}.{form[0]}.{form[1]}"
        self.refers[name] = (key, *form)
        return name

    def turned(self, name: str) -> str:
        """A matrix the other way round; returns its name."""
        found = f"{name}.turned"
        if found not in self.dynamic:
            self.dynamic.add(found)
            self.node("Transpose", [name], found, perm=[1, 0])
        return found


def floats(low: Lowered, key: str, shape: tuple[int, ...]) -> str:
    """The name of stored numbers as float32."""
    tensor = low.weights[key]
    name = low.stored(key, shape=shape)
    if tensor.dtype == torch.float32:
        return name
    cast = f"{name}.float32"
    if cast in low.dynamic:
        return cast
    low.dynamic.add(cast)
    if tensor.dtype == torch.uint8:  # powers of two by their exponents
        exact = low.node("Cast", [name], f"{name}.exponent", to=onnx.TensorProto.FLOAT)
        bias, two = (
            low.small(f"{name}.bias", torch.tensor(127.0)),
            low.small(f"{name}.two", torch.tensor(2.0)),
        )
        return low.node("Pow", [two, low.node("Sub", [exact, bias], f"{name}.power")], cast)
    return low.node("Cast", [name], cast, to=onnx.TensorProto.FLOAT)
