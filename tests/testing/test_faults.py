"""Each injector does what it says, and nothing once it is over."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flyweight import _faults
from flyweight.testing.faults import (
    EXIT_RAISED,
    Ended,
    audit_opens,
    cut,
    fail_nth,
    flip,
    fork_and_kill,
    in_child,
    kill_at,
    low_memory,
    short_write,
)

KILLED = Ended(None, signal.SIGKILL)


def raise_error() -> None:
    raise ValueError("the child's own error")


def test_a_child_ends_as_its_work_does(capfd: pytest.CaptureFixture[str]) -> None:
    assert in_child(lambda: None) == Ended(0, None)
    assert in_child(lambda: sys.exit(3)) == Ended(3, None)
    assert in_child(lambda: os.kill(os.getpid(), signal.SIGTERM)) == Ended(None, signal.SIGTERM)
    assert in_child(raise_error) == Ended(EXIT_RAISED, None)
    assert "ValueError: the child's own error" in capfd.readouterr().err


def test_a_child_changes_nothing_here() -> None:
    seen: list[int] = []
    assert in_child(lambda: seen.append(1)) == Ended(0, None)
    assert seen == []


def test_a_child_is_killed_at_a_random_time_that_the_seed_gives() -> None:
    began = time.perf_counter()
    assert fork_and_kill(lambda: time.sleep(60), seed=0, within=0.01) == KILLED
    assert fork_and_kill(lambda: time.sleep(60), seed=1, within=0.01) == KILLED
    assert time.perf_counter() - began < 30
    assert in_child(lambda: time.sleep(60), kill_after=0, by=signal.SIGTERM) == Ended(None, signal.SIGTERM)


def test_a_child_that_has_ended_is_not_said_to_be_killed() -> None:
    assert in_child(lambda: None, kill_after=0.3) == Ended(0, None)


def test_kill_at_kills_at_the_nth_pass_of_the_point(tmp_path: Path) -> None:
    marks = tmp_path / "marks"

    def work() -> None:
        for mark in range(5):
            _faults.point("other")
            _faults.point("here")
            marks.write_text(str(mark))

    with kill_at("here", 3):
        assert in_child(work) == KILLED
    assert marks.read_text() == "1"
    with kill_at("nowhere"):
        assert in_child(work) == Ended(0, None)
    assert in_child(work) == Ended(0, None)
    assert _faults.VARIABLE not in os.environ


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limit=st.integers(0, 9000), size=st.integers(0, 9000))
def test_short_write_stops_at_its_limit(tmp_path: Path, limit: int, size: int) -> None:
    handle = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    with short_write(limit):
        if size and not limit:
            with pytest.raises(OSError, match="File too large"):
                os.write(handle, bytes(size))
        else:
            assert os.write(handle, bytes(size)) == min(size, limit)
    assert os.write(handle, b"x" * 10) == 10  # there is room again
    os.close(handle)


def test_short_write_puts_limit_and_handler_back() -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    with pytest.raises(KeyError), short_write(1):
        raise KeyError
    assert (resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)) == before


def test_low_memory_lets_large_allocations_fail() -> None:
    def work() -> None:
        with low_memory(64 << 20):
            small = bytearray(1 << 20)
            with pytest.raises(MemoryError):
                bytearray(1 << 30)
        assert len(bytearray(256 << 20)) > len(small)

    assert in_child(work) == Ended(0, None)


def test_fail_nth_fails_that_call_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with fail_nth("stat", errno.EIO, 2) as failed:
        os.stat(path)
        assert failed.errors == []
        with pytest.raises(OSError, match="Input/output error") as caught:
            os.stat(path)
        os.stat(path)
    assert failed.errors == [caught.value]
    assert caught.value.errno == errno.EIO
    with fail_nth("stat", errno.EIO, 2) as failed:
        os.stat(path)
    os.stat(path)
    assert failed.errors == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(min_size=1, max_size=50), seed=st.integers(0, 10**6), data=st.data())
def test_flip_changes_just_the_bits_it_names(
    tmp_path: Path, content: bytes, seed: int, data: st.DataObject
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    bits = data.draw(st.integers(1, min(8, 8 * len(content))))
    places = flip(path, random.Random(seed), bits=bits)
    before, after = int.from_bytes(content, "little"), int.from_bytes(path.read_bytes(), "little")
    assert before ^ after == sum(1 << place for place in places)
    assert len(set(places)) == bits
    path.write_bytes(content)
    assert flip(path, random.Random(seed), bits=bits) == places


def test_cut_keeps_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    cut(path, 4)
    assert path.read_bytes() == b"0123"
    cut(path, 0)
    assert path.read_bytes() == b""


def test_audit_sees_files_sockets_and_programs(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with audit_opens() as outer:
        path.write_text("x")
        with audit_opens() as inner, socket.socket() as client:
            client.settimeout(0.1)
            with pytest.raises(OSError, match="refused"):
                client.connect(("127.0.0.1", 1))
            subprocess.run([sys.executable, "--version"], check=True, capture_output=True)
    path.read_text()
    assert outer.of("open").count(str(path)) == 1
    assert inner.of("open").count(str(path)) == 0
    assert "('127.0.0.1', 1)" in inner.of("socket.connect")
    assert "('127.0.0.1', 1)" in outer.of("socket.")
    assert inner.of("subprocess.") == [sys.executable]


def test_audit_stops_when_it_is_left() -> None:
    with audit_opens() as seen:
        pass
    Path(os.devnull).read_bytes()
    assert os.devnull not in seen.of("open")
