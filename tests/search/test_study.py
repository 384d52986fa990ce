"""The study remembers finished work, replays it exactly and refuses to go on with something else."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flyweight import _faults
from flyweight.errors import DataError, MachineError, UsageError
from flyweight.records import Interval, Measured, Plan, Step, Trial
from flyweight.search import _journal
from flyweight.search.study import Study

IDENTITY = {"model": "ab12", "examples": "cd34", "goal": {"max_drop": 0.01, "minimize": "size"}, "seed": 0}
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text(), parts, max_size=4),
    max_leaves=12,
)


def plan_of(number: int) -> Plan:
    return Plan((Step("weight_only", f"layer.{number}", {"bits": 8}),))


def measured(plan: Plan) -> Measured:
    return Measured(
        name="int8", runtime="torch", plan=plan, score=0.1 + 0.2, score_interval=Interval(0.2, 0.4),
        drop=1e-300, drop_interval=None, latency_ms=1.5, latency_interval=Interval(1.4, 1.6), speedup=2.0,
        speedup_interval=Interval(1.9, 2.1), bytes=1000, peak_memory_bytes=None, verdict="met",
    )  # fmt: skip


def trial_of(number: int, plan: Plan) -> Trial:
    return Trial(
        number=number, name=f"candidate {number}", runtime="torch", plan=plan, state="measured", reason="",
        measured=measured(plan), seconds=0.25,
    )  # fmt: skip


def run_of(plan: Plan) -> Callable[[int], Trial]:
    return lambda number: trial_of(number, plan)


def never() -> str:
    raise AssertionError("what was finished must not run again")


def never_a_trial(number: int) -> Trial:
    raise AssertionError(f"trial {number} must not run again")


@contextlib.contextmanager
def interrupt_at(point: str) -> Iterator[None]:
    def passed(name: str) -> None:
        if name == point:
            raise KeyboardInterrupt

    with mock.patch.object(_faults, "point", side_effect=passed):
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.db"


def test_remembers_within_a_run(path: Path) -> None:
    with Study.open(path, IDENTITY, resume=False) as study:
        assert study.remember("score", "baseline", lambda: {"score": 0.5}) == {"score": 0.5}
        assert study.remember("score", "baseline", never) == {"score": 0.5}
        assert study.remember("latency", "baseline", lambda: 3) == 3


def test_remembers_across_runs(path: Path) -> None:
    with Study.open(path, IDENTITY, resume=False) as study:
        first = [study.trial("x", "torch", plan_of(n), run_of(plan_of(n))) for n in range(3)]
        study.remember("score", "baseline", lambda: 0.1 + 0.2)
    with Study.open(path, IDENTITY, resume=True) as study:
        again = [study.trial("x", "torch", plan_of(n), never_a_trial) for n in range(3)]
        assert again == first == [trial_of(n, plan_of(n)) for n in range(3)]
        assert study.remember("score", "baseline", never) == 0.1 + 0.2
        assert study.trials() == tuple(first)


def test_numbers_are_consecutive_and_an_unfinished_trial_runs_again(path: Path) -> None:
    def fails(number: int) -> Trial:
        raise RuntimeError(f"trial {number} breaks off")

    with Study.open(path, IDENTITY, resume=False) as study:
        study.trial("x", "torch", plan_of(0), run_of(plan_of(0)))
        study.remember("note", "between", lambda: "not a trial")
        with pytest.raises(RuntimeError, match="trial 1 breaks off"):
            study.trial("x", "torch", plan_of(1), fails)
        assert study.trial("x", "torch", plan_of(1), run_of(plan_of(1))).number == 1
        assert [trial.number for trial in study.trials()] == [0, 1]


def test_the_same_plan_on_another_runtime_is_another_trial(path: Path) -> None:
    with Study.open(path, IDENTITY, resume=False) as study:
        study.trial("x", "torch", plan_of(0), run_of(plan_of(0)))
        other = Trial(
            number=1, name="x", runtime="openvino", plan=plan_of(0), state="failed", reason="no",
            measured=None, seconds=0.0,
        )  # fmt: skip
        assert study.trial("x", "openvino", plan_of(0), lambda _: other) == other


def test_a_run_that_returns_another_trial_is_refused(path: Path) -> None:
    with Study.open(path, IDENTITY, resume=False) as study:
        with pytest.raises(ValueError, match=r"run\(0\) of 'x' returned trial 7"):
            study.trial("x", "torch", plan_of(0), lambda _: trial_of(7, plan_of(0)))
        with pytest.raises(ValueError, match="returned trial 0"):
            study.trial("x", "torch", plan_of(0), lambda _: trial_of(0, plan_of(1)))
        assert study.trials() == ()


def test_work_may_remember_parts_of_itself(path: Path) -> None:
    with Study.open(path, IDENTITY, resume=False) as study:
        whole = study.remember("whole", "a", lambda: [study.remember("part", "b", lambda: 1), 2])
        assert whole == [1, 2]
    with Study.open(path, IDENTITY, resume=True) as study:
        assert study.remember("part", "b", never) == 1
        assert study.remember("whole", "a", never) == [1, 2]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=JSON_VALUES, key=st.text(st.characters(codec="utf-8")))
def test_a_value_comes_back_alike_at_once_and_later(tmp_path: Path, value: object, key: str) -> None:
    path = tmp_path / f"{len(os.listdir(tmp_path))}.db"
    with Study.open(path, IDENTITY, resume=False) as study:
        at_once = study.remember("any", key, lambda: value)  # type: ignore[arg-type,return-value]
    assert at_once == value
    assert repr(Study.read(path).remember("any", key, never)) == repr(at_once)


@pytest.mark.parametrize("bad", [math.nan, math.inf, [1, {"deep": -math.inf}]])
def test_what_is_not_finite_is_refused_and_not_stored(path: Path, bad: float) -> None:
    with Study.open(path, IDENTITY, resume=False) as study:
        with pytest.raises(DataError, match="not NaN or Inf") as caught:
            study.remember("score", "baseline", lambda: bad)
        assert caught.value.where == "score baseline"
        assert study.remember("score", "baseline", lambda: 1) == 1


def test_an_existing_study_needs_resume(path: Path) -> None:
    Study.open(path, IDENTITY, resume=False).close()
    before = path.read_bytes()
    with pytest.raises(UsageError, match="already holds a study; go on with --resume or"):
        Study.open(path, IDENTITY, resume=False)
    assert path.read_bytes() == before


def test_resume_without_a_study_begins_one(tmp_path: Path) -> None:
    with Study.open(tmp_path / "new" / "folder" / "study.db", IDENTITY, resume=True) as study:
        assert study.trials() == ()
        assert study.identity == IDENTITY


def test_another_identity_is_refused_key_by_key(path: Path) -> None:
    Study.open(path, IDENTITY, resume=False).close()
    other = {"model": "ab12", "goal": {"max_drop": 0.02, "minimize": "size"}, "seed": 1, "extra": "x" * 100}
    with pytest.raises(UsageError) as caught:
        Study.open(path, other, resume=True)
    told = str(caught.value)
    assert "goal.max_drop 0.02 where it was 0.01" in told
    assert "seed 1 where it was 0" in told
    assert 'examples not given where it was "cd34"' in told
    assert "extra " in told
    assert "xxx... (" in told
    assert "x" * 100 not in told
    assert "minimize" not in told
    assert "model " not in told.replace("the model,", "")
    with Study.open(path, IDENTITY, resume=True) as study:  # the refusal changed nothing
        assert study.identity == IDENTITY


def test_identities_that_differ_far_inside_a_long_text_are_told_apart(path: Path) -> None:
    Study.open(path, {"model": "a" * 200}, resume=False).close()
    with pytest.raises(UsageError, match="model"):
        Study.open(path, {"model": "a" * 199 + "b"}, resume=True)


def test_tuples_and_key_order_are_no_difference(path: Path) -> None:
    Study.open(path, {"a": 1, "b": [1, 2]}, resume=False).close()
    Study.open(path, {"b": (1, 2), "a": 1}, resume=True).close()  # type: ignore[dict-item]


def test_reading_needs_no_lock_and_stores_nothing(path: Path) -> None:
    with Study.open(path, IDENTITY, resume=False) as study:
        study.trial("x", "torch", plan_of(0), run_of(plan_of(0)))
        seen = Study.read(path)
        study.trial("x", "torch", plan_of(1), run_of(plan_of(1)))
        assert [len(seen.trials()), len(Study.read(path).trials())] == [1, 2]
        assert seen.identity == IDENTITY
        with pytest.raises(UsageError, match="for looking only"):
            seen.remember("score", "new", lambda: 1)
        seen.close()
        assert study.remember("score", "new", lambda: 1) == 1


def test_reading_leaves_a_closed_study_as_it_is(path: Path) -> None:
    Study.open(path, IDENTITY, resume=False).close()
    before = path.read_bytes()
    assert Study.read(path).identity == IDENTITY
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["study.db"]


def test_reading_what_is_not_there(path: Path) -> None:
    with pytest.raises(MachineError, match=r"no such study \(at .*study\.db\)"):
        Study.read(path)
    assert os.listdir(path.parent) == []


def test_a_closed_study_is_one_file(path: Path) -> None:
    with Study.open(path, IDENTITY, resume=False) as study:
        study.remember("a", "b", lambda: 1)
    assert os.listdir(path.parent) == ["study.db"]
    study.close()


def test_closing_while_somebody_reads_keeps_everything(path: Path) -> None:
    with Study.open(path, IDENTITY, resume=False) as study:
        study.remember("a", "b", lambda: 1)
        reader = _journal.connect(path, "ro")
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM head").fetchall()
        study._database.execute("PRAGMA busy_timeout=0")
    assert Study.read(path).remember("a", "b", never) == 1
    reader.close()
    with Study.open(path, IDENTITY, resume=True) as study:
        assert study.remember("a", "b", never) == 1


def test_a_second_opening_in_one_process_is_refused(path: Path) -> None:
    with Study.open(path, IDENTITY, resume=False) as study:
        with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
            Study.open(path, IDENTITY, resume=True)
        assert study.remember("a", "b", lambda: 1) == 1
    Study.open(path, IDENTITY, resume=True).close()


def test_a_name_with_odd_characters(tmp_path: Path) -> None:
    path = tmp_path / "100 % of? it#1.db"
    with Study.open(path, IDENTITY, resume=False) as study:
        study.remember("a", "b", lambda: 1)
    assert Study.read(path).remember("a", "b", never) == 1
    assert os.listdir(tmp_path) == [path.name]


def test_a_wal_left_by_a_removed_study_is_not_taken_for_the_new_ones(path: Path) -> None:
    with Study.open(path, IDENTITY, resume=False) as study:
        study.remember("a", "b", lambda: "old")
        wal = path.with_name("study.db-wal").read_bytes()
    path.unlink()
    path.with_name("study.db-wal").write_bytes(wal)
    with Study.open(path, IDENTITY, resume=False) as study:
        assert study.remember("a", "b", lambda: "new") == "new"


def test_an_interrupt_right_after_a_commit_repeats_nothing(path: Path) -> None:
    with Study.open(path, IDENTITY, resume=False) as study:
        with interrupt_at("study-committed"), pytest.raises(KeyboardInterrupt):
            study.remember("a", "b", lambda: 1)
        assert study.remember("a", "b", never) == 1
        assert study.remember("a", "c", lambda: 2) == 2


def test_an_interrupt_before_the_commit_stores_nothing(path: Path) -> None:
    with Study.open(path, IDENTITY, resume=False) as study:
        with interrupt_at("study-head"), pytest.raises(KeyboardInterrupt):
            study.remember("a", "b", lambda: 1)
        assert study.remember("a", "b", lambda: 2) == 2


def fill(path: Path) -> None:
    with Study.open(path, {"seed": 0, "goal": {"b": 1, "a": 2}}, resume=False) as study:
        for number in range(9):
            study.remember("k", str(number), lambda number=number: dict.fromkeys({"x", "y", "z"}, number))


@pytest.mark.heavy
def test_the_file_is_the_same_in_another_process_and_hash_seed(tmp_path: Path) -> None:
    here, there = tmp_path / "1.db", tmp_path / "2.db"
    fill(here)
    script = f"""
from __future__ import annotations
import sys
from pathlib import Path
from flyweight.search.study import Study
{inspect.getsource(fill)}
fill(Path(sys.argv[1]))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    subprocess.run([sys.executable, "-c", script, str(there)], check=True, env=environment)
    assert here.read_bytes() == there.read_bytes()
