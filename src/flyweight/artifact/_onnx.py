"""Checks that model.onnx refers to bytes of weights.safetensors and to nothing else. Needs onnx, an extra."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from flyweight.artifact._strict import damaged, shown
from flyweight.artifact.manifest import ONNX, WEIGHTS

MAX_ONNX = 2**26
"""Bytes of model.onnx; it holds the graph, not the weights."""
NOT_CHECKED = f"{ONNX}: where its weights lie was not checked, since the package onnx is not installed"
_NUMBER = re.compile("0|[1-9][0-9]{0,18}")
_KEYS = frozenset(("location", "offset", "length"))


def check(raw: bytes, buffer: range) -> bool:
    """Look at every message of the file; False when onnx is not installed and nothing was looked at.

    `buffer`: the bytes of weights.safetensors that may be referred to. Raises ArtifactError when a tensor
    lies elsewhere, when a node names a file, or when this version of onnx does not know a field.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]
    except ImportError:
        return False
    try:
        model = onnx.ModelProto.FromString(raw)
    except DecodeError as error:
        raise damaged("the file must be an ONNX model", got=f"{len(raw)} other bytes", where=ONNX) from error
    for message in _messages(model):
        if len(UnknownFieldSet(message)):
            # Another reader might know them, and read a place there that is not looked at here.
            raise damaged(f"onnx {onnx.__version__} must know every field", got="an unknown one", where=ONNX)
        if isinstance(message, onnx.TensorProto):
            _check_tensor(message, onnx.TensorProto.EXTERNAL, buffer)
        elif isinstance(message, onnx.NodeProto) and message.op_type == "EPContext":
            place = f"{ONNX}, node {shown(message.name)}"
            raise damaged("a node must not name a file", got="EPContext, which does", where=place)
    return True


def _messages(message: Any) -> Iterator[Any]:
    """The message and all within it, whatever the field: no place for a tensor can be forgotten."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in (value,) if hasattr(value, "ListFields") else value:
                yield from _messages(child)


def _check_tensor(tensor: Any, external: int, buffer: range) -> None:
    if not tensor.external_data and tensor.data_location != external:
        return
    place = f"{ONNX}, tensor {shown(tensor.name)}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if set(entries) != _KEYS or len(tensor.external_data) != len(_KEYS) or tensor.data_location != external:
        raise damaged("external data has location, offset and length", got=shown(entries), where=place)
    if entries["location"] != WEIGHTS:
        raise damaged(f"external data must lie in {WEIGHTS}", got=shown(entries["location"]), where=place)
    offset, length = (_number(entries[key], f"{place}, {key}") for key in ("offset", "length"))
    if not buffer.start <= offset <= offset + length <= buffer.stop:
        raise damaged(
            f"external data must lie in bytes {buffer.start} to {buffer.stop}",
            got=f"{length} bytes from {offset}",
            where=place,
        )


def _number(value: str | bytes, place: str) -> int:
    # What is no UTF-8 comes as bytes. Signs, spaces and leading zeros are read otherwise by other readers.
    if not isinstance(value, str) or not _NUMBER.fullmatch(value):
        raise damaged("offset and length are plain numbers", got=shown(value), where=place)
    return int(value)
