"""Finds a graph's own constants among the model's weights, so that every weight is stored once.

The exporter copies what it needs: tied weights twice, and the weights of products turned round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import torch

from flyweight.runtimes._nodes import read

INLINE = 1024
"""Constants of at most so many bytes stay in the graph; larger ones move to the weights."""


@dataclass(frozen=True)
class Constant:
    """A constant of a graph, and where its values are."""

    item: Any
    """The TensorProto."""
    tensor: torch.Tensor | None
    """Its values, if they must be stored: no weight has them."""
    key: str = ""
    """The weight that has them."""
    turned: bool = False
    """Whether it is that weight transposed."""


def constants(graph: Any, weights: Mapping[str, torch.Tensor]) -> Iterator[Constant]:
    """The constants that a graph uses. weights: those that keep their layout, by state-dict key."""
    shapes: dict[tuple[int, ...], list[str]] = {}
    for key, tensor in weights.items():
        shapes.setdefault(tuple(tensor.shape), []).append(key)
    used = {value.name for value in graph.output} | set(read(graph.node))
    for item in graph.initializer:
        if item.name in used:
            yield _constant(item, weights, shapes)


def _constant(
    item: Any, weights: Mapping[str, torch.Tensor], shapes: Mapping[tuple[int, ...], list[str]]
) -> Constant:
    if item.data_type in (onnx.TensorProto.STRING, onnx.TensorProto.BFLOAT16):
        return Constant(item, None)
    tensor = torch.from_numpy(onnx.numpy_helper.to_array(item).copy())
    shape, own = tuple(tensor.shape), item.name.removeprefix("model.")
    if own in weights and _equal(weights[own], tensor):
        return Constant(item, tensor, own)
    if tensor.numel() * tensor.element_size() <= INLINE:
        return Constant(item, None)
    for key in shapes.get(shape, ()):
        if _equal(weights[key], tensor):
            return Constant(item, tensor, key)
    for key in shapes.get(shape[::-1], ()) if tensor.ndim == 2 else ():
        if _equal(weights[key].T, tensor):
            return Constant(item, tensor, key, turned=True)
    return Constant(item, tensor)


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
