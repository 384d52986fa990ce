"""Brings the tensors of a GGUF back into the PyTorch model that it was written from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flyweight import discover
from flyweight.errors import ModelError, UsageError, another_model
from flyweight.runtimes import _gguf_super
from flyweight.runtimes._gguf import unpack
from flyweight.runtimes._gguf_model import causal, floats, layers, name_of, order
from flyweight.runtimes._gguf_super import layout_of
from flyweight.runtimes._shortened import renamed, shortened
from flyweight.transforms import QuantizedLayer


def state(model: nn.Module, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of a model that a plan was applied to, by its own names, from a GGUF's tensors by llama.cpp's.

    Rows of blocks are uint8. Raises ArtifactError when the tensors belong to another model.
    """
    try:
        inner = causal(model)
        prefix = next(path for path, module in model.named_modules() if module is inner)
        short, names = shortened(inner)
        found = renamed(_state(short, stored), names)
    except ModelError as error:
        raise another_model(str(error)) from None
    return {f"{prefix}.{key}" if prefix else key: tensor for key, tensor in found.items()}


def _state(model: nn.Module, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path, layer in layers(model):
        back = order(model, path)
        rows = slice(None) if back is None else np.argsort(back)
        inside = f"{path}.inner" if isinstance(layer, QuantizedLayer) else path
        if isinstance(layer, QuantizedLayer):
            packed = _stored(stored, f"{name_of(path)}.weight")[rows]
            found |= {f"{path}.{key}": tensor for key, tensor in _integers(layer, packed).items()}
        for name in floats(layer):
            values = _stored(stored, f"{name_of(path)}.{name}")[rows]
            found[f"{inside}.{name}"] = torch.from_numpy(values).float()
    return found


def _integers(layer: QuantizedLayer, packed: NDArray[Any]) -> dict[str, torch.Tensor]:
    """The buffers of a layer; only scales, and minima, were rounded when they were written."""
    if packed.dtype != np.uint8 or packed.ndim != 2 or len(packed) != layer.rows:
        raise another_model(f"{packed.dtype} of shape {packed.shape} for blocks")
    layout = layout_of(layer.code, layer.options)
    if layout is not None:
        return _gguf_super.unpack(layout, packed, layer.columns)
    integers, scales, minima = unpack(packed, layer.columns)
    grid = layer.encoded()[1]
    every = slice(None, None, max(1, scales.shape[1] // grid.scales.shape[1]))
    scales, zeros = np.ascontiguousarray(scales[:, every]), None
    if minima is not None:
        # A scale of zero decodes to its minimum alone, whatever the zero point.
        found = np.divide(-minima[:, every], scales, out=np.zeros_like(scales), where=scales != 0)
        zeros = torch.from_numpy(found).round().clamp(grid.low, grid.high)
    grid = dataclasses.replace(grid, scales=torch.from_numpy(scales), zeros=zeros)
    try:
        code = discover.method("codes", layer.code)
        stored: dict[str, torch.Tensor] = code.store(torch.from_numpy(integers), grid, layer.options)
    except UsageError as error:
        raise another_model(str(error)) from None
    return stored


def _stored(stored: Mapping[str, torch.Tensor], name: str) -> NDArray[Any]:
    if name not in stored:
        raise another_model(f"no tensor {name}")
    found: NDArray[Any] = stored[name].numpy()
    return found
