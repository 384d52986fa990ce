"""Zero padding before a convolution becomes the convolution's own, so that nothing stands between integer layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx

from flyweight.runtimes._export import DOMAIN
from flyweight.runtimes._nodes import users


class Pads:
    """The paddings of a graph that convolutions can take over."""

    def __init__(self, proto: Any) -> None:
        values = {item.name: item for item in proto.graph.initializer}
        readers = users(proto.graph.node)
        taken = {value.name for value in proto.graph.output}
        self._pads: dict[str, tuple[str, list[int]]] = {}
        for node in proto.graph.node:
            only = readers.get(node.output[0], [])
            alone = len(only) == 1 and only[0].domain == DOMAIN and node.output[0] not in taken
            if node.op_type == "Pad" and alone and _zero_pad(node, values):
                amounts = onnx.numpy_helper.to_array(values[node.input[1]]).tolist()
                if only[0].attribute and _is_conv(only[0]) and not any(amounts[:2]) and min(amounts) >= 0:
                    self._pads[node.output[0]] = (node.input[0], amounts)

    def merged(self, node: Any) -> bool:
        """Whether a node is padding that a convolution takes over."""
        return bool(node.output) and node.output[0] in self._pads

    def source(self, x: str, at: Any) -> str:
        """The unpadded input of a convolution whose attributes `at` take over the padding, or its input as it is."""
        if x not in self._pads:
            return x
        source, amounts = self._pads[x]
        rank = len(at["strides"])
        total = len(amounts) // 2
        extra = amounts[total - rank : total] + amounts[2 * total - rank :]
        at["pads"] = [own + more for own, more in zip(at["pads"], extra, strict=True)]
        return source


def _is_conv(node: Any) -> bool:
    return any(item.name == "kind" and item.s == b"conv" for item in node.attribute)


def _zero_pad(node: Any, values: Mapping[str, Any]) -> bool:
    mode = next((item.s for item in node.attribute if item.name == "mode"), b"constant")
    if mode != b"constant" or (len(node.input) > 3 and node.input[3]) or node.input[1] not in values:
        return False
    if len(node.input) > 2 and node.input[2]:
        fill = values.get(node.input[2])
        return fill is not None and not onnx.numpy_helper.to_array(fill).any()
    return True
