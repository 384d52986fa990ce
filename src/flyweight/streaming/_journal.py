"""What is finished of a run, in one file that is replaced as a whole: a killed run goes on behind the last whole block.

After each block its shard is written, then the hidden states behind it, then this file, and only then are the states
before it removed. So the files that it lists are always there; they are checked by their digests before a run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flyweight.artifact._strict import shown
from flyweight.errors import ArtifactError, UsageError
from flyweight.records import JSON, Record
from flyweight.streaming import _shards, _writing
from flyweight.streaming._writing import Written

NAME = "flyweight-stream.json"
VERSION = 1
_WAY_OUT = "delete the output folder, and begin anew"


@dataclass(frozen=True)
class Done(Record):
    """A block that is finished."""

    file: Written
    layers: tuple[str, ...]
    """The layers in a code, by their paths."""
    left: Mapping[str, str]
    """The linear layers that stay as they are, and why."""
    keys: tuple[str, ...]
    """Its tensors in the source."""


@dataclass(frozen=True)
class Journal(Record):
    """A run so far."""

    identity: Mapping[str, JSON]
    """What the run is of: the model's, the windows' and the version's names, and the options."""
    chain: tuple[str, ...]
    """The paths of the blocks, in a model that gives logits alone."""
    outside: tuple[str, ...]
    """The paths of the linear layers outside the blocks, which stay as they are."""
    blocks: tuple[Done, ...] = ()
    states: Written | None = None
    """The hidden states behind the last finished block."""
    rest: tuple[Written, ...] = ()
    """The other files, when all is finished."""

    @property
    def files(self) -> tuple[Written, ...]:
        """All files that it lists."""
        states = () if self.states is None else (self.states,)
        return (*(block.file for block in self.blocks), *states, *self.rest)

    def write(self, folder: Path) -> None:
        """Put the journal into the folder, in place of the one before; raises MachineError when the disk refuses."""
        _writing.write_json(folder / NAME, {"flyweight_stream": VERSION, **self.to_json()})


def begun(folder: Path, identity: Mapping[str, JSON]) -> Journal | None:
    """The journal of a run with this identity, its files checked; None where there is none yet.

    Raises UsageError when the run was of something else, ArtifactError when the journal or a finished file is damaged.
    """
    if not (folder / NAME).exists():
        return None
    value = _shards.document(folder, NAME)
    if value.get("flyweight_stream") != VERSION:
        raise _damaged(
            f"this version reads journals of version {VERSION}", shown(value.get("flyweight_stream"))
        )
    try:
        journal = _read(value)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _damaged("the journal must be as it was written", shown(str(error))) from error
    other = sorted(
        name for name in {*identity, *journal.identity} if identity.get(name) != journal.identity.get(name)
    )
    if other:
        raise UsageError(
            "a run goes on with the model, text and options that it began with",
            got=f"another {', '.join(shown(name) for name in other)}",
            where=str(folder),
            way_out="give the same ones, or another output folder",
        )
    for file in journal.files:
        _writing.require_same(folder, file)
    return journal


def _read(value: Mapping[str, Any]) -> Journal:
    blocks = tuple(
        Done(_file(one["file"]), tuple(one["layers"]), dict(one["left"]), tuple(one["keys"]))
        for one in value["blocks"]
    )
    states = None if value["states"] is None else _file(value["states"])
    rest = tuple(_file(one) for one in value["rest"])
    return Journal(
        dict(value["identity"]), tuple(value["chain"]), tuple(value["outside"]), blocks, states, rest
    )


def _file(value: Mapping[str, Any]) -> Written:
    name = str(value["name"])
    if Path(name).name != name:
        raise ValueError("a file's name leads elsewhere")
    return Written(name, int(value["bytes"]), str(value["sha256"]))


def _damaged(rule: str, got: str) -> ArtifactError:
    return ArtifactError(rule, got=got, where=NAME, way_out=_WAY_OUT)
