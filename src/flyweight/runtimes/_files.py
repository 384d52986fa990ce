"""The files a prepared model consists of, and the predictor that runs them."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from flyweight import discover
from flyweight.errors import DataError
from flyweight.records import JSON, Batch
from flyweight.transforms import QuantizedLayer

WEIGHTS, GRAPH, GGUF = "weights.safetensors", "model.onnx", "model.gguf"
MODEL, CONFIG = "model.safetensors", "config.json"
BESIDE = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
"""The files beside MODEL in a Hugging Face folder; the first must be there."""
PACKED = f"{WEIGHTS}.gz"
"""WEIGHTS as a gzip file, for codes whose integers are far from evenly distributed."""
_PIECE = 2**20
_GZIP = 16 + zlib.MAX_WBITS
_MEMORY = 9
"""zlib's most: the longest blocks, so the fewest tables of codes."""


@dataclass(frozen=True)
class Predictor:
    """A prepared model: call it with a batch, get the model's output."""

    runtime: str
    call: Callable[[Batch], Any]
    files: tuple[Path, ...]
    """The files to keep of what it runs, all in one folder; their names are WEIGHTS or PACKED, and GRAPH, or GGUF
    alone, or MODEL and those of BESIDE."""
    inputs: tuple[tuple[str, str, tuple[int | None, ...]], ...] = ()
    """Name, dtype and shape of each input; None: any size."""
    outputs: JSON = None
    """The output's structure, as `_structure.describe` gives it."""
    layouts: Mapping[str, str] = field(default_factory=dict)
    """Tensors of WEIGHTS that are stored otherwise than in the PyTorch model."""
    session: Mapping[str, str] = field(default_factory=dict)
    """Settings of the runtime's session that belong to the result."""

    def __call__(self, batch: Batch) -> Any:
        """The output on a batch, on the CPU."""
        return self.call(batch)

    @property
    def bytes(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.files)


def write_weights(weights: Mapping[str, torch.Tensor], path: Path) -> dict[str, tuple[int, int]]:
    """Write tensors as safetensors; returns key -> (offset in the file, bytes)."""
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path)
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    return {
        key: (8 + length + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for key, entry in header.items()
        if key != "__metadata__"
    }


def kept_weights(model: nn.Module, folder: Path) -> Path:
    """The file to keep of a model's WEIGHTS in the folder: that file itself, or PACKED, which is then written beside it."""
    if not is_compressed(model):
        return folder / WEIGHTS
    pack(folder / WEIGHTS, folder / PACKED)
    return folder / PACKED


def is_compressed(model: nn.Module) -> bool:
    """Whether a layer's code says COMPRESSED: its integers are small on disk only when they are coded by frequency."""
    codes = {m.code for m in model.modules() if isinstance(m, QuantizedLayer)}
    return any(getattr(discover.method("codes", code), "COMPRESSED", False) for code in codes)


def pack(plain: Path, packed: Path) -> None:
    """Write a file as gzip: equal bytes make equal bytes, since neither name nor time is stored.

    Huffman codes alone: matches cost more than they save in weights, which have none but by chance.
    """
    coder = zlib.compressobj(9, zlib.DEFLATED, _GZIP, _MEMORY, zlib.Z_HUFFMAN_ONLY)
    with plain.open("rb") as source, packed.open("wb") as target:
        while piece := source.read(_PIECE):
            target.write(coder.compress(piece))
        target.write(coder.flush())


def match(batch: Batch, names: Sequence[str], shapes: Sequence[tuple[int | None, ...]]) -> list[torch.Tensor]:
    """A batch's tensors in the order of a graph's inputs; raises DataError when names or shapes do not fit."""
    if isinstance(batch, dict):
        if set(batch) != set(names):
            raise DataError(
                "a batch must have the first example's keys", got=", ".join(batch), way_out=", ".join(names)
            )
        values = [batch[name] for name in names]
    else:
        values = [batch] if isinstance(batch, torch.Tensor) else list(batch)
    if len(values) != len(names):
        raise DataError(
            "a batch must have the first example's tensors", got=str(len(values)), way_out=", ".join(names)
        )
    for name, value, shape in zip(names, values, shapes, strict=True):
        sizes = tuple(value.shape)
        if len(sizes) != len(shape) or any(s not in (None, n) for s, n in zip(shape, sizes, strict=True)):
            wanted = "x".join("any" if s is None else str(s) for s in shape)
            raise DataError(
                "an input must have the shape that was traced",
                got="x".join(map(str, value.shape)),
                where=f"input {name}",
                way_out=f"this graph takes {wanted}; vary that dimension among the task's examples to free it",
            )
    return values
