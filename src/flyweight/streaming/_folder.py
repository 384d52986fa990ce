"""The output folder around the blocks: what enters it, what is copied into it, and how it becomes a Hugging Face folder."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from flyweight.artifact._files import PIECE, disk_errors
from flyweight.codes import integer
from flyweight.errors import MachineError, UsageError
from flyweight.records import JSON
from flyweight.runtimes._compressed_tensors import configuration, packed
from flyweight.streaming import _journal, _shards, _writing
from flyweight.streaming._journal import Journal
from flyweight.streaming._shards import CONFIG, INDEX, Source
from flyweight.streaming._writing import Entry, Written
from flyweight.transforms import QuantizedLayer

_TEXTS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md")
_NAMES = ("LICENSE", "NOTICE")
"""Files of a model's folder that go with it: its tokenizer, its settings, and what may be done with it."""
_LARGEST = 2**28
"""Bytes of such a file."""


def enter(out: Path, source: Path, *, resume: bool) -> None:
    """Make the output folder; raises UsageError when it holds something else, MachineError when it cannot be written."""
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise UsageError(
            "the output must be a folder", got="a file", where=str(out), way_out="name another one"
        )
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in out.iterdir() if not path.name.endswith(".part"))
    if out.samefile(source):
        raise UsageError("the output must be another folder than the model's", got=str(out), where="-o")
    begun = _journal.NAME in names
    if names and not (resume and begun):
        raise UsageError(
            "the output folder must be new or empty",
            got=names[0] if not begun else "another run",
            where=str(out),
            way_out="--resume goes on with the run that it holds" if begun else "name another one",
        )


def shard_of(number: int, blocks: int) -> str:
    """The name of a block's shard, from 1 up; that of all other tensors comes behind the last block's."""
    return f"model-{number:05d}-of-{blocks + 1:05d}.safetensors"


def block_entries(
    source: Source, keys: Sequence[str], layers: Mapping[str, QuantizedLayer], dtype: torch.dtype
) -> list[Entry]:
    """The tensors of a block's shard: keys name those in the source; layers in a code take the place of their weights.

    layers: by their paths in the files. dtype: the model's floats.
    """
    found = [
        _writing.held(name, t)
        for path, layer in layers.items()
        for name, t in packed(path, *layer.encoded(), layer.shape, dtype).items()
    ]
    return found + [copied(source, key) for key in keys if key.removesuffix(".weight") not in layers]


def copied(source: Source, key: str) -> Entry:
    """A tensor as it lies in the source."""
    return _writing.copied(source.tensors[key], functools.partial(_shards.pieces, source, key))


def finish(out: Path, source: Source, journal: Journal, code: integer.Options) -> tuple[Written, ...]:
    """Write all that is not a block: the other tensors, the index, the companions, and the configuration last.

    Raises MachineError when the disk does not take it.
    """
    count, done = len(journal.blocks), {block.file.name: block.file for block in journal.blocks}
    inside = {key for block in journal.blocks for key in block.keys}
    others = [copied(source, key) for key in source.tensors if key not in inside]
    rest = _writing.write_shard(out / shard_of(count + 1, count), others)
    placed = {one.name: shard for shard in (*done, rest.name) for one in _shards.header(out, shard)[0]}
    total = sum(one.end - one.begin for shard in (*done, rest.name) for one in _shards.header(out, shard)[0])
    index: dict[str, JSON] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    files = [rest, _writing.write_json(out / INDEX, index)]
    files += [_writing.write(out / path.name, _pieces(path)) for path in _companions(source.folder)]
    layers = {path: code for block in journal.blocks for path in block.layers}
    ignore = [path for block in journal.blocks for path in block.left]
    said = configuration(layers, [*ignore, *journal.outside])
    config = _shards.document(source.folder, CONFIG)
    return (*files, _writing.write_json(out / CONFIG, {**config, "quantization_config": said}))


def _companions(folder: Path) -> Iterator[Path]:
    """The files of a model's folder that go with it; no weights, and no code."""
    for path in sorted(folder.iterdir()):
        ours = path.name in (CONFIG, INDEX, _journal.NAME) or path.name.endswith(".index.json")
        if path.is_file() and not ours and (path.suffix in _TEXTS or path.name.startswith(_NAMES)):
            yield path


def _pieces(path: Path) -> Iterator[bytes]:
    with disk_errors(path), path.open("rb") as file:
        left = _LARGEST
        while piece := file.read(PIECE):
            left -= len(piece)
            if left < 0:
                rule = f"a file beside the weights may have {_LARGEST:,} bytes"
                raise MachineError(rule, got="more", where=str(path), way_out="move it elsewhere")
            yield piece
