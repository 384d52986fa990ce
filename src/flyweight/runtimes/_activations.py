"""The grids that activations with fixed ranges are rounded to, and where the graph rounds them."""

from __future__ import annotations

from typing import Any

import onnx
import torch
from onnx import helper

from flyweight.runtimes._lowered import Lowered
from flyweight.runtimes._nodes import users
from flyweight.transforms import QuantizedLayer


def rounded_input(low: Lowered, module: QuantizedLayer, x: str) -> str:
    """The name of x as a linear layer rounds it: on the grid that x has, if that does as well, else on one of its own."""
    grid = grid_of(module.input_grid)
    if x not in low.grids:
        low.grids[x], low.tops[x] = grid, module.top
        low.alone.add(x)
    own, name = (grid, module.top), f"{x}.{grid[0]!r}.{grid[1]}.{module.top}"
    if _alike((low.grids[x], low.tops[x]), own):
        return f"{x}.rounded"
    if name not in low.dynamic:
        low.dynamic.add(name)
        low.nodes += _rounding(low, x, name, own)
    return f"{name}.rounded"


def input_step(low: Lowered, module: QuantizedLayer, x: str) -> float:
    """The step of the grid that `rounded_input` chose."""
    own = grid_of(module.input_grid)
    return (low.grids[x] if _alike((low.grids[x], low.tops[x]), (own, module.top)) else own)[0]


def _alike(one: tuple[tuple[float, int], int], other: tuple[tuple[float, int], int]) -> bool:
    """Whether two grids do as well: equal ones, and of 8 bits those whose steps differ by less than a tenth."""
    if one == other:
        return True
    step, its = one[0][0], other[0][0]
    return one[1] == other[1] == 255 and 0.9 * its < step < 1.1 * its


def grid_of(buffer: torch.Tensor) -> tuple[float, int]:
    """Scale and zero point as a layer holds them."""
    return float(buffer[0]), int(buffer[1])


def output_grids(low: Lowered) -> None:
    """Where an integer convolution's output meets no integer layer, round it by its own grid, after its activation."""
    readers = users(low.nodes)
    for y, (scale, zero) in low.outputs:
        name, low_end, high_end = y, -zero * scale, (255 - zero) * scale
        after = readers.get(y, [])
        if len(after) == 1 and after[0].op_type in ("Relu", "Clip"):
            floor, ceiling = _bounds(low, after[0])
            name = after[0].output[0]
            low_end, high_end = max(low_end, floor), min(high_end, ceiling)
        if name not in low.grids and readers.get(name) and high_end > low_end:
            step = (high_end - low_end) / 255
            low.grids[name] = (step, min(255, max(0, round(-low_end / step))))
        low.alone.discard(name)


def _bounds(low: Lowered, node: Any) -> tuple[float, float]:
    if node.op_type == "Relu":
        return 0.0, float("inf")
    values = {item.name: onnx.numpy_helper.to_array(item) for item in low.graph.graph.initializer}
    ends = [values.get(name) for name in (*node.input[1:], "", "")][:2]
    return (
        -float("inf") if ends[0] is None else float(ends[0]),
        float("inf") if ends[1] is None else float(ends[1]),
    )


def round_activations(low: Lowered) -> None:
    """Put QuantizeLinear and DequantizeLinear behind every tensor that has a grid.

    Around convolutions all its users read the rounded one, so that runtimes keep integers between layers; only the
    model's outputs never do.
    """
    nodes: list[Any] = []
    renamed = {name: f"{name}.rounded" for name in low.grids if name not in low.alone}
    produced = {name for node in low.nodes for name in node.output}
    outside = [name for name in low.grids if name not in produced]
    for name in outside:
        nodes += _rounding(low, name, name, (low.grids[name], low.tops.get(name, 255)))
    results = {value.name for value in low.graph.graph.output}
    for node in low.nodes:
        for index, name in enumerate(
            () if node.op_type == "Identity" and node.output[0] in results else node.input
        ):
            node.input[index] = renamed.get(name, name)
        nodes.append(node)
        for name in node.output:
            if name in low.grids:
                nodes += _rounding(low, name, name, (low.grids[name], low.tops.get(name, 255)))
    low.nodes = nodes


def _rounding(low: Lowered, x: str, name: str, form: tuple[tuple[float, int], int]) -> list[Any]:
    """Nodes that round x on a grid (scale, zero point) of integers from 0 to the top one; they give NAME.rounded."""
    (scale, zero), top = form
    grid = [
        low.small(f"{name}.scale8", torch.tensor(scale, dtype=torch.float32)),
        low.small(f"{name}.zero8", torch.tensor(zero, dtype=torch.uint8)),
    ]
    nodes = []
    if top < 255:  # fewer bits are fewer points of a grid of 8
        ends = [-zero * scale, (top - zero) * scale]
        bounds = [low.small(f"{name}.end{at}", torch.tensor(end)) for at, end in enumerate(ends)]
        nodes.append(helper.make_node("Clip", [x, *bounds], [f"{name}.cut"]))
        x = f"{name}.cut"
    return [
        *nodes,
        helper.make_node("QuantizeLinear", [x, *grid], [f"{name}.codes8"]),
        helper.make_node("DequantizeLinear", [f"{name}.codes8", *grid], [f"{name}.rounded"]),
    ]
