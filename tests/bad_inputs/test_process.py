"""What only a process of its own shows: signals, closed and narrow outputs, and that finished work is not repeated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from bad_inputs.tasks import CALLS

from flyweight.search.study import Study

TASKS = Path(__file__).with_name("tasks.py")
PATIENCE = 120.0
ARGV = (
    "optimize",
    f"{TASKS}:slow",
    "--runtime",
    "onnxruntime",
    "--minimize",
    "size",
    "--max-drop",
    "50%",
    "--within",
    "5m",
)


def start(*argv: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """The command line in a process of its own, with warnings shown as a user has them."""
    command = [sys.executable, "-m", "flyweight.cli", *argv]
    source = str(Path(__file__).parents[2] / "src")
    path = os.pathsep.join(part for part in (source, os.environ.get("PYTHONPATH", "")) if part)
    given = {**os.environ, "PYTHONPATH": path, **(env or {})}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given)


def calls(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def interrupted(
    folder: Path, after: int, number: signal.Signals, *more: str
) -> subprocess.CompletedProcess[str]:
    """A run that gets a signal in the middle of the call of its score that follows `after` others."""
    noted = folder / "calls"
    process = start(*ARGV, "-o", str(folder / "out"), *more, env={CALLS: str(noted)})
    end = time.monotonic() + PATIENCE
    while calls(noted) <= after and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.heavy
def test_a_run_survives_ctrl_c_a_termination_and_a_kill(
    tmp_path: Path, figure: Callable[[int, str], None]
) -> None:
    """Each signal comes in the middle of a score; what was finished is never scored again."""
    first = interrupted(tmp_path, 1, signal.SIGINT)
    assert first.returncode == 130, first.stderr
    second = interrupted(tmp_path, 2, signal.SIGTERM, "--resume")
    assert second.returncode == 143, second.stderr
    third = interrupted(tmp_path, 4, signal.SIGKILL, "--resume")
    assert third.returncode == -signal.SIGKILL, third.stderr
    for ended in (first, second):
        assert "Traceback" not in ended.stderr
        assert "go on with --resume" in ended.stderr.splitlines()[-1]
    last = start(*ARGV, "-o", str(tmp_path / "out"), "--resume", env={CALLS: str(tmp_path / "calls")})
    _, err = last.communicate(timeout=PATIENCE)
    assert last.returncode == 0, err
    scored = sum(trial.measured is not None for trial in Study.read(tmp_path / "out" / "study.db").trials())
    assert scored >= 2
    assert (
        calls(tmp_path / "calls") == 1 + scored + 3
    )  # the original, each trial, and the call that each signal cut off
    figure(
        8,
        "runs that went on after Ctrl-C, SIGTERM and SIGKILL in the middle of a score: 3 of 3; repeated scores 0",
    )


def test_a_reader_that_goes_away_ends_the_command_quietly(tmp_path: Path) -> None:
    processes = [start("--help"), start("verify", str(_artifact(tmp_path)))]
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()
    for process in processes:
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(PATIENCE) == 0
        process.stderr.close()


def test_a_terminal_without_unicode_gets_plain_text() -> None:
    env = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    process = start("profile", f"{TASKS}:non_ascii", "--runtime", "torch", env=env)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert out.isascii()
    assert "Pr?fung ?: " in out
    assert "gr??e" in out
    assert "Traceback" not in err


def test_a_closed_output_is_no_defect(tmp_path: Path) -> None:
    command = f'"{sys.executable}" -m flyweight.cli verify "{_artifact(tmp_path)}" >&- 2>&-'
    source = str(Path(__file__).parents[2] / "src")
    assert (
        subprocess.run(
            ["sh", "-c", command], env={**os.environ, "PYTHONPATH": source}, check=False
        ).returncode
        == 0
    )


def _artifact(folder: Path) -> Path:
    from artifact import samples

    return samples.build(folder / "best")
