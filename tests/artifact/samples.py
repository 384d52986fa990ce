"""Small artifacts for the tests, and the forger: changes that keep all digests consistent."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

from flyweight.artifact.format import Manifest, TensorSpec, write
from flyweight.artifact.manifest import sign
from flyweight.records import Plan, Step
from flyweight.runtimes._files import PACKED, pack

MANIFEST = Manifest(
    task="sample",
    runtime="onnxruntime",
    session={"intra_op_num_threads": "1"},
    plan=Plan((Step("int8", "layer", {"bits": 8}),)),
    inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 4)),),
    outputs={"kind": "tensor"},
    layouts={"layer.weight": "rows"},
    model_digest="5e" * 32,
    measured={"score": 0.5, "drop": -0.001, "peak_memory_bytes": None},
    machine={"cores": 2},
    versions={"flyweight": "0.1.0"},
)
AT = [("location", "weights.safetensors")]
"""The one location that a graph may give, as an entry of external data."""


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Four tensors of other dtypes and shapes; two have equal shapes."""
    values = torch.arange(16, dtype=torch.float32).reshape(4, 4)
    return {
        "layer.weight": (values + seed) / 7,
        "other.weight": (values - seed) / 11,
        "packed": torch.tensor([1, 2, 250, seed, 0], dtype=torch.uint8),
        "empty": torch.empty(0, 3, dtype=torch.float16),
    }


def source(folder: Path, seed: int = 0, *, packed: bool = False) -> Path:
    """A folder with weights.safetensors and a model.onnx, y = x @ layer.weight, that refers to it.

    packed: with compressed weights beside the plain ones.
    """
    folder.mkdir(parents=True)
    file = folder / "weights.safetensors"
    save_file(weights(seed), file)
    (folder / "model.onnx").write_bytes(graph(*extent(file.read_bytes(), "layer.weight")))
    if packed:
        pack(file, folder / PACKED)
    return folder


def build(folder: Path, seed: int = 0, *, packed: bool = False) -> Path:
    """A whole small artifact at `folder`."""
    write(folder, source(folder.with_name(f"{folder.name}-source-{seed}"), seed, packed=packed), MANIFEST)
    return folder


def extent(raw: bytes, name: str) -> tuple[int, int]:
    """Offset and length, in the file, of a tensor of a safetensors file."""
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    begin, end = header[name]["data_offsets"]
    return len(raw) - max(item["data_offsets"][1] for item in header.values()) + begin, end - begin


def external(offset: object, length: object, location: str = "weights.safetensors") -> TensorProto:
    """A (4, 4) float tensor whose bytes lie in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model(tensor: TensorProto) -> onnx.ModelProto:
    """The ONNX model y = x @ tensor."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 4])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    made = helper.make_graph(nodes, "g", [x], [y], initializer=[tensor])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def graph(offset: object, length: object, location: str = "weights.safetensors") -> bytes:
    """The bytes of that model, its weight in another file."""
    return bytes(model(external(offset, length, location)).SerializeToString())


def resign(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's values and make its digest right again, as a forger does."""
    file = folder / "manifest.json"
    document = json.loads(file.read_bytes())
    del document["digest"]
    change(document)
    lines = [f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in document.items()]
    resign_raw(folder, "".join(lines).encode())


def resign_raw(folder: Path, lines: bytes) -> None:
    """Make a manifest of these lines, with a right digest."""
    (folder / "manifest.json").write_bytes(sign(b"{\n" + lines))


def replace_weights(folder: Path, raw: bytes) -> None:
    """Put another weights file in place and make its digest in the manifest right, as a forger does."""
    replace_file(folder, "weights.safetensors", raw)


def replace_file(folder: Path, name: str, raw: bytes, **more: object) -> None:
    """Put another file in place and make its digest in the manifest right, as a forger does.

    more: what else its entry gets.
    """
    (folder / name).write_bytes(raw)
    entry = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest(), **more}
    resign(folder, lambda document: document["files"].update({name: entry}))


def packed_file(raw: bytes) -> bytes:
    """Bytes as a gzip file of the format."""
    coder = zlib.compressobj(9, zlib.DEFLATED, 31, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(raw) + coder.flush()


def replace_packed(folder: Path, raw: bytes, unpacked: object) -> None:
    """Put other compressed weights in place, and the size that they are said to unpack to."""
    replace_file(folder, PACKED, raw, unpacked=unpacked)


def safetensors(header: object, buffer: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + buffer


def entry(dtype: object, shape: Sequence[object], begin: object, end: object) -> dict[str, object]:
    """One tensor of a safetensors header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
