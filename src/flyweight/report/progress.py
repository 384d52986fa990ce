"""What a long run shows while it works: a line per finished trial and, on a terminal, one line for the present.

Nothing runs in the background: the line changes only when a stage, a step or its end is told, so that showing it
never disturbs a measurement. It goes to stderr, so that stdout stays for the result.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from typing import TextIO

from rich.cells import cell_len, set_cell_size

from flyweight.report import _words

BAR = 16


class Progress(contextlib.AbstractContextManager["Progress"]):
    """A context manager that tells stage, step, time left and the best so far on stderr; silent when not enabled.

    enabled: whether to say anything. within: the time for the whole run, in seconds, which bounds the time left;
    it may be infinite.
    An output that can no longer be written is left alone: it must not end a run of hours.
    """

    def __init__(self, enabled: bool, within: float) -> None:
        self._stream: TextIO | None = sys.stderr if enabled else None
        self._within = within
        self._begin = self._stage_begin = time.monotonic()
        self._stage, self._step, self._best = "", "", ""
        self._total, self._finished = 0, 0
        self._live = enabled and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def __exit__(self, *error: object) -> None:
        """Take the line of the present away."""
        self._write("", present="")

    def stage(self, name: str, total: int = 0) -> None:
        """Begin a part of the run with `total` steps; 0 when their number is not known."""
        self._stage, self._total = _words.one_line(name, 60), total
        self._finished, self._step, self._stage_begin = 0, "", time.monotonic()
        self._write(f"{self._stage}, {_words.plural(total, 'step')}\n" if total else f"{self._stage}\n")

    def step(self, name: str) -> None:
        """Begin a step of the stage."""
        self._step = _words.one_line(name, 100)
        self._write("")

    def done(self, outcome: str, best: bool = False) -> None:
        """End the step with its outcome in a few words; `best` when it is the best so far."""
        self._finished += 1
        outcome = _words.one_line(outcome, 200)
        if best:
            self._best = outcome
        told = f"{self._step}: {outcome}" if self._step else outcome
        mark = ", the best so far" if best else ""
        left = "" if self._live else f" ({self._left()})"  # on a terminal the line of the present says it
        self._step = ""
        self._write(f"  {self._count()} {told}{mark}{left}\n")

    def note(self, text: str) -> None:
        """Say something that is not a step, on a line of its own."""
        self._write(f"  {_words.one_line(text, 400)}\n")

    def _write(self, finished: str, present: str | None = None) -> None:
        """Write what is finished and, on a terminal, the line of the present after it."""
        if self._stream is None:
            return
        text = finished
        if self._live:
            text = f"\r\x1b[2K{finished}{self._present() if present is None else present}"
        if not text:
            return
        try:
            self._stream.write(_words.encodable(text, self._stream.encoding or "ascii"))
            self._stream.flush()
        except (OSError, ValueError):  # a closed terminal or stream
            self._stream = None

    def _present(self) -> str:
        """Stage, bar, step, time left and the best so far, cut to the terminal's width."""
        parts = [f"{self._stage} {self._count()}{self._bar()}", self._step, self._left()]
        parts += [f"best: {self._best}"] if self._best else []
        line = ", ".join(part for part in parts if part)
        width = _width(self._stream) - 1  # a full last column would wrap in some terminals
        return line if cell_len(line) <= width else set_cell_size(line, width)

    def _count(self) -> str:
        return (
            f"[{self._finished:>{len(str(self._total))}}/{self._total}]"
            if self._total
            else f"[{self._finished}]"
        )

    def _bar(self) -> str:
        filled = min(BAR, BAR * self._finished // self._total) if self._total else 0
        return f" {'#' * filled}{'-' * (BAR - filled)}" if self._total else ""

    def _left(self) -> str:
        """The time left in words: by the pace of the stage, but never more than the run may take."""
        now = time.monotonic()
        allowed = max(0.0, self._within - (now - self._begin))
        if not self._finished or not self._total:
            return f"at most {_rough(allowed)} left" if math.isfinite(allowed) else ""
        remaining = max(0, self._total - self._finished)
        pace = (now - self._stage_begin) / self._finished
        return f"about {_rough(min(allowed, pace * remaining))} left" if remaining else "stage finished"


def _rough(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else _words.duration(60 * round(seconds / 60))


def _width(stream: TextIO | None) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80 if stream is not None else 80
    except (OSError, ValueError):
        return 80
