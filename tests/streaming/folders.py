"""Small Hugging Face folders to stream, and what a run's answer is compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from inputs.language_folders import byte_tokenizer, prose, written
from safetensors.torch import load_file, save_file

from flyweight.streaming import Options

SMALL = Options(windows=3, window=16)
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def small(folder: Path, **changes: Any) -> Path:
    """A tied Llama of two blocks in one file."""
    return written(folder, **{**SIZES, **changes})


def text_in(folder: Path) -> Path:
    """A text for it."""
    path = folder / "text.txt"
    path.write_text(prose(4000))
    return path


def sharded(folder: Path, **changes: Any) -> Path:
    """The same with a shard for each block, and one for the rest."""
    small(folder, **changes)
    tensors = load_file(folder / "model.safetensors")
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tensor
    for shard, held in shards.items():
        save_file(held, folder / shard, metadata={"format": "pt"})
    placed = {name: shard for shard, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "model.safetensors").unlink()
    return folder


def other(folder: Path, model: Any) -> Path:
    """A folder of another model of transformers, with the tokenizer of bytes."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """All files of a folder, whole."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def edited(path: Path, name: str, change: Any) -> None:
    """A safetensors file with one tensor changed; gone where the change gives None."""
    tensors = load_file(path)
    new = change(tensors.pop(name))
    save_file(tensors if new is None else {**tensors, name: new}, path, metadata={"format": "pt"})
