"""The result in 80 columns, for a terminal, a log or a file: two lines per candidate."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.text import Text

from flyweight.records import Interval, Result
from flyweight.report import _view, _words

WIDTH = 80
ALTERNATIVES = 8
NOTES = 5
LAYOUT = "{:>8}{:>9}{:<15}{:>9}{:>9}{:<14}{:>8}{:>8}"
HEAD = LAYOUT.format("score", "drop", " (95 %)", "latency", "speed-up", " (95 %)", "size", "memory")
FILES = (
    ("best/", "the recommended model, ready to run"),
    ("report.html", "this in full, with pictures"),
    ("result.json", "every figure, for programs"),
    ("study.db", "every trial, to go on from"),
)


def show(result: Result, out: str, stream: TextIO) -> None:
    """Print the table to a stream, in colour when it is a terminal that has colours and NO_COLOR is not set.

    out: the folder with the result's files. Raises OSError when the stream cannot be written.
    """
    colour = stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    stream.write(table(result, out, encoding=stream.encoding or "ascii", colour=colour))


def table(result: Result, out: str = "", *, encoding: str = "utf-8", colour: bool = False) -> str:
    """Verdict, original, best and alternatives in at most 80 columns, each with the intervals beside its figures.

    out: the folder with the result's files; its path is never broken, so a long one may be wider.
    encoding: what the output can show; other characters are replaced. colour: whether to use ANSI colours.
    """
    buffer = io.StringIO()
    # The caller decides on width and colour, not COLUMNS or FORCE_COLOR: hence the empty environment.
    console = Console(
        file=buffer,
        width=WIDTH,
        force_terminal=colour,
        color_system="standard" if colour else None,
        legacy_windows=False,
        _environ={},
    )
    for text, style in (*_verdict(result), *_candidates(result), *_closing(result)):
        console.print(Text(_words.encodable(text, encoding), style))
    if out:
        console.print(Text(_words.encodable(f"\nfiles in {_words.one_line(out)}", encoding)), soft_wrap=True)
        console.print(Text("\n".join(f"  {name:<12} {what}" for name, what in FILES)))
    return buffer.getvalue()


def _verdict(result: Result) -> Iterator[tuple[str, str]]:
    style = "bold green" if result.status == "met" else "bold red"
    yield f"{result.status}: {_words.one_line(result.verdict)}\n", style


def _candidates(result: Result) -> Iterator[tuple[str, str]]:
    yield HEAD, "dim"
    yield "─" * WIDTH, "dim"
    rows = [row for row in _view.rows(result) if row.role != "other"]
    shown = rows[: 2 + ALTERNATIVES]
    for row in shown:
        style = "bold" if row.role == "best" else ""
        yield _name(row, result), style
        yield _figures(row), style
    if len(rows) > len(shown):
        yield f"{_words.plural(len(rows) - len(shown), 'more alternative')} in result.json", "dim"
    yield "─" * WIDTH, "dim"


def _name(row: _view.Row, result: Result) -> str:
    m = row.measured
    verdict = "" if row.role == "original" else f", {m.verdict}"
    role = _view.role_name(row.role, result)
    return f"{role}: {_words.one_line(m.name, 90)} ({_words.one_line(m.runtime, 40)}{verdict})"


def _figures(row: _view.Row) -> str:
    m, original = row.measured, row.role == "original"
    return LAYOUT.format(
        _words.score(m.score),
        _words.percent(m.drop),
        "" if original else _range(m.drop_interval, _words.percent),
        _words.milliseconds(m.latency_ms),
        _words.ratio(m.speedup),
        "" if original else _range(m.speedup_interval, _words.ratio),
        _words.size(m.bytes),
        _words.size(m.peak_memory_bytes),
    )


def _range(interval: Interval | None, show_number: Callable[[float | None], str]) -> str:
    """Both ends without the unit, short enough for a column: " (−0.20..0.82)"."""
    ends = _words.span(interval, show_number).replace(" to ", "..").rstrip(" %×")
    return f" ({ends})" if ends else ""


def _closing(result: Result) -> Iterator[tuple[str, str]]:
    """What stands under the table: how the time went, and what was said on the way."""
    if result.best.drop_interval is None:
        yield "The score gives one number, so the drop has no interval.", ""
    if result.further:
        told = (
            f"{_words.one_line(name.replace('_', ' '))} {value:.4g}" for name, value in result.further.items()
        )
        yield f"best: {', '.join(told)}", ""
    evaluations = _words.plural(result.evaluations, "evaluation")
    measuring = _words.duration(result.seconds_measuring)
    yield f"{evaluations} of the score in {_words.duration(result.seconds)}, {measuring} of it measuring", ""
    for note in result.notes[:NOTES]:
        yield f"note: {_words.one_line(note, 300)}", ""
    if len(result.notes) > NOTES:
        yield f"{_words.plural(len(result.notes) - NOTES, 'more note')} in report.html", ""
