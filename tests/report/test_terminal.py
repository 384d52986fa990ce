from __future__ import annotations

import dataclasses
import io
import re

import pytest
from report import hostile, samples
from rich.cells import cell_len

from flyweight.records import Result
from flyweight.report import terminal

RESULTS = (samples.met(), samples.infeasible(), samples.without_intervals(), samples.met(60, 300))


def lines(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("colour", [True, False])
def test_it_fits_80_columns_and_the_encoding(result: Result, encoding: str, colour: bool) -> None:
    text = terminal.table(result, "out/minilm", encoding=encoding, colour=colour)
    assert max(cell_len(line) for line in lines(text)) <= 80
    text.encode(encoding)
    assert ("\x1b[" in text) == colour
    assert "?" not in text.replace("? unresolved", "")


def test_the_figures_are_the_result_s() -> None:
    result = samples.met()
    shown = lines(terminal.table(result))
    best = next(i for i, line in enumerate(shown) if line.startswith("best: "))
    m = result.best
    assert m.drop_interval is not None
    assert m.peak_memory_bytes is not None
    assert shown[best] == f"best: {m.name} ({m.runtime}, met)"
    assert (
        shown[best + 1].split()
        == (
            f"{m.score:.4f} {100 * m.drop:.2f} % ({100 * m.drop_interval.low:.2f}..{100 * m.drop_interval.high:.2f}) "
            f"{m.latency_ms:.2f} ms {m.speedup:.2f}× ({m.speedup_interval.low:.2f}..{m.speedup_interval.high:.2f}) "
            f"{m.bytes / 1e6:.1f} MB {m.peak_memory_bytes / 1e6:.0f} MB"
        ).split()
    )


def test_the_verdict_comes_first_and_the_files_last() -> None:
    shown = lines(terminal.table(samples.infeasible(), "out/minilm"))
    assert shown[0].startswith("infeasible: Nothing faster")
    assert any(line.startswith("nearest: ") for line in shown)
    assert shown[-5:][0] == "files in out/minilm"
    assert [line.split()[0] for line in shown[-4:]] == ["best/", "report.html", "result.json", "study.db"]
    assert "files in" not in terminal.table(samples.met())


def test_head_and_figures_stand_under_each_other() -> None:
    shown = lines(terminal.table(samples.met()))
    head = next(line for line in shown if "latency" in line)
    figures = next(line for line in shown if line.lstrip().startswith("0.6512"))
    for title, figure in (
        ("score", "0.6512"),
        ("latency", "12.41 ms"),
        ("speed-up", "1.00×"),
        ("size", "90.9 MB"),
    ):
        assert head.index(title) + len(title) == figures.index(figure) + len(figure)


def test_many_alternatives_are_counted() -> None:
    result = samples.met()
    many = tuple(trial.measured for trial in samples.trials(200) if trial.measured)
    text = terminal.table(dataclasses.replace(result, front=many))
    assert text.count("alternative: ") == terminal.ALTERNATIVES
    assert re.search(r"^\d+ more alternatives in result.json$", text, re.MULTILINE)


def test_many_notes_are_counted() -> None:
    text = terminal.table(dataclasses.replace(samples.met(), notes=tuple(f"note {n}" for n in range(9))))
    assert text.count("note: ") == terminal.NOTES
    assert "4 more notes in report.html" in text


def test_the_path_is_never_broken() -> None:
    path = "/data/" + "x" * 150
    assert f"files in {path}" in lines(terminal.table(samples.met(), path))


@pytest.mark.parametrize(
    "text", [*hostile.STRINGS, "[red]x[/red]", "\x1b[2J\x1b]0;title\x07", "a\r\nb", "中" * 200]
)
def test_hostile_text_neither_moves_the_cursor_nor_breaks_the_width(text: str) -> None:
    shown = terminal.table(samples.with_text(samples.met(9, 6), text), "out")
    assert "\x1b" not in shown
    assert "\r" not in shown
    assert max(cell_len(line) for line in lines(shown)) <= 80
    shown.encode()


class Screen(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen, plain, file = Screen(), Screen(), io.StringIO()
    terminal.show(samples.met(), "out", screen)
    terminal.show(samples.met(), "out", file)
    monkeypatch.setenv("NO_COLOR", "")
    terminal.show(samples.met(), "out", plain)
    assert "\x1b[" in screen.getvalue()
    assert "\x1b" not in plain.getvalue() + file.getvalue()
    assert file.getvalue().isascii()  # a stream that names no encoding gets what every stream can show
