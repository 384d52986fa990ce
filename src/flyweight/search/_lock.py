"""One writer at a time: a POSIX lock on NAME-lock, which the kernel releases when the process ends.

The lock file may be left behind by a killed process; it blocks nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from flyweight.errors import UsageError

_held_here: set[Path] = set()  # POSIX locks do not see their own process: this catches a second opening in it


def acquire(path: Path) -> int:
    """Lock `path` for this process and return the handle for `release`.

    Raises UsageError that names the process which holds it, OSError when the folder refuses.
    """
    while True:
        if path in _held_here:
            raise _in_use(path, str(os.getpid()))
        handle = os.open(_beside(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        if _take(path, handle):
            _held_here.add(path)
            return handle


def release(path: Path, handle: int) -> None:
    """Free the lock that `acquire` gave; raises nothing."""
    _remove(path)  # first: once the handle is closed the file may be another process's lock
    os.close(handle)
    _held_here.discard(path)


def _take(path: Path, handle: int) -> bool:
    """Lock the handle; false (and closed) when its file was removed by the holder before us."""
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, handle)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise _in_use(path, os.pread(handle, 20, 0).decode(errors="replace")) from error
        if not _in_place(path, handle):
            return False
        undo.callback(_remove, path)
        os.truncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        undo.pop_all()
    return True


def _in_place(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(_beside(path).stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # a lock file that stays behind blocks nobody
        _beside(path).unlink()


def _beside(path: Path) -> Path:
    return path.with_name(path.name + "-lock")


def _in_use(path: Path, holder: str) -> UsageError:
    who = f"process {holder}" if holder.isdigit() else "another process"
    way_out = "wait for it, or give another output folder"
    return UsageError(f"the study is in use by {who}", where=str(path), way_out=way_out)
