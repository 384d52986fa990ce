"""A streamed model survives what ends a run: kill -9 at every write, and at any other moment."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from streaming.folders import SMALL, files, small, text_in

from flyweight.streaming import stream
from flyweight.testing.faults import Ended, fork_and_kill, in_child, kill_at

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
KILLED, FINISHED = Ended(None, signal.SIGKILL), Ended(0, None)
Figure = Callable[[int, str], None]
BLOCKS = 2


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed run makes of the model beside it."""
    small(tmp_path / "model")
    text_in(tmp_path)
    work(tmp_path, "whole")
    return files(tmp_path / "whole")


def work(folder: Path, name: str) -> None:
    stream(folder / "model", folder / "text.txt", folder / name, SMALL, resume=True)


def killed_at(folder: Path, point: str, nth: int) -> Ended:
    """A run that is killed at the n-th pass of a write point, unless it ends before."""
    with kill_at(point, nth):
        return in_child(lambda: work(folder, "out"))


@pytest.mark.parametrize(
    ("point", "nth"),
    # writes: 1 journal; 2 shard, 3 states, 4 journal of the first block; 5 shard, 6 journal of the last
    [("stream:renamed", 2), ("stream:renamed", 3), ("stream:written", 4), ("stream:renamed", 6)],
)
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, whole: dict[str, bytes], point: str, nth: int
) -> None:
    assert killed_at(tmp_path, point, nth) == KILLED
    assert "config.json" not in files(tmp_path / "out")
    work(tmp_path, "out")
    assert files(tmp_path / "out") == whole


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_a_kill_at_every_write_and_at_any_moment(
    tmp_path: Path, whole: dict[str, bytes], figure: Figure
) -> None:
    kills = 0
    for point in ("stream:written", "stream:renamed"):
        nth = 1
        while (how := killed_at(tmp_path, point, nth)) == KILLED:
            work(tmp_path, "out")
            assert files(tmp_path / "out") == whole, f"{point}:{nth}"
            shutil.rmtree(tmp_path / "out")
            kills, nth = kills + 1, nth + 1
        assert how == FINISHED
        shutil.rmtree(tmp_path / "out")
    assert kills >= 2 * (3 * BLOCKS + 5)
    random = 0
    for seed in range(10):
        random += fork_and_kill(lambda: work(tmp_path, "out"), seed, within=2.0) == KILLED
    work(tmp_path, "out")
    assert files(tmp_path / "out") == whole
    figure(
        1,
        f"{kills} kills of a streamed model, at every write, and {random} at random: the same bytes after all",
    )
