"""Attention as one operation: `scaled_dot_product_attention` becomes one ONNX node `Attention`, over rows where it can be.

The exporter writes the node for heads (samples, heads, positions, size). Models split rows (samples, positions, heads * size)
for it by a Reshape and a Transpose, and merge its output again; the node also reads rows as they are: four copies less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from flyweight.analysis.calls import Functions
from flyweight.runtimes._nodes import read

_SWAPPED = [0, 2, 1, 3]
Shape = tuple[int | str, ...]
"""Sizes of a graph's tensor; a free one has a name."""


class FourDimensional(Functions):
    """Calls of `scaled_dot_product_attention` get four dimensions and as many heads everywhere, as the node needs them."""

    def instead(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function, attention on reshaped tensors."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(
            zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)
        )
        return _attention(named | kwargs)


def _attention(given: dict[str, Any]) -> torch.Tensor:
    parts, mask = [given["query"], given["key"], given["value"]], given.get("attn_mask")
    lead, pairs = tuple(parts[0].shape[:-2]), (parts[0].shape[-2], parts[1].shape[-2])
    if mask is not None:
        if tuple(mask.shape[-2:]) != pairs:  # ONNX Runtime wants a row for each query
            mask = mask.expand(*mask.shape[:-2], *pairs)
        if len(lead) != 2 and mask.ndim > 2:
            mask = mask.expand(*lead, *pairs).reshape(1, -1, *pairs)
        mask = mask[(None,) * (4 - mask.ndim)]
    if len(lead) != 2:
        parts = [t.reshape(1, -1, *t.shape[-2:]) for t in parts]
    found = F.scaled_dot_product_attention(
        *(parts[0], parts[1], parts[2], mask),
        dropout_p=given.get("dropout_p", 0.0),
        is_causal=given.get("is_causal", False),
        scale=given.get("scale"),
        enable_gqa=bool(parts[1].shape[1] != parts[0].shape[1]),
    )
    return found if len(lead) == 2 else found.reshape(*lead, *found.shape[-2:])


def by_rows(graph: Any) -> None:
    """Let the graph's attention read and give rows where its heads were only split for it; changes the GraphProto."""
    from onnx import helper

    shapes = {value.name: _shape(value) for value in (*graph.value_info, *graph.input)}
    made = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[Any]] = {value.name: [None] for value in graph.output}
    for node in graph.node:
        for name in read([node]):
            readers.setdefault(name, []).append(node)
    changed = False
    for node in graph.node:
        if node.op_type == "Attention" and len(node.input) <= 4 and not any(node.output[1:]):
            rows = [_before(name, made, shapes) for name in node.input[:3]]
            merge = _after(node.output[0], readers, shapes)
            if all(rows) and merge is not None:
                heads = [shapes[name][1] for name in node.input[:2]]
                node.attribute.append(helper.make_attribute("q_num_heads", heads[0]))
                node.attribute.append(helper.make_attribute("kv_num_heads", heads[1]))
                node.input[:3] = rows
                node.output[0], merge.output[0] = merge.output[0], node.output[0]
                changed = True
    if changed:
        _keep_needed(graph)


def _before(name: str, made: Mapping[str, Any], shapes: Mapping[str, Shape]) -> str | None:
    """The rows that were split into the heads of a tensor, or None."""
    swap = made.get(name)
    split = made.get(swap.input[0]) if swap is not None and _swaps(swap) else None
    fits = split is not None and _regroups(
        split, shapes.get(split.output[0], ()), shapes.get(split.input[0], ())
    )
    return split.input[0] if fits and split is not None else None


def _after(name: str, readers: Mapping[str, list[Any]], shapes: Mapping[str, Shape]) -> Any:
    """The node that merges the heads of a tensor into rows, if nothing else reads it; else None."""
    swap = _only(readers, name)
    if swap is None or not _swaps(swap):
        return None
    merge = _only(readers, swap.output[0])
    if merge is None:
        return None
    fits = _regroups(merge, shapes.get(swap.output[0], ()), shapes.get(merge.output[0], ()))
    return merge if fits else None


def _only(readers: Mapping[str, list[Any]], name: str) -> Any:
    following = readers.get(name, [])
    return following[0] if len(following) == 1 else None


def _swaps(node: Any) -> bool:
    """Whether a node exchanges positions and heads."""
    return node.op_type == "Transpose" and any(list(item.ints) == _SWAPPED for item in node.attribute)


def _regroups(node: Any, heads: Shape, rows: Shape) -> bool:
    """Whether a node reshapes between heads (b, s, h, d) and rows (b, s, h * d) and does nothing else."""
    if node.op_type != "Reshape" or len(heads) != 4 or len(rows) != 3 or not all(heads):
        return False
    count, size = heads[2:]
    return (
        heads[:2] == rows[:2] and isinstance(count, int) and isinstance(size, int) and rows[2] == count * size
    )


def _shape(value: Any) -> Shape:
    return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)


def _keep_needed(graph: Any) -> None:
    """Drop the nodes whose outputs nobody reads."""
    used, kept = {value.name for value in graph.output}, []
    for node in reversed(graph.node):
        if used.intersection(node.output):
            kept.append(node)
            used.update(read([node]))
    del graph.node[:]
    graph.node.extend(reversed(kept))
