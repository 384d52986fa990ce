"""The file of a study, format version 1: a journal with a chain of digests, kept by SQLite.

* A SQLite 3 database with application_id 0x666C7977 ("flyw") and user_version 1, and exactly the two
  tables of SCHEMA. Anything else, a trigger or an index for instance, is refused before a row is read.
* `finished` holds the rows, which are only added. `number` counts from 0 without a gap; (`kind`, `key`)
  is unique.
* `value` is canonical JSON (sorted keys, no spaces, no NaN). Row 0, of kind "identity" and key "", says
  which model, examples and goal the study belongs to. Rows of kind "trial" hold trials, in order.
* `digest` is the SHA-256, in hex, of the previous row's digest (empty for row 0), the canonical JSON of
  [number, kind, key], a line end, and the value: no row can change, move or go missing in between.
* `head` is one row with the number of rows and the last digest, written in the transaction that adds a
  row: no row can go missing at the end. These digests detect accidents; they are no signature.
* While a run writes, the file is in WAL mode with full sync. What a crash tears is the row that was being
  written, and SQLite takes it back. A closed study is one file.
* A file is born whole: written as NAME-new, synced, renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flyweight import _faults
from flyweight.errors import ArtifactError, FlyweightError, MachineError, UsageError
from flyweight.records import canonical

APPLICATION_ID = 0x666C7977
VERSION = 1
SCHEMA = (
    "CREATE TABLE finished (number INTEGER PRIMARY KEY, kind TEXT, key TEXT, value TEXT, digest TEXT)",
    "CREATE TABLE head (one INTEGER PRIMARY KEY, rows INTEGER, digest TEXT)",
)
_BUSY_SECONDS = 10.0
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_MACHINE = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM}
)
_ANEW = "restore it from a copy, or start anew with --force"


@dataclass(frozen=True)
class Row:
    """One finished piece of work; `value` is JSON, `digest` that of the chain up to here, in hex."""

    kind: str
    key: str
    value: bytes
    digest: str


def create(path: Path, identity: bytes) -> None:
    """Write a study with its identity (JSON) and put it at `path` in one step; raises MachineError."""
    with told(path):
        # A WAL that outlived its database, say after a removal by hand, would be replayed into the new one.
        _remove(path, "-new", "-new-journal", "-wal", "-shm", "-journal")
        new = _beside(path, "-new")
        try:
            with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as database:
                _fill(database, identity)
            _sync(new)
            _faults.point("study-written")
            new.replace(path)
            _sync(path.parent)
        except (OSError, sqlite3.Error):
            _remove(path, "-new", "-new-journal")
            raise


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """A checked connection in mode "rw" or "ro", with texts as bytes.

    Raises ArtifactError when the file is not a study, newer or damaged; MachineError when it cannot be read.
    """
    with contextlib.ExitStack() as undo, told(path):
        _look(path)
        address = f"{path.absolute().as_uri()}?mode={mode}"
        database = sqlite3.connect(address, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
        undo.callback(database.close)
        database.text_factory = bytes  # what is damaged need not be text
        for setting in ("trusted_schema=OFF", "cell_size_check=ON", "synchronous=FULL"):
            database.execute(f"PRAGMA {setting}")
        _check(database, path)
        undo.pop_all()
    return database


def append(database: sqlite3.Connection, number: int, row: Row) -> None:
    """Add the row under that number, inside the caller's transaction; raises sqlite3.Error."""
    values = (number, row.kind, row.key, row.value.decode(), row.digest)
    database.execute("INSERT INTO finished VALUES (?, ?, ?, ?, ?)", values)
    _faults.point("study-row")
    database.execute("REPLACE INTO head VALUES (1, ?, ?)", (number + 1, row.digest))
    _faults.point("study-head")


def after(last: str, number: int, kind: str, key: str, value: bytes) -> Row:
    """The row with its digest, where `last` is the digest of the row before."""
    told_so_far = last.encode() + canonical([number, kind, key]) + b"\n" + value
    return Row(kind, key, value, hashlib.sha256(told_so_far).hexdigest())


def rows_from(database: sqlite3.Connection, number: int, last: str, path: Path) -> Iterator[Row]:
    """The rows from that number on, each verified; raises ArtifactError that names the first bad one."""
    question = "SELECT number, kind, key, value, digest FROM finished WHERE number >= ? ORDER BY number"
    for found in database.execute(question, (number,)):
        row = _verified(found, number, last)
        if row is None:
            raise damaged(path, f"row {number} not as it was written")
        yield row
        number, last = number + 1, row.digest


def check_head(database: sqlite3.Connection, rows: int, last: str, path: Path) -> None:
    """Raises ArtifactError unless there are `rows` rows and the last one has that digest."""
    if database.execute("SELECT * FROM head").fetchall() != [(1, rows, last.encode())]:
        raise damaged(path, f"{rows} good rows, which is not the number its head gives")


def damaged(path: Path, got: str) -> ArtifactError:
    """The answer to a study file that is not as it was written."""
    return ArtifactError("a study file must be whole", got=got, where=str(path), way_out=_ANEW)


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn what SQLite and the system raise within into our errors."""
    try:
        yield
    except OSError as error:
        raise _refused(path, error.strerror or str(error)) from error
    except UnicodeDecodeError as error:  # of a message that quotes what is damaged
        raise damaged(path, "texts that are not UTF-8") from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        if code is None:  # wrong use of the library, not the file's fault
            raise
        raise _translated(path, code & 0xFF, str(error)) from error


def _translated(path: Path, code: int, text: str) -> FlyweightError:
    if code in _BUSY:
        return UsageError("the study is in use by another program", where=str(path), way_out="wait for it")
    # A damaged header can also make SQLite call a file read-only.
    if code in _MACHINE or (code == sqlite3.SQLITE_READONLY and not os.access(path, os.W_OK)):
        return _refused(path, text)
    if code == sqlite3.SQLITE_NOTADB:
        return ArtifactError("not a study file", got=text, where=str(path))
    return damaged(path, text)


def _refused(path: Path, text: str) -> MachineError:
    rule = "the machine must let flyweight read and write the study"
    way_out = "make room or give access, then go on with --resume: finished work is kept"
    return MachineError(rule, got=text, where=str(path), way_out=way_out)


def _verified(found: tuple[Any, ...], number: int, last: str) -> Row | None:
    place, *texts = found
    if place != number or not all(isinstance(text, bytes) for text in texts):
        return None
    kind, key, value, digest = texts
    try:
        row = after(last, number, kind.decode(), key.decode(), value)
    except UnicodeDecodeError:
        return None
    return row if row.digest.encode() == digest else None


def _look(path: Path) -> None:
    # Looked at, not opened: closing a second handle would drop the locks that SQLite has on the file.
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise ArtifactError("not a study file", got="something that is no plain file", where=str(path))
    if found.st_size == 0:
        raise ArtifactError("not a study file", got="an empty file", where=str(path), way_out=_ANEW)


def _check(database: sqlite3.Connection, path: Path) -> None:
    def ask(question: str) -> list[tuple[Any, ...]]:
        return database.execute(question).fetchall()

    if ask("PRAGMA application_id") != [(APPLICATION_ID,)]:
        raise ArtifactError("not a study file", got="another program's database", where=str(path))
    version = ask("PRAGMA user_version")[0][0]
    if version != VERSION:
        rule = f"this flyweight reads studies of version {VERSION}"
        way_out = "open it with the flyweight that wrote it"
        raise ArtifactError(rule, got=f"version {version}", where=str(path), way_out=way_out)
    if ask("SELECT sql FROM sqlite_schema ORDER BY rowid") != [(table.encode(),) for table in SCHEMA]:
        raise ArtifactError("not a study file", got="other tables than a study's", where=str(path))
    found = ask("PRAGMA integrity_check(1)")
    if found != [(b"ok",)]:
        raise damaged(path, found[0][0].decode(errors="replace"))


def _fill(database: sqlite3.Connection, identity: bytes) -> None:
    database.execute("PRAGMA synchronous=FULL")
    with database:
        database.execute("BEGIN")
        for table in SCHEMA:
            database.execute(table)
        database.execute(f"PRAGMA application_id={APPLICATION_ID}")
        database.execute(f"PRAGMA user_version={VERSION}")
        append(database, 0, after("", 0, "identity", "", identity))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path, *endings: str) -> None:
    for ending in endings:
        _beside(path, ending).unlink(missing_ok=True)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)
