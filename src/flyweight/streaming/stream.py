"""The flow: find the blocks, then change one after another, each behind the changes before it; resumable after each.

    take in -> find the chain -> for each block: fill, learn, round, write, step on -> copy the rest -> configuration

The file that makes the folder a model, config.json, is written last: what transformers loads is finished.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from flyweight.analysis.blocks import Chain, Stream
from flyweight.errors import ModelError
from flyweight.inputs.language_model import CALIBRATING, calibrating_windows, in_batches
from flyweight.records import JSON
from flyweight.report import _words
from flyweight.report.progress import Progress
from flyweight.streaming import _block, _folder, _journal, _shards, _skeleton, _writing
from flyweight.streaming._block import States
from flyweight.streaming._journal import Done, Journal
from flyweight.streaming._shards import Source
from flyweight.streaming._skeleton import Skeleton
from flyweight.transforms import weight_only

_WHERE = "options"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every linear layer of the blocks becomes; checked when a run begins."""

    bits: int = 4
    """Of an integer: 8, 6, 5, 4, 3 or 2."""
    group: int | None = 32
    """Inputs that share a scale: 16, 32, 64, 128 or 256; None: an output channel's."""
    symmetric: bool = True
    """No zero point; False: a better fit that transformers decodes to floats when it loads it."""
    rounding: str = "error_feedback"
    """A file of `flyweight.roundings`."""
    windows: int = CALIBRATING
    """The most windows of the text that calibrate."""
    window: int = 256
    """Tokens in a window."""

    def method(self) -> weight_only.Options:
        """The same as options of `weight_only`; raises UsageError for what it does not know."""
        named: dict[str, JSON] = {"bits": self.bits, "group": self.group, "symmetric": self.symmetric}
        return weight_only.read({**named, "scale": "float16", "rounding": self.rounding}, _WHERE)


@dataclass(frozen=True)
class Streamed:
    """What a run made."""

    folder: Path
    blocks: int
    layers: int
    """Layers in the code."""
    left: Mapping[str, str]
    """Linear layers in the blocks that stay as they are, by their paths, and why."""
    bytes_before: int
    """Of the tensors."""
    bytes_after: int
    """Of the shards."""
    resumed: int
    """Blocks that were finished before."""
    seconds: float

    def summary(self) -> str:
        """What was made, in a few lines to read."""
        before, after = _words.size(self.bytes_before), _words.size(self.bytes_after)
        what = f"{_words.plural(self.layers, 'layer')} of {_words.plural(self.blocks, 'block')}"
        lines = [f"{self.folder}: {what}, {before} -> {after}, in {_words.duration(self.seconds)}"]
        if self.resumed:
            lines.append(f"{_words.plural(self.resumed, 'block')} had been finished before")
        lines += [f"{path} stays as it is: {reason}" for path, reason in self.left.items()]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Run:
    """What all blocks of a run have in common."""

    out: Path
    frame: Skeleton
    chain: Chain
    given: Stream
    options: weight_only.Options
    told: Progress

    @property
    def source(self) -> Source:
        return self.frame.source


def stream(
    folder: str | Path,
    text: str | Path,
    out: str | Path,
    options: Options | None = None,
    *,
    resume: bool = False,
    progress: bool = False,
) -> Streamed:
    """Write a causal language model's folder anew with the linear layers of its blocks in few bits, one block in memory.

    folder: a Hugging Face folder with safetensors weights; text: UTF-8, its first 60 % calibrate. resume: go on with the run
    that `out` holds, if any. The format is compressed-tensors. Raises UsageError, ModelError, DataError, ArtifactError or
    MachineError that names what is wrong; what is finished stays, for a run with resume.
    """
    begin, folder, out, options = time.monotonic(), Path(folder), Path(out), options or Options()
    method = options.method()
    windows = calibrating_windows(folder, text, window=options.window, calibrating=options.windows)
    _folder.enter(out, folder, resume=resume)
    with _writing.alone_in(out), Progress(progress, math.inf) as told:
        source = _shards.opened(folder)
        frame = _skeleton.skeleton(folder, source)
        identity = _identity(source, windows, options)
        journal = _journal.begun(out, identity) or _new(out, frame, windows, identity, told)
        resumed = len(journal.blocks)
        if not journal.rest:
            chain, examples = Chain(journal.chain), in_batches(windows)
            run = _Run(out, frame, chain, _skeleton.entries(frame, chain, examples), method, told)
            journal = _finished(run, _along(run, journal))
    return _streamed(out, source, journal, resumed, time.monotonic() - begin)


def _identity(source: Source, windows: torch.Tensor, options: Options) -> dict[str, JSON]:
    """What a run belongs to: another model, text or option is another run."""
    read = hashlib.sha256(f"{tuple(windows.shape)}".encode() + windows.contiguous().numpy().tobytes())
    return {
        "model": source.digest,
        "text": read.hexdigest(),
        "options": dataclasses.asdict(options),
        "flyweight": metadata.version("flyweight"),
        "torch": torch.__version__,
    }


def _new(
    out: Path, frame: Skeleton, windows: torch.Tensor, identity: Mapping[str, JSON], told: Progress
) -> Journal:
    """The journal of a run that begins."""
    told.stage("reading every weight once, to find the blocks")
    chain = _skeleton.chain(frame, windows)
    inside = tuple(f"{path}." for path in chain.paths)
    outside = [
        path.removeprefix("model.")
        for path, module in frame.model.named_modules()
        if isinstance(module, nn.Linear) and not f"{path}.".startswith(inside)
    ]
    journal = Journal(identity, chain.paths, tuple(outside))
    journal.write(out)
    return journal


def _along(run: _Run, journal: Journal) -> Journal:
    """All blocks that are not finished yet, one after another."""
    paths, done = run.chain.paths, len(journal.blocks)
    states = _states(run, journal)
    run.told.stage(f"changing {_words.plural(len(paths), 'block')} one by one", len(paths) - done)
    for number in range(done, len(paths)):
        run.told.step(paths[number].removeprefix("model."))
        begin = time.monotonic()
        block, behind = _one(run, number, states)
        journal, states = _kept(run, journal, block, behind), behind or states
        gc.collect()  # a pass that was stopped early leaves cycles, which hold tensors of the block
        size = _words.size(block.file.bytes)
        run.told.done(
            f"{_words.plural(len(block.layers), 'layer')}, {size}, {time.monotonic() - begin:.1f} s"
        )
    return journal


def _one(run: _Run, number: int, states: States) -> tuple[Done, States | None]:
    """One block changed and its shard written; and what leaves it."""
    path, frame, count = run.chain.paths[number], run.frame, len(run.chain.paths)
    bare = path.removeprefix("model.")
    with _block.named(bare):
        changed = _block.changed(
            frame.filled(path), run.given.arguments[number], states, run.options, last=number + 1 == count
        )
    layers = {frame.key(f"{path}.{inner}"): layer for inner, layer in changed.layers.items()}
    left = {f"{bare}.{inner}": reason for inner, reason in changed.left.items()}
    keys = [key for name, key in frame.keys.items() if name.startswith(f"{path}.")]
    entries = _folder.block_entries(run.source, keys, layers, _floats(run.source, keys))
    file = _writing.write_shard(run.out / _folder.shard_of(number + 1, count), entries)
    return Done(file, tuple(f"{bare}.{inner}" for inner in changed.layers), left, tuple(keys)), changed.behind


def _kept(run: _Run, journal: Journal, block: Done, behind: States | None) -> Journal:
    """The journal with one block more, written behind the hidden states, before those before it go."""
    before, after = journal.states, None
    if behind is not None:
        sides = {"current": behind.current, "original": behind.original}
        entries = [
            _writing.held(f"{side}.{i}", t) for side, held in sides.items() for i, t in enumerate(held)
        ]
        after = _writing.write_shard(run.out / f".states-{len(journal.blocks) + 1:05d}.safetensors", entries)
    journal = dataclasses.replace(journal, blocks=(*journal.blocks, block), states=after)
    journal.write(run.out)
    if before is not None:
        (run.out / before.name).unlink(missing_ok=True)
    return journal


def _states(run: _Run, journal: Journal) -> States:
    """The hidden states before the first block that is not finished."""
    if journal.states is None:
        return States(run.given.states, run.given.states)
    found, count = _shards.loaded(run.out, journal.states.name), len(run.given.states)
    sides = ([found[f"{side}.{index}"] for index in range(count)] for side in ("original", "current"))
    return States(*sides)


def _finished(run: _Run, journal: Journal) -> Journal:
    if not any(block.layers for block in journal.blocks):
        reasons = sorted({reason for block in journal.blocks for reason in block.left.values()})
        got = reasons[0] if reasons else "no linear layers"
        raise ModelError("some layer of the blocks must take the code", got=got, where=str(run.source.folder))
    run.told.stage("copying what is outside the blocks")
    rest = _folder.finish(run.out, run.source, journal, run.options.coding)
    journal = dataclasses.replace(journal, states=None, rest=rest)
    journal.write(run.out)
    for path in run.out.glob(".states-*"):
        path.unlink(missing_ok=True)
    return journal


def _floats(source: Source, keys: Sequence[str]) -> torch.dtype:
    """The type of a block's floats: that of most of its bytes."""
    sizes: dict[str, int] = {}
    for key in keys:
        extent = source.tensors[key]
        sizes[extent.dtype] = sizes.get(extent.dtype, 0) + extent.end - extent.begin
    found: torch.dtype = getattr(torch, max(sizes, key=lambda name: sizes[name]))
    return found


def _streamed(out: Path, source: Source, journal: Journal, resumed: int, seconds: float) -> Streamed:
    after = [file.bytes for file in journal.files if file.name.endswith(".safetensors")]
    left = {path: reason for block in journal.blocks for path, reason in block.left.items()}
    layers = sum(len(block.layers) for block in journal.blocks)
    return Streamed(out, len(journal.blocks), layers, left, source.nbytes, sum(after), resumed, seconds)
