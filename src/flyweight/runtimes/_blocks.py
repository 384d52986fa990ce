"""Linear layers whose integers are multiplied as they are stored, in groups: `MatMulNBits`, small in memory too.

ONNX Runtime never decodes the whole weight; OpenVINO reads the same node and keeps the weight compressed.
Inputs stay floats, exactly, or are rounded in the same groups where a layer says "blocks". Shapes: integers are (O, I), in
G groups of inputs; they lie row by row as unsigned integers, signed ones with half their range added.
"""

from __future__ import annotations

import torch

from flyweight.codes import Grid
from flyweight.codes._packing import packed_width
from flyweight.runtimes._layout import as_rows
from flyweight.runtimes._lowered import KINDS, Lowered, floats
from flyweight.transforms import QuantizedLayer

DOMAIN = "com.microsoft"
GROUPS = (16, 32, 64, 128, 256)
"""Lengths of groups that ONNX Runtime multiplies."""
_EXACT, _INTEGERS = 1, 4
"""Accuracy levels: inputs as float32, or rounded to 8-bit integers."""


def fits(low: Lowered, owner: str, module: QuantizedLayer) -> bool:
    """Whether a linear layer is multiplied as it is: evenly spaced integers in groups, of rows that nobody looks up.

    With float inputs of at most 4 bits: of 8, ONNX Runtime is many times slower than with floats.
    """
    if module.activations not in ("float", "blocks") or owner in low.by_rows:
        return False
    grid, scales = module.encoded()[1], low.weights.get(f"{owner}scales")
    own = scales is not None and scales.numel() == grid.scales.numel() and grid.group in GROUPS
    even = (
        grid.table is None
        and grid.columns is None
        and grid.mask is None
        and (grid.zeros is None) == (grid.low < 0)
    )
    return own and even and (_bits(grid) == 4 or module.activations == "blocks")


def product(low: Lowered, owner: str, module: QuantizedLayer, x: str, y: str) -> str:
    """The node for x @ weight of a layer that fits; returns the product's name, which is y."""
    integers, grid = module.encoded()
    size, groups = _bits(grid) * grid.group // 8, grid.scales.shape[1]
    inputs = [x, _rows(low, f"{owner}integers", integers, grid, (module.rows, groups, size))]
    inputs.append(floats(low, f"{owner}scales", tuple(grid.scales.shape)))
    if grid.zeros is not None:
        shape = (module.rows, packed_width(groups, _bits(grid)))
        inputs.append(_rows(low, f"{owner}zeros", grid.zeros.to(torch.int16), grid, shape))
    _declare(low)
    attributes = {"K": module.columns, "N": module.rows, "bits": _bits(grid), "block_size": grid.group}
    level = _INTEGERS if module.activations == "blocks" else _EXACT
    return low.node("MatMulNBits", inputs, y, domain=DOMAIN, accuracy_level=level, **attributes)


def _bits(grid: Grid) -> int:
    low, high = (-8, 7) if grid.low < 0 else (0, 15)
    return 4 if low <= grid.low and grid.high <= high else 8


def _rows(low: Lowered, key: str, integers: torch.Tensor, grid: Grid, shape: tuple[int, ...]) -> str:
    """Store integers of a grid as unsigned ones, row by row; returns their name."""
    if key not in low.layouts:
        low.weights[key], low.layouts[key] = as_rows(integers, _bits(grid), signed=grid.low < 0)
    return low.stored(key, KINDS["uint8"], shape)


def _declare(low: Lowered) -> None:
    """Say that the graph has nodes of ONNX Runtime's own."""
    if all(known.domain != DOMAIN for known in low.graph.opset_import):
        low.graph.opset_import.add(domain=DOMAIN, version=1)
