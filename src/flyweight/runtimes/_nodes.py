"""Who reads what in an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def read(nodes: Iterable[Any]) -> Iterator[str]:
    """Names of all that nodes read, those of the graphs inside nodes too."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from read(inner.node)
                yield from (value.name for value in inner.output)


def users(nodes: Sequence[Any]) -> dict[str, list[Any]]:
    """The nodes that read each tensor, by name."""
    found: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found
