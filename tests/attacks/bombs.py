"""Attacks that try to make a reader take more memory or time than the files are worth, or misread them."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from artifact import samples
from artifact.samples import entry, safetensors
from attacks.attack import Attack

F32 = 4


def _manifest(name: str, value: str, says: str | None) -> Attack:
    """A manifest whose `outputs` is this JSON text."""

    def forge(folder: Path) -> None:
        lines = (folder / "manifest.json").read_bytes().splitlines(keepends=True)[1:-1]
        kept = [line for line in lines if not line.startswith(b'"outputs"')]
        samples.resign_raw(folder, b"".join(kept) + b'"outputs": ' + value.encode() + b",\n")

    return Attack(name, forge, says)


def _values(name: str, change: Callable[[dict[str, Any]], object], says: str) -> Attack:
    return Attack(name, lambda folder: samples.resign(folder, change), says)


def _weights(name: str, raw: bytes, says: str) -> Attack:
    return Attack(name, lambda folder: samples.replace_weights(folder, raw), says)


def _tensor(name: str, described: object, buffer: bytes, says: str) -> Attack:
    return _weights(name, safetensors({"t": described}, buffer), says)


def _graph(name: str, raw: Callable[[], bytes], says: str) -> Attack:
    return Attack(name, lambda folder: samples.replace_file(folder, "model.onnx", raw()), says)


def _external(name: str, entries: list[tuple[str, str]], says: str) -> Attack:
    def raw() -> bytes:
        tensor = samples.external(0, 0)
        del tensor.external_data[:]
        for key, value in entries:
            tensor.external_data.add(key=key, value=value)
        return bytes(samples.model(tensor).SerializeToString())

    return _graph(name, raw, says)


def _grow(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def _crowd(folder: Path) -> None:
    for number in range(300):
        (folder / f"{number}").touch()


def _zip_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", bytes(20_000_000))
    return file.getvalue()


def _polyglot(folder: Path) -> None:
    raw = (folder / "weights.safetensors").read_bytes()
    samples.replace_weights(folder, raw + _zip_bomb())


def _inline(folder: Path) -> None:
    """The external data is spelled right, but the tensor says that its data is within."""
    tensor = samples.external(*samples.extent((folder / "weights.safetensors").read_bytes(), "layer.weight"))
    tensor.data_location = onnx.TensorProto.DEFAULT
    samples.replace_file(folder, "model.onnx", samples.model(tensor).SerializeToString())


def _deep_graph() -> bytes:
    """Graphs in attributes of nodes of graphs (fields 1, 5, 6), 500 times: 1,500 messages in one another."""
    graph = b""
    for _ in range(500):
        graph = _field(1, _field(5, _field(6, graph)))
    return _field(7, graph)


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field that holds a message."""
    length, size = len(content), bytearray()
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *size, length]) + content


def _hidden_tensors() -> list[tuple[str, onnx.ModelProto]]:
    """Models with a tensor that lies elsewhere, each in another corner of the format."""
    away = samples.external(0, 64, "/etc/passwd")
    found = []
    for corner in (
        "attribute",
        "attributes",
        "sparse",
        "subgraph",
        "function",
        "training",
        "sparse attribute",
    ):
        model = samples.model(samples.external(0, 0))
        del model.graph.initializer[:]
        node = model.graph.node[0]
        attribute = node.attribute.add(name="a")
        if corner == "attribute":
            attribute.t.CopyFrom(away)
        elif corner == "attributes":
            attribute.tensors.add().CopyFrom(away)
        elif corner == "sparse":
            model.graph.sparse_initializer.add().values.CopyFrom(away)
        elif corner == "subgraph":
            attribute.g.node.add().attribute.add(name="b").g.initializer.add().CopyFrom(away)
        elif corner == "function":
            model.functions.add().node.add().attribute.add(name="c").t.CopyFrom(away)
        elif corner == "training":
            model.training_info.add().algorithm.initializer.add().CopyFrom(away)
        else:
            attribute.sparse_tensor.indices.CopyFrom(away)
        found.append((corner, model))
    return found


MANIFESTS = (
    Attack("a manifest of 1 TiB", _grow("manifest.json", 2**40), "may have 1048576 bytes"),
    _manifest("lists 100,000 deep", "[" * 100_000 + "]" * 100_000, "must be strict JSON"),
    _manifest("objects 65 deep", '{"a":' * 65 + "1" + "}" * 65, "64 levels deep"),
    _manifest("300,000 empty lists", "[" + "[]," * 300_000 + "[]]", None),
    _manifest("a number of 900,000 digits", "9" * 900_000, "must be strict JSON"),
    _manifest("a number of 5,000 digits as a float", "9" * 5000 + ".5", "beyond float64"),
    _manifest("a number beyond float64", "1e999999", "beyond float64"),
    _manifest("NaN", "NaN", "not a number in JSON"),
    _manifest("minus infinity", "-Infinity", "not a number in JSON"),
    _manifest("a key twice", '{"a":1,"a":2}', "a key stands twice"),
    _manifest("a key twice, spelled in two ways", '{"a":1,"\\u0061":2}', "a key stands twice"),
    _manifest("a top-level key twice", '1,\n"runtime": "other"', "a key stands twice"),
    Attack(
        "bytes that are no UTF-8", lambda at: samples.resign_raw(at, b'"a": "\x80",\n'), "must be strict JSON"
    ),
    _values("a key too many", lambda it: it.update(more=1), "'added': ['more']"),
    _values("a key too few", lambda it: it.pop("plan"), "'absent': ['plan']"),
    _values("no version", lambda it: it.pop("flyweight_artifact"), "the number of the format"),
    _values(
        "a version that is true", lambda it: it.update(flyweight_artifact=True), "the number of the format"
    ),
    _values("version 0", lambda it: it.update(flyweight_artifact=0), "the number of the format"),
    _values("a version of 400 digits", lambda it: it.update(flyweight_artifact=10**400), "upgrade flyweight"),
    _values(
        "a file of minus one bytes", lambda it: it["files"]["model.onnx"].update(bytes=-1), "number of bytes"
    ),
    _values(
        "a file of half a byte", lambda it: it["files"]["model.onnx"].update(bytes=0.5), "number of bytes"
    ),
    _values("a short digest", lambda it: it["files"]["model.onnx"].update(sha256="00"), "SHA-256"),
    _values("a shape of text", lambda it: it["tensors"]["packed"].update(shape="5"), "must have a shape"),
    _values("a shape of true", lambda it: it["tensors"]["packed"].update(shape=[True]), "must have a shape"),
    _values("no files", lambda it: it.update(files={}), "the manifest must list every file"),
    _values("files as a list", lambda it: it.update(files=[]), "files must be an object"),
    _values(
        "a plan of another version", lambda it: it["plan"].update(flyweight_plan=9), "plans of version 1"
    ),
    Attack("300 files", _crowd, "at most 7 files"),
)

WEIGHTS = (
    Attack("weights of 1 TiB", _grow("weights.safetensors", 2**40), "the file must have 405 bytes"),
    _weights("a header of 2**63 bytes", safetensors(b"{}", length=2**63), "its length and its header"),
    _weights(
        "a header of 2**64 - 1 bytes", safetensors(b"{}", length=2**64 - 1), "its length and its header"
    ),
    _weights("a header of 2 MiB", safetensors(b"{" + b" " * 2**21 + b"}"), "a header may have 1048576 bytes"),
    _weights("a header of 1 byte", safetensors(b"{"), "padded with spaces"),
    _weights("a header of no bytes", safetensors(b""), "padded with spaces"),
    _weights("a header that is a list", safetensors(b"[]"), "padded with spaces"),
    _weights("a header after a space", safetensors(b" {}"), "padded with spaces"),
    _weights("a header padded with NUL", safetensors(b"{}\0\0"), "padded with spaces"),
    _weights("a header with NaN", safetensors(b'{"t":NaN}'), "not a number in JSON"),
    _weights("a header with a tensor twice", safetensors(b'{"t":{},"t":{}}'), "a key stands twice"),
    _weights("a header in UTF-16", safetensors("{}".encode("utf-16-le")), "padded with spaces"),
    _weights("a header 100,000 deep", safetensors(b'{"t":' + b"[" * 10**5 + b"}"), "must be strict JSON"),
    _weights(
        "a header of 300,000 lists", safetensors(b'{"t":[' + b"[]," * 300_000 + b"[]]}"), "dtype, shape and"
    ),
    _weights(
        "a header of 10**6 tensors",
        safetensors(b"{" + b",".join(b'"%d":0' % at for at in range(10**6)) + b"}"),
        "a header may have 1048576 bytes",
    ),
    _weights(
        "15,000 tensors without bytes",
        safetensors({f"{at}": entry("U8", [0], 0, 0) for at in range(15_000)}),
        "the manifest must list every tensor",
    ),
    _tensor("a shape of 10**12", entry("F32", [10**12], 0, F32), bytes(F32), "takes 4000000000000 bytes"),
    _tensor(
        "a view with stride 0", entry("F32", [10**6, 10**6], 0, F32), bytes(F32), "takes 4000000000000 bytes"
    ),
    _tensor(
        "a size that wraps at 64 bits",
        entry("F32", [2**62, 4], 0, 0),
        b"",
        "takes 73786976294838206464 bytes",
    ),
    _tensor("a negative length", entry("F32", [-1, -1], 0, F32), bytes(F32), "a shape has"),
    _tensor("a length of 1.0", entry("F32", [1.0], 0, F32), bytes(F32), "a shape has"),
    _tensor("a length of true", entry("F32", [True], 0, F32), bytes(F32), "a shape has"),
    _tensor("100,000 dimensions", entry("F32", [1] * 100_000, 0, F32), bytes(F32), "a shape has"),
    _tensor("an unknown dtype", entry("F4096", [1], 0, 512), bytes(512), "a tensor's dtype is one of"),
    _tensor("a dtype that is a list", entry(["F32"], [1], 0, F32), bytes(F32), "a tensor's dtype is one of"),
    _tensor("offsets past the end", entry("F32", [2], 0, 8), bytes(F32), "the tensors must fill the file"),
    _tensor(
        "offsets of 2**63", entry("F32", [1], 2**63, 2**63 + 4), bytes(F32), "data_offsets are two numbers"
    ),
    _tensor("offsets backwards", entry("F32", [1], F32, 0), bytes(F32), "takes 4 bytes"),
    _tensor(
        "three offsets", {**entry("F32", [1], 0, 0), "data_offsets": [0, 4, 4]}, bytes(F32), "two numbers"
    ),
    _tensor("a hole at the start", entry("F32", [1], 4, 8), bytes(8), "a hole"),
    _tensor(
        "bytes after the last tensor", entry("F32", [1], 0, F32), bytes(8), "the tensors must fill the file"
    ),
    _tensor("one key more", {**entry("F32", [1], 0, F32), "strides": [0]}, bytes(F32), "dtype, shape and"),
    _weights(
        "two tensors over one another",
        safetensors({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)),
        "an overlap",
    ),
    _weights(
        "two tensors in one place",
        safetensors({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, bytes(4)),
        "an overlap",
    ),
    _weights(
        "a hole between two tensors",
        safetensors({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, bytes(12)),
        "a hole",
    ),
    _weights("metadata that is a list", safetensors(b'{"__metadata__":[]}'), "metadata must be texts"),
    _weights("metadata of numbers", safetensors(b'{"__metadata__":{"a":1}}'), "metadata must be texts"),
    _weights("a zip bomb", _zip_bomb(), "its length and its header"),
    Attack("a zip bomb behind the weights", _polyglot, "the tensors must fill the file"),
)

NUMBERS = ("-8", "+8", "8.0", "0x8", "1e3", " 8", "8 ", "08", "8" * 400, "", "\u0668")
"""What other readers may take for a number."""
GRAPHS = (
    Attack("a graph of 1 TiB", _grow("model.onnx", 2**40), "may have 67108864 bytes"),
    _graph("a graph 1,500 deep", _deep_graph, "must be an ONNX model"),
    _graph(
        "a graph with a field that onnx does not know",
        lambda: samples.graph(0, 0) + _field(15, b""),
        "unknown",
    ),
    _external("the header as weights", [*samples.AT, ("offset", "0"), ("length", "64")], "must lie in bytes"),
    _external(
        "weights past the end", [*samples.AT, ("offset", "400"), ("length", "64")], "must lie in bytes"
    ),
    _external(
        "weights of 2**62 bytes",
        [*samples.AT, ("offset", "360"), ("length", f"{2**62}")],
        "must lie in bytes",
    ),
    _external("no offset", [*samples.AT, ("length", "64")], "location, offset and length"),
    _external("no length", [*samples.AT, ("offset", "360")], "location, offset and length"),
    _external("no location", [("offset", "360"), ("length", "4")], "location, offset and length"),
    _external("nothing at all", [], "location, offset and length"),
    _external(
        "two locations",
        [("location", "/etc/passwd"), *samples.AT, ("offset", "360"), ("length", "4")],
        "location, offset and length",
    ),
    _external(
        "one key more",
        [*samples.AT, ("offset", "360"), ("length", "4"), ("basepath", "/etc")],
        "location, offset and length",
    ),
    *(
        _external(
            f"offset {number[:9]!a}", [*samples.AT, ("offset", number), ("length", "4")], "are plain numbers"
        )
        for number in NUMBERS
    ),
    _graph(
        "an offset that is no UTF-8",
        lambda: samples.graph(360, 4).replace(b"360", b"\xae60"),
        "are plain numbers, got b'\\xae60'",
    ),
    Attack("weights within and without", _inline, "location, offset and length"),
    *(
        _graph(f"weights elsewhere, in {corner}", model.SerializeToString, "must lie in weights.safetensors")
        for corner, model in _hidden_tensors()
    ),
)
ATTACKS = (*MANIFESTS, *WEIGHTS, *GRAPHS)
