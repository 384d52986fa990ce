"""Files and folders that come whole or not at all, whenever the process is killed.

* A text: written beside its place, synced, then renamed over it.
* A folder: filled beside its place as `.NAME.part`, synced, then exchanged with the old one in one step of
  the kernel (renameat2 with RENAME_EXCHANGE). Where there is no such step, the old one is renamed to
  `.NAME.old` and the new one in; a kill between the two is repaired by the next read or write, which puts the
  old one back.
* Writers in one folder take turns by a lock of the kernel: nothing has to be unlocked by hand after a kill.
* What a killed writer leaves behind is removed by the next write to the same name.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from flyweight._faults import point
from flyweight.artifact._files import disk_errors, is_there

T = TypeVar("T")

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8 so that `path` holds the old or the new text; lone surrogates are escaped.

    Raises MachineError when the disk does not take it; the old text is then untouched.
    """
    path = path.absolute()
    part = _beside(path, "part")
    with disk_errors(path), locked(path.parent) as parent, ExitStack() as undo:
        undo.callback(part.unlink, missing_ok=True)
        write_file(part, text.encode("utf-8", "backslashreplace"))
        point("text:written")
        part.rename(path)
        point("text:renamed")
        os.fsync(parent)


def replace_folder(folder: Path, fill: Callable[[Path], T]) -> T:
    """Make `folder` what `fill` puts into the empty folder it is handed; what `fill` returns.

    On any failure the old folder stays. `fill` syncs its files itself; the path is absolute. Raises
    MachineError when the disk does not take it.
    """
    part, old = _beside(folder, "part"), _beside(folder, "old")
    with disk_errors(folder), locked(folder.parent) as parent:
        _recover(folder)
        _remove(part)
        with ExitStack() as undo:
            undo.callback(shutil.rmtree, part, ignore_errors=True)
            undo.callback(_recover, folder)
            part.mkdir()
            point("folder:made")
            result = fill(part)
            sync(part)
            point("folder:filled")
            _put(part, folder)
            undo.pop_all()
        point("folder:placed")
        os.fsync(parent)
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)  # the next write tries again
    return result


def recover(folder: Path) -> bool:
    """Wait for writers, put back the old folder where a killed one left none; whether there is a folder now.

    The path is absolute.
    """
    with locked(folder.parent):
        _recover(folder)
        return is_there(folder)


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the folder's lock, waiting for it, and hand out the folder's handle."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


@contextmanager
def synced_file(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A function that appends bytes to a new file at `path`; the file is synced to the disk at the end."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path, flags, 0o666)
    try:
        yield lambda data: _write_all(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes) -> None:
    """Write a file and sync it to the disk."""
    with synced_file(path) as append:
        append(data)


def _write_all(handle: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]


def _put(part: Path, folder: Path) -> None:
    if not is_there(folder):
        part.rename(folder)
    elif not _exchange(part, folder):
        folder.rename(_beside(folder, "old"))
        point("folder:aside")
        part.rename(folder)


def _exchange(one: Path, two: Path) -> bool:
    """Swap two folders in one step; False where the system or its disk cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if not call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(two))


def _recover(folder: Path) -> None:
    """Under the lock: the old folder goes back to its place, or away when there is a new one."""
    old = _beside(folder, "old")
    if is_there(folder):
        _remove(old)
    elif is_there(old):
        old.rename(folder)


def _beside(path: Path, end: str) -> Path:
    return path.with_name(f".{path.name}.{end}")


def _remove(folder: Path) -> None:
    if is_there(folder):
        shutil.rmtree(folder)
