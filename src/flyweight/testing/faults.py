"""Faults to inject, small and reusable: kills, failing writes, flipped bits, cut files, little memory.

For flyweight's own tests and for those of plug-in authors; POSIX only. A killed process shows what survives
in the system's page cache, not what survives a power cut.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from flyweight._faults import VARIABLE

EXIT_RAISED = 70  # the child's work raised; the traceback is on stderr
_WATCHED = ("open", "sqlite3.connect", "import", "socket.", "subprocess.", "os.exec", "os.posix", "os.system")
_ON_SOCKET = frozenset({"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"})
_recorders: list[Opens] = []


@dataclass(frozen=True)
class Ended:
    """How a child process ended."""

    code: int | None
    """Its exit code; None when a signal ended it."""
    signal: int | None
    """The signal that ended it, or None."""


@dataclass(frozen=True)
class Failed:
    """What `fail_nth` raised."""

    errors: list[OSError] = field(default_factory=list)
    """Empty until the n-th call; then that call's error."""


@dataclass(frozen=True)
class Opens:
    """What `audit_opens` saw."""

    events: list[tuple[str, str]] = field(default_factory=list)
    """(event, subject) pairs in order: an opened path, a socket's address, a started program, an import."""

    def of(self, event: str) -> list[str]:
        """The subjects of the events whose name starts with `event`, for example "open" or "socket."."""
        return [subject for name, subject in self.events if name.startswith(event)]


def start(work: Callable[[], object]) -> int:
    """Begin `work()` in a forked child and return its process number, for `ended`.

    The child ends with code 0, with SystemExit's code, or with EXIT_RAISED. It runs no exit handlers.
    """
    child = _fork()
    if child == 0:
        os._exit(_code_of(work))
    return child


def ended(child: int) -> Ended:
    """Wait until that child has ended, and how."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return Ended(None, os.WTERMSIG(status))
    return Ended(os.WEXITSTATUS(status), None)


def in_child(
    work: Callable[[], object], *, kill_after: float | None = None, by: int = signal.SIGKILL
) -> Ended:
    """Run `work()` in a forked child to its end; after `kill_after` seconds it gets the signal `by`."""
    child = start(work)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, by)  # an ended child is still there to be signalled until it is waited for
    return ended(child)


def fork_and_kill(work: Callable[[], object], seed: int, *, within: float = 0.05) -> Ended:
    """Run `work()` in a forked child that gets SIGKILL after a random time of 0 to `within` seconds."""
    return in_child(work, kill_after=random.Random(seed).uniform(0, within))


@contextlib.contextmanager
def kill_at(point: str, nth: int = 1) -> Iterator[None]:
    """Let a child that runs within (see `in_child`) kill itself at the n-th pass of that write point."""
    with mock.patch.dict(os.environ, {VARIABLE: f"{point}:{nth}"}):
        yield


@contextlib.contextmanager
def short_write(limit: int) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes: the write that would is cut short, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@contextlib.contextmanager
def low_memory(spare: int) -> Iterator[None]:
    """Let this process take at most `spare` more bytes of address space: beyond, allocations fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def fail_nth(name: str, errno: int, nth: int) -> Iterator[Failed]:
    """Let the n-th call of `os.<name>` raise OSError(errno); try n = 1, 2, ... until nothing fails."""
    failed, calls, real = Failed(), itertools.count(1), getattr(os, name)

    def counted(*args: object, **options: object) -> object:
        if next(calls) == nth:
            failed.errors.append(OSError(errno, os.strerror(errno)))
            raise failed.errors[-1]
        return real(*args, **options)

    with mock.patch.object(os, name, counted):
        yield failed


def flip(path: Path, source: random.Random, *, bits: int = 1) -> tuple[int, ...]:
    """Flip that many bits of the file at random, different places; returns the places, counted in bits."""
    content = bytearray(path.read_bytes())
    places = tuple(sorted(source.sample(range(8 * len(content)), bits)))
    for place in places:
        content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    return places


def cut(path: Path, length: int) -> None:
    """Cut the file to its first `length` bytes."""
    path.write_bytes(path.read_bytes()[:length])


@contextlib.contextmanager
def audit_opens() -> Iterator[Opens]:
    """Record what this process opens, connects to, starts and imports within."""
    _install_hook()
    seen = Opens()
    _recorders.append(seen)
    try:
        yield seen
    finally:
        _recorders.remove(seen)


@functools.cache
def _install_hook() -> None:
    """Audit hooks cannot be removed: there is one for the process, which is idle while nobody records."""
    sys.addaudithook(_record)


def _record(event: str, args: tuple[object, ...]) -> None:
    if _recorders and event.startswith(_WATCHED):
        subjects = args[1:] if event in _ON_SOCKET else args  # the address, not the socket
        subject = str(subjects[0]) if subjects else ""
        for seen in _recorders:
            seen.events.append((event, subject))


def _fork() -> int:
    # Ctrl-C waits until the child is where it is caught: it must not unwind into the parent's callers.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    with warnings.catch_warnings():
        # Python 3.12 warns when a process with threads forks; the child runs `work` alone, then os._exit.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return child


def _code_of(work: Callable[[], object]) -> int:
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        work()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else EXIT_RAISED
    except BaseException:  # the border of the child: whatever the work raised ends here
        traceback.print_exc()
        return EXIT_RAISED
    return 0
