"""Whole or not at all: kills at every write point and at random, failing calls, full disks, several writers.

FLYWEIGHT_KILLS sets how many random kills are tried for each writer.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from artifact import samples

import flyweight.artifact
from flyweight.artifact import atomic
from flyweight.artifact.format import read, write
from flyweight.errors import MachineError
from flyweight.testing import faults

KILLS = int(os.environ.get("FLYWEIGHT_KILLS", "25"))
POINTS = sorted(
    {
        name
        for file in Path(flyweight.artifact.__file__).parent.glob("*.py")
        for name in re.findall(r'\bpoint\("([^"]+)"\)', file.read_text())
    }
)
FOLDER_POINTS = [name for name in POINTS if not name.startswith("text:")]
TEXT_POINTS = [name for name in POINTS if name.startswith("text:")]
CALLS = ("open", "write", "fsync", "mkdir", "rename", "lstat", "scandir")


class Bench:
    """An artifact at `folder`, the sources of two, and their digests: the old one, and the new one, compressed."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "out" / "best"
        self.folder.parent.mkdir()
        self.sources = [
            samples.source(tmp_path / f"source-{seed}", seed, packed=seed == 1) for seed in (0, 1)
        ]
        self.digests = [self.put(seed) for seed in (1, 0)][::-1]

    def put(self, seed: int) -> str:
        write(self.folder, self.sources[seed], samples.MANIFEST)
        return read(self.folder).digest

    def beside(self) -> list[str]:
        return sorted(path.name for path in self.folder.parent.iterdir() if path != self.folder)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a folder, whatever this system can."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda one, two: False)
    return str(request.param)


def test_the_write_points_are_known() -> None:
    assert FOLDER_POINTS == [
        "artifact:manifest",
        "artifact:onnx",
        "artifact:weights",
        "folder:aside",
        "folder:filled",
        "folder:made",
        "folder:placed",
    ]
    assert TEXT_POINTS == ["text:renamed", "text:written"]


@pytest.mark.parametrize("name", FOLDER_POINTS)
def test_a_kill_at_a_write_point_leaves_an_artifact_whole(
    bench: Bench, way: str, name: str, figure: Callable[[int, str], None]
) -> None:
    if name == "folder:aside" and way == "exchange":
        return  # only the two renames pass it
    for _ in range(3):
        bench.put(0)
        with faults.kill_at(name):
            assert faults.in_child(lambda: bench.put(1)).signal == 9
        expected = bench.digests[1] if name == "folder:placed" else bench.digests[0]
        assert read(bench.folder).digest == expected
        assert bench.put(1) == bench.digests[1]
        assert bench.beside() == []
    figure(5, f"kills at {name} ({way}), half artifacts: 0 of 3")


def test_a_kill_at_a_write_point_of_a_first_write_leaves_none_or_a_whole_one(tmp_path: Path) -> None:
    source, folder = samples.source(tmp_path / "source"), tmp_path / "best"
    for name in FOLDER_POINTS:
        if name == "folder:aside":
            continue
        with faults.kill_at(name):
            assert faults.in_child(lambda: write(folder, source, samples.MANIFEST)).signal == 9
        assert folder.exists() == (name == "folder:placed")
    assert read(folder).manifest == samples.MANIFEST


def test_random_kills_leave_an_artifact_whole(
    bench: Bench, way: str, figure: Callable[[int, str], None]
) -> None:
    def rewrite() -> None:
        while True:
            bench.put(1)
            bench.put(0)

    for seed in range(KILLS):
        assert faults.fork_and_kill(rewrite, seed).signal == 9
        assert read(bench.folder).digest in bench.digests
    assert bench.put(0) == bench.digests[0]
    assert bench.beside() == []
    figure(5, f"random kills while an artifact is replaced ({way}), half artifacts: 0 of {KILLS}")


@pytest.mark.parametrize("name", TEXT_POINTS)
def test_a_kill_at_a_write_point_leaves_a_text_whole(tmp_path: Path, name: str) -> None:
    file = tmp_path / "result.json"
    atomic.atomic_write_text(file, "old")
    with faults.kill_at(name):
        assert faults.in_child(lambda: atomic.atomic_write_text(file, "new")).signal == 9
    assert file.read_text() == ("new" if name == "text:renamed" else "old")
    atomic.atomic_write_text(file, "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_random_kills_leave_a_text_whole(tmp_path: Path, figure: Callable[[int, str], None]) -> None:
    file, texts = tmp_path / "result.json", [letter * 300_000 for letter in "ab"]
    atomic.atomic_write_text(file, texts[0])

    def rewrite() -> None:
        while True:
            for text in texts:
                atomic.atomic_write_text(file, text)

    for seed in range(KILLS):
        assert faults.fork_and_kill(rewrite, seed).signal == 9
        assert file.read_text() in texts
    figure(5, f"random kills while a text is replaced, half texts: 0 of {KILLS}")


@pytest.mark.parametrize("call", CALLS)
def test_a_failing_call_leaves_the_old_artifact_or_the_new_one(
    bench: Bench, way: str, call: str, figure: Callable[[int, str], None]
) -> None:
    nth = 0
    while True:
        nth += 1
        bench.put(0)
        with faults.fail_nth(call, errno.ENOSPC, nth) as failed:
            try:
                write(bench.folder, bench.sources[1], samples.MANIFEST)
            except MachineError as error:
                assert error.exit_code == 6
                assert "No space left" in error.got
                assert "make room" in error.way_out
        assert bench.folder.is_dir()  # not only after a read has put it back
        assert read(bench.folder).digest in bench.digests
        if not failed.errors:
            break
        assert bench.put(1) == bench.digests[1]
        assert bench.beside() == []
    assert nth > 1 or (call, way) == ("rename", "exchange")
    figure(6, f"os.{call} failing at each of its calls ({way}), clean outcomes: {nth - 1} of {nth - 1}")


def test_a_failing_call_leaves_the_old_text_or_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    for call in ("open", "write", "fsync", "rename"):
        for nth in range(1, 10):
            atomic.atomic_write_text(file, "old")
            with faults.fail_nth(call, errno.EIO, nth) as failed:
                if nth == 1:
                    with pytest.raises(MachineError, match="Input/output error"):
                        atomic.atomic_write_text(file, "new")
                else:
                    _tried(file)
            assert file.read_text() in ("old", "new")
            assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
            if not failed.errors:
                break


def _tried(file: Path) -> None:
    try:
        atomic.atomic_write_text(file, "new")
    except MachineError as error:
        assert "Input/output error" in error.got


def test_a_full_disk_leaves_the_old_artifact(bench: Bench, figure: Callable[[int, str], None]) -> None:
    largest = max(file.stat().st_size for file in bench.folder.iterdir())
    for limit in range(0, largest, 11):
        with faults.short_write(limit), pytest.raises(MachineError, match="File too large") as caught:
            write(bench.folder, bench.sources[1], samples.MANIFEST)
        assert str(bench.folder) in caught.value.where
        assert read(bench.folder).digest == bench.digests[0]
        assert bench.beside() == []
    tried = len(range(0, largest, 11))
    figure(6, f"writes cut short, old artifact intact and no leftovers: {tried} of {tried} lengths")


def test_everything_is_synced_before_it_takes_its_place(bench: Bench, way: str) -> None:
    """Against power cuts: nothing that is not on the disk may be renamed, nothing old removed before that."""
    events: list[tuple[str, str]] = []

    def seen(name: str, real: Callable[..., object], which: Callable[..., str]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            events.append((name, which(*args)))
            return real(*args, **options)

        return call

    def of_handle(handle: int, *_: object) -> str:
        return os.path.relpath(Path(f"/proc/self/fd/{handle}").readlink(), bench.folder.parent)

    def of_path(path: object, *_: object) -> str:
        return os.path.relpath(str(path), bench.folder.parent)

    with (
        mock.patch.object(os, "write", seen("write", os.write, of_handle)),
        mock.patch.object(os, "fsync", seen("sync", os.fsync, of_handle)),
        mock.patch.object(os, "rename", seen("rename", os.rename, of_path)),
        mock.patch.object(atomic, "_exchange", seen("exchange", atomic._exchange, of_path)),
        mock.patch.object(atomic.shutil, "rmtree", seen("remove", atomic.shutil.rmtree, of_path)),
    ):
        write(bench.folder, bench.sources[1], samples.MANIFEST)

    placed = next(at for at, (name, _) in enumerate(events) if name in ("rename", "exchange"))
    for file in bench.folder.iterdir():
        name = f".best.part/{file.name}"
        assert events[:placed].count(("sync", name)) == 1
        assert ("write", name) not in events[events.index(("sync", name)) :]
    assert events[placed - 1] == ("sync", ".best.part")
    settled = events.index(("sync", "."))
    assert settled > placed
    assert [name for name, _ in events[settled + 1 :]] == ["remove", "remove"]
    assert "remove" not in [name for name, _ in events[:settled]]


def test_readers_see_one_artifact_while_others_write(bench: Bench, way: str, tmp_path: Path) -> None:
    def rewrite(number: int) -> None:
        (tmp_path / f"started-{number}").touch()
        for _ in range(25):
            bench.put(1)
            bench.put(0)

    count = 0
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(faults.in_child, partial(rewrite, number)) for number in range(2)]
        while len(list(tmp_path.glob("started-*"))) < 2:
            time.sleep(0.01)  # a child must not inherit a lock that a read here holds
        while not all(writer.done() for writer in writers):
            assert read(bench.folder).digest in bench.digests
            count += 1
    assert [writer.result().code for writer in writers] == [0, 0]
    assert count > 3
    assert bench.beside() == []


def test_a_text_is_utf8_with_lone_surrogates_escaped(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    atomic.atomic_write_text(file, "µ → ü\n\udc80")
    assert file.read_bytes() == "µ → ü\n".encode() + b"\\udc80"


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    old = os.umask(0o022)
    try:
        atomic.atomic_write_text(file, "x")
    finally:
        os.umask(old)
    assert file.stat().st_mode & 0o777 == 0o644


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="No such file") as caught:
        atomic.atomic_write_text(tmp_path / "nowhere" / "result.json", "x")
    assert "nowhere" in caught.value.where
