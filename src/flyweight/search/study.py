"""The study remembers finished work in one SQLite file: a resumed run replays it and repeats nothing.

The file's format is told in `_journal.py`. Every answer comes from rows whose digests were verified when they
were read, also right after they were written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flyweight import _faults
from flyweight.errors import DataError, MachineError, UsageError
from flyweight.records import JSON, Plan, Trial, canonical
from flyweight.search import _journal, _lock


class Study(contextlib.AbstractContextManager["Study"]):
    """The memory of one run. Made by `Study.open` (to write; a context manager) or `Study.read` (to look)."""

    def __init__(self, path: Path, database: sqlite3.Connection, lock: int | None) -> None:
        self._path, self._database, self._lock = path, database, lock
        self._rows: dict[tuple[str, str], _journal.Row] = {}  # by kind and key, in the order of their numbers

    @staticmethod
    def open(path: Path, identity: Mapping[str, JSON], *, resume: bool) -> Study:
        """The study at `path`, for this process to write; a new one when there is none.

        Raises UsageError when there is one and not `resume`, when it has another identity, or when another
        process writes it; ArtifactError when it is foreign, newer or damaged; MachineError when the disk
        refuses.
        """
        own = _encode(dict(identity), "the identity")
        with contextlib.ExitStack() as undo:
            with _journal.told(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path = path.parent.resolve() / path.name
                lock = _lock.acquire(path)
            undo.callback(_lock.release, path, lock)
            study = _opened(path, own, resume, lock)
            undo.pop_all()
        return study

    @staticmethod
    def read(path: Path) -> Study:
        """The study at `path`, to look at; it may be in use. Raises MachineError when there is none."""
        if not os.path.lexists(path):
            raise MachineError("no such study", where=str(path))
        with contextlib.closing(_journal.connect(path, "ro")) as database:
            study = Study(path, database, None)
            study._catch_up()
        return study

    @property
    def identity(self) -> dict[str, Any]:
        """What the study belongs to, as given when it was made."""
        found = self._decode("identity", "")
        if not isinstance(found, dict):
            raise _journal.damaged(self._path, "row 0 that is no identity")
        return found

    def remember(self, kind: str, key: str, compute: Callable[[], JSON]) -> Any:
        """The value stored under (kind, key), or else compute()'s, which is on the disk when this returns.

        compute() may itself remember things. The value comes back as JSON gives it, so that a first run sees
        what a resumed one will. Raises DataError when compute() gives NaN or Inf, MachineError when the disk
        refuses, UsageError when there is something to store and the study is for looking only.
        """
        if (kind, key) not in self._rows:
            self._store(kind, key, compute)
        return self._decode(kind, key)

    def trial(self, name: str, runtime: str, plan: Plan, run: Callable[[int], Trial]) -> Trial:
        """The trial of this plan on this runtime, or else run(number)'s, where number counts trials from 0.

        A trial that was running when its process died is run again under the same number. Raises as
        `remember`, and ValueError when run(number) returns a trial of another number, runtime or plan.
        """

        def compute() -> JSON:
            number = len(self._keys("trial"))
            done = run(number)
            if (done.number, done.runtime, done.plan) != (number, runtime, plan):
                raise ValueError(f"run({number}) of {name!r} returned trial {done.number}, {done.name!r}")
            return done.to_json()

        return self._trial(self.remember("trial", f"{runtime} {plan.digest()}", compute))

    def trials(self) -> tuple[Trial, ...]:
        """All finished trials, in order."""
        return tuple(self._trial(self._decode("trial", key)) for key in self._keys("trial"))

    def close(self) -> None:
        """Free the study for others; a second call does nothing."""
        if self._lock is None:
            return
        # Every row is safe already; folding the WAL into the file may fail for a reader or a full disk.
        with contextlib.suppress(sqlite3.Error):
            self._database.execute("PRAGMA journal_mode=DELETE")
        _faults.point("study-closing")
        self._database.close()
        lock, self._lock = self._lock, None
        _lock.release(self._path, lock)

    def __exit__(self, *error: object) -> None:
        self.close()

    def _keys(self, kind: str) -> list[str]:
        return [key for its, key in self._rows if its == kind]

    def _decode(self, kind: str, key: str) -> Any:
        try:
            return json.loads(self._rows[kind, key].value)
        except (ValueError, RecursionError) as error:
            raise _journal.damaged(self._path, f"{kind} {key!r} that is no JSON") from error

    def _trial(self, value: Any) -> Trial:
        try:
            return Trial.from_json(value)
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise _journal.damaged(self._path, "a row that is no trial") from error

    def _store(self, kind: str, key: str, compute: Callable[[], JSON]) -> None:
        if self._lock is None:
            raise UsageError("a study that was opened for looking only stores nothing", where=str(self._path))
        self._catch_up()  # an interrupt may have come between a commit and our taking note of it
        if (kind, key) in self._rows:
            return
        value = _encode(compute(), f"{kind} {key}")
        number = len(self._rows)
        with _journal.told(self._path), self._database:
            self._database.execute("BEGIN IMMEDIATE")
            _journal.append(self._database, number, _journal.after(self._last(), number, kind, key, value))
        _faults.point("study-committed")
        self._catch_up()

    def _last(self) -> str:
        return next(reversed(self._rows.values())).digest if self._rows else ""

    def _catch_up(self) -> None:
        """Take in the rows beyond those known; all that is ever answered passes here."""
        with _journal.told(self._path), self._database:
            self._database.execute("BEGIN")  # rows and head of one moment
            for row in _journal.rows_from(self._database, len(self._rows), self._last(), self._path):
                if (row.kind, row.key) in self._rows:
                    raise _journal.damaged(self._path, f"{row.kind} {row.key!r} twice")
                self._rows[row.kind, row.key] = row
            _journal.check_head(self._database, len(self._rows), self._last(), self._path)
        if ("identity", "") not in self._rows:
            raise _journal.damaged(self._path, "no identity")


def _opened(path: Path, own: bytes, resume: bool, lock: int) -> Study:
    if not os.path.lexists(path):
        _journal.create(path, own)
    elif not resume:
        way_out = "go on with --resume or replace it with --force"
        raise UsageError(f"{path} already holds a study", way_out=way_out)
    with contextlib.ExitStack() as undo:
        database = _journal.connect(path, "rw")
        undo.callback(database.close)
        study = Study(path, database, lock)
        study._catch_up()
        _check_identity(path, study.identity, own)
        with _journal.told(path):
            database.execute("PRAGMA journal_mode=WAL")
        undo.pop_all()
    return study


def _check_identity(path: Path, found: JSON, own: bytes) -> None:
    old, new = _leaves(found, ""), _leaves(json.loads(own), "")
    changes = [
        f"{place} {new.get(place, 'not given')} where it was {old.get(place, 'not given')}"
        for place in sorted({*old, *new})
        if old.get(place) != new.get(place)
    ]
    if changes:
        rule = "a study goes on with the model, examples and goal it began with"
        way_out = "use those, or start anew with --force or in another output folder"
        raise UsageError(rule, got="; ".join(changes), where=str(path), way_out=way_out)


def _leaves(value: JSON, place: str) -> dict[str, str]:
    """Every leaf as text, by its place such as "goal.max_drop"; a long text is shortened, with a digest."""
    if isinstance(value, dict) and value:
        parts = [_leaves(part, f"{place}.{key}" if place else key) for key, part in value.items()]
        return {at: text for part in parts for at, text in part.items()}
    text = canonical(value).decode()
    short = text if len(text) <= 80 else f"{text[:40]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
    return {place: short}


def _encode(value: JSON, what: str) -> bytes:
    try:
        return canonical(value)
    except ValueError as error:
        raise DataError("a study stores numbers, not NaN or Inf", got=str(error), where=what) from error
