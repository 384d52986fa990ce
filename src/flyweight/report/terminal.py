"""The result as a table of 80 columns, for a terminal, a log or a file."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flyweight.records import Interval, Result
from flyweight.report import _view, _words
from flyweight.report.progress import Progress as Progress

WIDTH = 80
ALTERNATIVES = 8
NOTES = 5
COLUMNS = (("score", 7), ("drop", 12), ("latency", 9), ("speed-up", 11), ("size", 7), ("memory", 7))
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
    """Verdict, original, best and alternatives in at most 80 columns, with the interval under a figure.

    out: the folder with the result's files; its path is never broken, so a long one may be wider.
    encoding: what the output can show; other characters are replaced. colour: whether to use ANSI colours.
    """
    buffer = io.StringIO()
    console = Console(
        file=buffer,
        width=WIDTH,
        force_terminal=colour,
        color_system="standard" if colour else None,
        legacy_windows=False,
        _environ={},  # the caller decides on colour and width, not COLUMNS or FORCE_COLOR
    )
    mark = "bold green" if result.status == "met" else "bold red"
    verdict = _words.encodable(_words.one_line(result.verdict), encoding)
    console.print(Text.assemble((result.status, mark), ": ", verdict))
    console.print(_candidates(result, encoding))
    for line in _closing(result):
        console.print(Text(_words.encodable(line, encoding)))
    if out:
        console.print(Text(f"files in {_words.encodable(_words.one_line(out), encoding)}"), soft_wrap=True)
        console.print(Text("\n".join(f"  {name:<12} {what}" for name, what in FILES)))
    return buffer.getvalue()


def _candidates(result: Result, encoding: str) -> Table:
    lines = box.SIMPLE_HEAD if _words.encodable("─", encoding) == "─" else box.ASCII2
    made = Table(box=lines, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, expand=True, header_style="dim")
    made.add_column("candidate", overflow="fold", ratio=1)
    for title, width in COLUMNS:
        made.add_column(title, justify="right", overflow="fold", width=width)
    rows = [row for row in _view.rows(result) if row.role != "other"]
    shown = rows[: 2 + ALTERNATIVES]
    for row in shown:
        made.add_row(*(_cell(upper, lower, row.role, encoding) for upper, lower in _figures(row, result)))
    if len(rows) > len(shown):
        made.add_row(Text(f"{_words.plural(len(rows) - len(shown), 'more alternative')} in result.json", style="dim"))
    return made


def _figures(row: _view.Row, result: Result) -> Iterator[tuple[str, str]]:
    """The cells of a row: the figure and what stands under it."""
    m, original = row.measured, row.role == "original"
    role = "" if row.role == "front" else f"{_view.role_name(row.role, result)}: "
    verdict = "" if original else f", {m.verdict}"
    yield role + _words.one_line(m.name, 80), f"{_words.one_line(m.runtime, 30)}{verdict}"
    yield _words.score(m.score), ""
    yield _words.percent(m.drop), "" if original else _range(m.drop_interval, _words.percent)
    yield _words.milliseconds(m.latency_ms), ""
    yield _words.ratio(m.speedup), "" if original else _range(m.speedup_interval, _words.ratio)
    for objective in ("size", "memory"):
        factor = None if original else _view.factor(result, m, objective)
        yield _view.amount(m, objective), "" if factor is None else _words.ratio(1 / factor)


def _cell(upper: str, lower: str, role: _view.Role, encoding: str) -> Text:
    parts = [(upper, "bold" if role == "best" else "")] + ([(f"\n{lower}", "dim")] if lower else [])
    return Text.assemble(*((_words.encodable(text, encoding), style) for text, style in parts))


def _range(interval: Interval | None, show_number: Callable[[float | None], str]) -> str:
    """Both ends without the unit, short enough for a column: "−0.20..0.82"."""
    return _words.span(interval, show_number).replace(" to ", "..").rstrip(" %×")


def _closing(result: Result) -> Iterator[str]:
    """What stands under the table: the resolution of the samples, the work, and how many notes there are."""
    if result.best.drop_interval is not None:
        yield "under drop and speed-up: the 95 % interval; under size and memory: the share of the original's"
    else:
        yield "the score gives one number, so the drop has no interval; under size and memory: the share"
    measuring = _words.duration(result.seconds_measuring)
    evaluations = _words.plural(result.evaluations, "evaluation")
    yield f"{evaluations} in {_words.duration(result.seconds)}, {measuring} of it measuring"
    yield from (f"note: {_words.one_line(note, 300)}" for note in result.notes[:NOTES])
    if len(result.notes) > NOTES:
        yield f"{_words.plural(len(result.notes) - NOTES, 'more note')} in the report"
