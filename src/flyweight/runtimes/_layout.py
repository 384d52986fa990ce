"""How weights lie in a runtime's file where that differs from the PyTorch model's state, and the way back.

A layout is "transposed", or the element type of integers, "int16", "int8", "uint8", "int4" or "uint4" (two to a byte, the
first in the low half), turned or not: "int4 transposed". In "uint4 rows" every row begins with a byte of its own; in "uint4
rows shifted" 8 is added to every integer, in "uint8 rows shifted" 128. Shapes: integers are (R, C).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

import torch
from torch import nn

from flyweight import discover
from flyweight.codes import Grid
from flyweight.codes._packing import pack, unpack
from flyweight.codes._sparsity import Pattern
from flyweight.errors import another_model
from flyweight.runtimes._state import unique_state
from flyweight.transforms import QuantizedLayer

INTEGERS: Mapping[str, torch.dtype] = MappingProxyType(
    {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16}
)
TRANSPOSED, ROWS, SHIFTED = "transposed", "rows", "shifted"
ONNX_ONLY = "onnx."
"""Prefix of stored constants that only the graph needs."""


def as_stored(integers: torch.Tensor, kind: str, *, turned: bool) -> tuple[torch.Tensor, str]:
    """Integers (R, C) in an element type, and the layout's name."""
    whole = (integers.T if turned else integers).contiguous()
    layout = f"{kind} {TRANSPOSED}" if turned else kind
    if kind.endswith("4"):
        return pack(whole.reshape(1, -1), 4)[0], layout
    return whole.to(INTEGERS[kind]), layout


def as_rows(integers: torch.Tensor, bits: int, *, signed: bool) -> tuple[torch.Tensor, str]:
    """Integers (R, C) as unsigned ones of 4 or 8 bits, row by row, half the range added if signed; and the layout's name."""
    layout = f"uint{bits} {ROWS}"
    if not signed:
        return pack(integers, bits), layout
    return pack(integers + 2 ** (bits - 1), bits), f"{layout} {SHIFTED}"


def load_state(model: nn.Module, stored: Mapping[str, torch.Tensor], layouts: Mapping[str, str]) -> None:
    """Put stored weights into a model that a plan was applied to.

    Raises ArtifactError with the first differences when they belong to another model.
    """
    state = {key: tensor for key, tensor in stored.items() if not key.startswith(ONNX_ONLY)}
    wanted = unique_state(model)
    modules = dict(model.named_modules())
    state = {
        key: _restored(modules.get(key.rpartition(".")[0]), key, tensor, layouts[key])
        if key in layouts
        else tensor
        for key, tensor in state.items()
    }
    differences = [f"{key} missing" for key in wanted if key not in state]
    differences += [f"{key} unexpected" for key in state if key not in model.state_dict()]
    differences += [
        f"{key} has shape {tuple(state[key].shape)}, the model {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise another_model("; ".join(differences[:5]) + more)
    model.load_state_dict(state, strict=False)


def _restored(module: nn.Module | None, key: str, tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """A tensor as the model's state has it."""
    kind, *words = layout.split(" ")
    turned = TRANSPOSED in words
    if kind == TRANSPOSED:
        return tensor.T.contiguous() if tensor.ndim == 2 else tensor
    if not isinstance(module, QuantizedLayer):
        raise another_model(f"{key} as {kind}, the model's is no quantized layer")
    _, grid = module.encoded()
    name = key.rpartition(".")[2]
    shared = name == "zeros" and module.stored()["scales"].shape[0] < module.rows
    if name in ("multiples", "lifts"):
        width = module.stored()[name].shape[1] * 8 // grid.scales.shape[1]
        return pack(tensor.to(torch.int16).reshape(grid.scales.shape), width)
    shape = (
        (module.rows, module.columns // grid.width)
        if name == "integers"
        else (1 if shared else module.rows, grid.scales.shape[1])
    )
    if grid.mask is not None:
        return _kept(module, tensor, kind, grid)
    shape = shape[::-1] if turned else shape
    rows = shape[0] if ROWS in words else 1
    if kind.endswith("4"):
        packed = tensor.reshape(rows, -1)
        count = shape[0] * shape[1] // rows
        found = unpack(packed, 4, count, signed=kind == "int4").reshape(shape)
    else:
        found = tensor.to(torch.int16).reshape(shape)
    if SHIFTED in words:
        found = found - (8 if kind.endswith("4") else 128)
    found = found.T.contiguous() if turned else found
    if name == "integers":
        integers = found + grid.low if grid.table is not None else found
        return _packed(module, name, integers, grid)
    zeros = found.float().expand(module.rows, -1)
    return _packed(module, name, module.encoded()[0], dataclasses.replace(grid, zeros=zeros))


def _kept(module: QuantizedLayer, tensor: torch.Tensor, kind: str, grid: Grid) -> torch.Tensor:
    """What a sparse code stores of integers of an element type: those that stay, in their order."""
    pattern, count = cast(Pattern, grid.pattern), int(cast(torch.Tensor, grid.mask).sum())
    flat = unpack(tensor.view(1, -1), 4, count, signed=True) if kind == "int4" else tensor.to(torch.int16)
    shape = (module.rows, module.columns)
    blocks = torch.zeros(*pattern.blocks(*shape), pattern.height * pattern.width, dtype=torch.int16)
    mask = pattern.cut(cast(torch.Tensor, grid.mask))
    return _packed(module, "integers", pattern.joined(blocks.masked_scatter(mask, flat)), grid)


def _packed(module: QuantizedLayer, name: str, integers: torch.Tensor, grid: object) -> torch.Tensor:
    """What the layer's code stores under a name."""
    found: torch.Tensor = discover.method("codes", module.code).store(integers, grid, module.options)[name]
    return found
