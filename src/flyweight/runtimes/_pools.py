"""Means over whole pictures become `GlobalAveragePool`, which runtimes compute in integers, in the layout of convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def pooled(graph: Any) -> None:
    """Put GlobalAveragePool for ReduceMean over the sizes of pictures (B, C, H, W); changes the GraphProto."""
    from onnx import helper

    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.value_info, *graph.input)}
    values = {item.name: item for item in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type != "ReduceMean" or ranks.get(node.input[0]) != 4 or not _over_pictures(node, values):
            nodes.append(node)
            continue
        keeps = all(item.i for item in node.attribute if item.name == "keepdims")
        name = node.output[0] if keeps else f"{node.output[0]}.pooled"
        nodes.append(helper.make_node("GlobalAveragePool", [node.input[0]], [name]))
        if not keeps:
            nodes.append(helper.make_node("Squeeze", [name, node.input[1]], [node.output[0]]))
    del graph.node[:]
    graph.node.extend(nodes)


def _over_pictures(node: Any, values: Mapping[str, Any]) -> bool:
    from onnx import numpy_helper

    axes = values.get(node.input[1]) if len(node.input) > 1 else None
    return axes is not None and sorted(axis % 4 for axis in numpy_helper.to_array(axes).tolist()) == [2, 3]
