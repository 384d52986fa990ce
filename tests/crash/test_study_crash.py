"""A study survives what ends a run: SIGKILL at any moment, Ctrl-C, a full disk, a rival process.

FLYWEIGHT_KILLS sets the number of random kills (100 unless given; 500 before a release).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flyweight.errors import MachineError, UsageError
from flyweight.records import JSON, Plan, Step, Trial
from flyweight.search.study import Study
from flyweight.testing.faults import (
    EXIT_RAISED,
    Ended,
    ended,
    fail_nth,
    fork_and_kill,
    in_child,
    kill_at,
    short_write,
    start,
)

KILLS = int(os.environ.get("FLYWEIGHT_KILLS", "100"))
KILLED = Ended(None, signal.SIGKILL)
FINISHED = Ended(0, None)
IDENTITY: dict[str, JSON] = {"model": "ab12", "seed": 0}
Figure = Callable[[int, str], None]


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder: in memory where possible, so that the time until a kill is spent in our code."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as made:
        yield Path(made)


def trial_of(number: int, seed: int) -> Trial:
    plan = Plan((Step("weight_only", f"layer.{seed}", {"bits": 8}),))
    return Trial(
        number=number, name=f"candidate {seed}", runtime="torch", plan=plan, state="failed", reason="why not",
        measured=None, seconds=1.5,
    )  # fmt: skip


def note(path: Path, text: str) -> None:
    """Append a line in one system call: it is there even when the process is killed right after."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, text.encode() + b"\n")
    os.close(handle)


def notes(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def add(study: Study, seed: int, started: Path | None = None) -> Trial:
    def run(number: int) -> Trial:
        if started is not None:
            note(started, str(seed))
        return trial_of(number, seed)

    wanted = trial_of(0, seed)
    return study.trial(wanted.name, wanted.runtime, wanted.plan, run)


def work(path: Path, trials: int, acknowledged: Path) -> None:
    """A run: so many trials beyond those that are there, each noted once it is stored."""
    with Study.open(path, IDENTITY, resume=True) as study:
        begin = len(study.trials())
        for seed in range(begin, begin + trials):
            add(study, seed)
            note(acknowledged, str(seed))


def opened(path: Path) -> tuple[Trial, ...]:
    """The trials of a study that must open, and must be true and without a gap."""
    with Study.open(path, IDENTITY, resume=True) as study:
        found = study.trials()
    assert found == tuple(trial_of(number, number) for number in range(len(found)))
    return found


def test_random_kills_lose_no_acknowledged_trial(folder: Path, figure: Figure) -> None:
    resumed, acknowledged, killed = [], 0, 0
    for seed in range(KILLS):
        path, log = folder / f"{seed // 8}.db", folder / f"{seed // 8}.log"
        killed += fork_and_kill(lambda path=path, log=log: work(path, 10_000, log), seed) == KILLED
        began = time.perf_counter()
        found = opened(path)
        resumed.append(time.perf_counter() - began)
        assert [int(line) for line in notes(log)] == list(range(len(notes(log))))
        assert len(notes(log)) <= len(found)
        for number in range(len(notes(log)), len(found)):  # stored, but killed before it could say so
            note(log, str(number))
    acknowledged = sum(len(notes(log)) for log in folder.glob("*.log"))
    assert killed == KILLS
    assert acknowledged > KILLS
    p95 = statistics.quantiles(resumed, n=20)[-1]
    figure(1, f"{KILLS} random kill -9: 0 of {acknowledged} acknowledged trials lost, 0 studies unopenable")
    figure(4, f"after {KILLS} kills the study opens in {p95:.2f} s (p95); trials left running: 0")
    assert p95 <= 2


WRITE_POINTS = [
    # name, which pass (row 0 is the identity), trials that are there afterwards
    ("study-written", 1, 0),
    ("study-row", 5, 3),
    ("study-head", 5, 3),
    ("study-committed", 4, 4),
    ("study-closing", 1, 6),
]


def test_a_kill_at_each_write_point(folder: Path, figure: Figure) -> None:
    times = KILLS // 25
    for (point, nth, kept), again in itertools.product(WRITE_POINTS, range(times)):
        path = folder / f"{point}{again}.db"
        with kill_at(point, nth):
            assert in_child(lambda path=path: work(path, 6, folder / "log")) == KILLED
        assert len(opened(path)) == kept
        work(path, 6, folder / "log")
        assert len(opened(path)) == kept + 6
    assert [name for name in os.listdir(folder) if not name.endswith((".db", "log"))] == []
    figure(1, f"{times} kills at each of a study's {len(WRITE_POINTS)} write points: all went on")


def search(path: Path, seed: int) -> None:
    """A search whose next step depends on all that was found before, as a sampler's does."""
    with Study.open(path, {"seed": seed}, resume=True) as study:
        while len(study.trials()) < 12:
            told = f"{seed} {[trial.reason for trial in study.trials()]}"
            chosen = random.Random(told).randrange(10**9)
            step = Plan((Step("weight_only", f"layer.{chosen}", {}),))
            score = study.remember("score", str(chosen), lambda told=told: random.Random(told + "!").random())
            study.trial(
                "x", "torch", step, lambda number, step=step, score=score: scored(number, step, score)
            )


def scored(number: int, plan: Plan, score: float) -> Trial:
    return Trial(
        number=number, name="x", runtime="torch", plan=plan, state="skipped", reason=repr(score),
        measured=None, seconds=0.0,
    )  # fmt: skip


def test_a_killed_and_resumed_search_equals_one_that_ran_through(folder: Path, figure: Figure) -> None:
    seeds, kills = KILLS // 10, 0
    for seed in range(seeds):
        plain, killed = folder / f"{seed}.plain.db", folder / f"{seed}.killed.db"
        search(plain, seed)
        for attempt in itertools.count():
            within = 0.004 + 0.002 * attempt  # sooner or later one attempt is long enough
            run = functools.partial(search, killed, seed)
            if fork_and_kill(run, attempt, within=within) == FINISHED:
                break
            kills += 1
        assert len(Study.read(killed).trials()) == 12
        assert Study.read(killed)._rows == Study.read(plain)._rows
    assert kills > seeds
    figure(2, f"{seeds} searches killed {kills} times in all and resumed: {seeds} the same in every row")


def test_ctrl_c_at_any_moment_keeps_what_was_finished(folder: Path, figure: Figure) -> None:
    def interruptible(path: Path) -> None:
        try:
            work(path, 10_000, path.with_suffix(".log"))
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    source, codes = random.Random(0), []
    for moment in range(40):
        path = folder / f"{moment}.db"
        after = source.uniform(0.01, 0.05)
        codes.append(in_child(lambda path=path: interruptible(path), kill_after=after, by=signal.SIGINT).code)
        assert len(opened(path)) >= len(notes(path.with_suffix(".log")))
    assert [name for name in os.listdir(folder) if not name.endswith((".db", ".log"))] == []
    assert set(codes) <= {130, EXIT_RAISED}  # the latter where the interrupt came before the run began
    assert codes.count(130) > 20
    figure(8, "40 studies interrupted by Ctrl-C: 40 resumable, 0 finished trials lost")


def test_a_full_disk_is_told_and_loses_nothing(folder: Path, figure: Figure) -> None:
    outcomes = []
    for attempt, limit in enumerate(range(0, 2_000_000, 40_000)):
        path, log = folder / f"{attempt}.db", folder / f"{attempt}.log"
        try:
            with short_write(limit):
                work(path, 60, log)
            outcomes.append("finished")
        except MachineError as error:
            assert error.exit_code == 6
            outcomes.append(str(error).split(" (at")[0])
        assert len(opened(path)) >= len(notes(log))
        assert {name for name in os.listdir(folder) if not name.endswith(".log")} == {f"{attempt}.db"}
        work(path, 2, log)
        path.unlink()
    refused = [told for told in outcomes if told != "finished"]
    assert 10 < len(refused) < 50
    assert all(told.startswith("the machine must let flyweight read and write") for told in refused)
    figure(6, f"study on a disk full at 50 sizes: {len(refused)} clean refusals, 0 trials lost")


def test_a_full_disk_in_the_middle_lets_the_run_go_on_once_there_is_room(folder: Path) -> None:
    with Study.open(folder / "study.db", IDENTITY, resume=False) as study:
        add(study, 0)
        with short_write(4096), pytest.raises(MachineError, match="finished work is kept"):
            add(study, 1)
        assert [trial.number for trial in study.trials()] == [0]
        assert add(study, 1).number == 1
    assert len(opened(folder / "study.db")) == 2


def make(path: Path, call: str, error: int, nth: int) -> bool:
    """Make a study while the n-th call of os.<call> fails; whether there was one."""
    with fail_nth(call, error, nth) as failed, contextlib.suppress(MachineError):
        Study.open(path, IDENTITY, resume=False).close()
    return bool(failed.errors)


def test_a_refused_system_call_is_told_and_leaves_nothing_behind(folder: Path, figure: Figure) -> None:
    refused = 0
    calls = ["fsync", "replace", "open", "pwrite", "truncate", "stat"]
    for call, error in itertools.product(calls, [errno.ENOSPC, errno.EROFS, errno.EIO]):
        for nth in itertools.count(1):
            path = folder / f"{call}{error}.{nth}.db"
            if not make(path, call, error, nth):
                break
            refused += 1
            left = {name for name in os.listdir(folder) if name.startswith(path.name)}
            assert left <= {path.name, f"{path.name}-lock"} if call == "stat" else left <= {path.name}
            assert opened(path) == ()
    assert refused > 30
    figure(6, f"a system call refused while a study is made, {refused} cases: 0 tracebacks, 0 leftovers")


def test_the_refusal_of_a_system_call_gives_its_reason(folder: Path) -> None:
    with fail_nth("fsync", errno.ENOSPC, 1), pytest.raises(MachineError) as told:
        Study.open(folder / "study.db", IDENTITY, resume=False)
    assert told.value.exit_code == 6
    assert told.value.got == os.strerror(errno.ENOSPC)


def test_a_read_only_folder_is_told(folder: Path) -> None:
    with fail_nth("open", errno.EROFS, 1), pytest.raises(MachineError, match="Read-only file system"):
        Study.open(folder / "study.db", IDENTITY, resume=False)


def test_another_process_is_told_who_has_the_study(folder: Path) -> None:
    def rival() -> None:
        with pytest.raises(UsageError, match=f"in use by process {os.getppid()}"):
            Study.open(folder / "study.db", IDENTITY, resume=True)
        assert len(Study.read(folder / "study.db").trials()) == 1

    def newcomer() -> None:
        from flyweight.search import _lock

        _lock._held_here.clear()  # what a process that was not forked from the holder begins with
        rival()

    with Study.open(folder / "study.db", IDENTITY, resume=False) as study:
        add(study, 0)
        assert in_child(newcomer) == FINISHED
        add(study, 1)


def test_the_lock_dies_with_its_process_though_its_children_live_on(folder: Path) -> None:
    path = folder / "study.db"
    reading, writing = os.pipe()

    def holder() -> None:
        with Study.open(path, IDENTITY, resume=True):
            start(lambda: time.sleep(1))
            os.write(writing, b"1")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(holder) == KILLED
    assert os.read(reading, 1) == b"1"
    assert path.with_name("study.db-lock").exists()
    assert opened(path) == ()
    assert not path.with_name("study.db-lock").exists()


def test_reading_while_another_process_writes(folder: Path, figure: Figure) -> None:
    path = folder / "study.db"
    work(path, 1, folder / "log")
    child = start(lambda: work(path, 400, folder / "log"))
    seen = [0]
    while seen[-1] < 401 and len(seen) < 20_000:
        seen.append(len(Study.read(path).trials()))
    assert ended(child) == FINISHED
    assert seen == sorted(seen)
    assert len(set(seen)) > 10
    figure(7, f"{len(seen)} readings of a study while another process writes it: 0 torn")


def contend(path: Path, upto: int, started: Path, acknowledged: Path) -> None:
    """One of several processes on one study: takes it when it is free, does a few trials, lets go."""
    while True:
        try:
            with Study.open(path, IDENTITY, resume=True) as study:
                begin = len(study.trials())
                for seed in range(begin, min(begin + 10, upto)):
                    add(study, seed, started)
                    note(acknowledged, str(seed))
                if begin >= upto:
                    return
        except UsageError as busy:
            if "in use" not in str(busy):
                raise
        time.sleep(0.002)


def test_eight_processes_on_one_study(folder: Path, figure: Figure) -> None:
    path, started, acknowledged = folder / "study.db", folder / "started", folder / "acknowledged"
    upto = 400
    children = [start(lambda: contend(path, upto, started, acknowledged)) for _ in range(8)]
    for seed in range(2):
        assert fork_and_kill(lambda: contend(path, 10**6, started, acknowledged), seed, within=0.2) == KILLED
    assert [ended(child) for child in children] == [FINISHED] * 8
    found = opened(path)
    assert len(found) >= upto
    ran = [int(line) for line in notes(started)]
    twice = len(ran) - len(set(ran))
    assert sorted({int(line) for line in notes(acknowledged)} - {trial.number for trial in found}) == []
    assert len(notes(acknowledged)) == len(set(notes(acknowledged)))
    assert twice <= 2  # only the trials that were running when their process was killed run again
    figure(7, f"8 processes and 2 kills on one study of {len(found)} trials: 0 stored twice, 0 lost")
