from __future__ import annotations

import io
import math
import sys

import pytest
from rich.cells import cell_len

from flyweight.report import progress
from flyweight.report.progress import Progress


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Stream(io.StringIO):
    def __init__(self, terminal: bool, encoding: str = "utf-8") -> None:
        super().__init__()
        self.terminal, self.named = terminal, encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.named

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        text.encode(self.named)
        return super().write(text)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def run(stream: Stream, clock: Clock, monkeypatch: pytest.MonkeyPatch, within: float = 1200) -> list[str]:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with Progress(True, within) as shown:
        shown.stage("measuring", total=4)
        for number in range(3):
            shown.step(f"candidate {number}")
            clock.now += 100
            shown.done(f"1.{number}0×, drop 0.3 %", best=number == 1)
        shown.stage("packing")
        shown.step("best")
        shown.done("22.7 MB")
        shown.note("tied weights stay tied")
    return stream.getvalue().splitlines()


def test_plain_lines_without_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(Stream(False), clock, monkeypatch) == [
        "measuring, 4 steps",
        "  [1/4] candidate 0: 1.00×, drop 0.3 % (about 5 min left)",
        "  [2/4] candidate 1: 1.10×, drop 0.3 %, the best so far (about 3 min left)",
        "  [3/4] candidate 2: 1.20×, drop 0.3 % (about 2 min left)",
        "packing",
        "  [1] best: 22.7 MB (at most 15 min left)",
        "  tied weights stay tied",
    ]


def test_the_time_left_never_exceeds_what_is_allowed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    told = run(Stream(False), clock, monkeypatch, within=250)
    assert "(about 2 min left)" in told[1]  # at that pace five more minutes, but only 150 s are allowed
    assert "(about 50 s left)" in told[2]
    assert "(about 0 s left)" in told[3]


def test_without_a_limit_the_time_left_is_told_once_it_is_known(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = run(Stream(False), clock, monkeypatch, within=math.inf)
    assert "(about 5 min left)" in told[1]
    assert not [line for line in told if "inf" in line]


def test_a_terminal_has_one_line_of_the_present(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(True)
    run(stream, clock, monkeypatch)
    text = stream.getvalue()
    assert "\r\x1b[2Kmeasuring [1/4] ####------------, candidate 1, about 5 min left" in text
    present = text.split("\r\x1b[2K")
    assert any(
        part.endswith("candidate 2, about 3 min left, best: 1.10×, drop 0") or "best: 1.10×" in part
        for part in present
    )
    assert all(cell_len(part.splitlines()[-1]) < 80 for part in present if part.strip())
    assert present[-1] == ""  # the line is taken away at the end
    assert "left)" not in text


def test_a_dumb_terminal_gets_plain_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Stream(True))
    monkeypatch.setenv("TERM", "dumb")
    with Progress(True, 10) as shown:
        shown.stage("measuring", total=1)
        shown.done("ok")
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_any_encoding_will_do(
    terminal: bool, encoding: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(terminal, encoding)
    run(stream, clock, monkeypatch)  # Stream.write raises on what it cannot encode
    assert "candidate 2: 1.20" in stream.getvalue()


def test_names_cannot_move_the_cursor(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Stream(False))
    with Progress(True, 10) as shown:
        shown.stage("a\x1b[2J\r\n")
        shown.step("b\x1b]0;x\x07")
        shown.done("c\r\nd")
        shown.note("e\x1b[1A")
    assert not set("\x1b\r\x07") & set(stream.getvalue())
    assert len(stream.getvalue().splitlines()) == 3


def test_silent_when_not_enabled(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(False, 10) as shown:
        shown.stage("measuring", total=1)
        shown.step("x")
        shown.done("y", best=True)
        shown.note("z")
    assert capsys.readouterr() == ("", "")


def test_it_speaks_on_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(True, 10) as shown:
        shown.stage("measuring", total=1)
        shown.done("y")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["measuring, 1 step", "  [1/1] y (stage finished)"]


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "terminal gone"), ValueError("closed file")])
def test_an_output_that_is_gone_does_not_end_the_run(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(False)
    monkeypatch.setattr(stream, "write", lambda text: (_ for _ in ()).throw(error))
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(True, 10) as shown:
        shown.stage("measuring")
        shown.done("y")


def test_an_error_passes_through(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), Progress(True, 10) as shown:
        shown.stage("measuring")
        raise KeyError("user code")
