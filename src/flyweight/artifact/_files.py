"""Opens the files of an artifact without trusting them, and moves their bytes.

Names come from the fixed list NAMES alone; every open goes through the handle of the folder.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeAlias

from flyweight.artifact._strict import damaged, shown
from flyweight.artifact.manifest import FILES, MANIFEST
from flyweight.errors import MachineError

NAMES = (MANIFEST, *FILES)
MOST = 7
"""Files of an artifact: the manifest, and a Hugging Face folder."""
MAX_FILES = 8
"""Entries of a folder that are looked at before it is refused."""
PIECE = 2**20
"""Bytes that are read at once."""
Sink: TypeAlias = "Callable[[bytes], object]"


class Stream(Protocol):
    """What a file of tensors is read from, once, from its first to its last byte."""

    def read(self, count: int, /) -> bytes:
        """That many bytes; fewer, or none, at the end."""

    def readinto(self, view: memoryview, /) -> int:
        """Fill the view's first bytes; how many, 0 at the end."""


_UNTOUCHED = "and run again; what was there before is untouched"
_ANSWERS = {
    errno.ENOSPC: ("the disk must have room", f"make room {_UNTOUCHED}"),
    errno.EDQUOT: ("the disk quota must leave room", f"make room {_UNTOUCHED}"),
    errno.EFBIG: ("the file must be within the limit of this process", f"raise the limit {_UNTOUCHED}"),
    errno.EACCES: ("the folder must be open to you", "choose another folder, or change its permissions"),
    errno.EPERM: ("the folder must be open to you", "choose another folder, or change its permissions"),
    errno.EROFS: ("the disk must not be read-only", "choose a folder on another disk"),
    errno.ENOENT: ("the folder must be there", "check the path"),
    errno.ENOLCK: ("the disk must know locks", "choose a folder on a local disk"),
}
_OTHERWISE = ("the disk must do what is asked of it", "check the disk and run again")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into a MachineError that says what to do."""
    try:
        yield
    except OSError as error:
        rule, way_out = _ANSWERS.get(error.errno or 0, _OTHERWISE)
        got, where = error.strerror or str(error), shown(str(path), 300)
        raise MachineError(rule, got=got, where=where, way_out=way_out) from error


def is_there(path: Path) -> bool:
    """Whether anything has that name, a link to nothing too; no error passes for a no."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def opened_folder(folder: Path) -> Iterator[int]:
    """A handle of the folder; raises ArtifactError when it is something else."""
    kind = os.lstat(folder).st_mode
    if not stat.S_ISDIR(kind):
        raise damaged(
            "an artifact is a folder",
            got=_kind(kind),
            where=shown(str(folder), 300),
            way_out="give the folder itself; a task loads a .pt file by torch.load(weights_only=True)",
        )
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


def names_in(folder: int) -> list[str]:
    """The names in a folder, sorted; raises ArtifactError on a name outside NAMES or more than MAX_FILES."""
    found: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            found.append(entry.name)
            if len(found) > MAX_FILES:
                raise damaged(f"an artifact has at most {MOST} files", got="more", where="the folder")
    for name in sorted(found):
        if name not in NAMES:
            raise damaged(
                f"an artifact holds only {', '.join(NAMES)}",
                got="one file too many",
                where=shown(name),
                way_out="move the file elsewhere if it is yours, otherwise get an undamaged copy",
            )
    return sorted(found)


@contextmanager
def opened(folder: int, name: str) -> Iterator[tuple[io.FileIO, int]]:
    """An unbuffered stream of a file and its size in bytes.

    Raises ArtifactError when it is missing, no regular file, or also known by another name (a hard link).
    """
    try:
        _check_kind(os.lstat(name, dir_fd=folder), name)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        stream = io.FileIO(os.open(name, flags, dir_fd=folder))
    except FileNotFoundError as error:
        raise damaged("every file of an artifact must be there", got="no such file", where=name) from error
    with stream:
        # Looked at again: between the first look and the open, the file could have been changed for another.
        state = os.fstat(stream.fileno())
        _check_kind(state, name)
        yield stream, state.st_size


def passed(stream: Stream, length: int, sinks: Sequence[Sink], where: str) -> None:
    """Read `length` bytes, piece by piece, into every sink; raises ArtifactError when the file ends early."""
    left = length
    while left:
        piece = stream.read(min(left, PIECE))
        if not piece:
            raise damaged(f"the file must have {left} bytes more", got="its end", where=where)
        for sink in sinks:
            sink(piece)
        left -= len(piece)


def check_size(size: int, limit: int, name: str) -> None:
    """Raise ArtifactError when a file is larger than its limit, both in bytes."""
    if size > limit:
        raise damaged(f"this file may have {limit} bytes", got=f"{size}", where=name)


def _check_kind(state: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise damaged("an artifact holds regular files only", got=_kind(state.st_mode), where=name)
    if state.st_nlink > 1:
        raise damaged(
            "a file of an artifact must have one name",
            got=f"{state.st_nlink} hard links",
            where=name,
            way_out="copy the folder and use the copy",
        )


def _kind(mode: int) -> str:
    checks = {
        "a symbolic link": stat.S_ISLNK,
        "a folder": stat.S_ISDIR,
        "a file": stat.S_ISREG,
        "a pipe": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
    }
    return next((name for name, check in checks.items() if check(mode)), "a device")
