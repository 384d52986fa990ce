"""The tables of the page: candidates, layers, trials, and pairs of name and value."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from flyweight.records import JSON, LayerChoice, Measured, Objective, Result, Trial
from flyweight.report import _draw, _view, _words
from flyweight.report._markup import Markup, element, join, within

BUDGET = 350_000
NUMBERS = frozenset(
    (
        "score",
        "drop",
        "latency",
        "speed-up",
        "size",
        "memory",
        "no.",
        "time",
        "parameters",
        "MACs",
        "predicted damage",
    )
)


def candidates(result: Result) -> Markup:
    """Original, best and the alternatives of the front, with intervals under the figures."""
    head = ("candidate", "score", "drop", "latency", "speed-up", "size", "memory", "goal")
    rows = [_candidate(row, result) for row in _view.rows(result) if row.role != "other"]
    return _table("candidates", head, rows)


def layers(choices: Sequence[LayerChoice]) -> Markup:
    """Every layer with its choice and the reason, in the model's order."""
    head = ("layer", "kind", "parameters", "MACs", "choice", "predicted damage", "reason")
    return _table("layers", head, [_row(head, _layer(choice)) for choice in choices])


def trials(result: Result) -> Markup:
    """Everything that was tried, how it ended and why."""
    head = ("no.", "candidate", "end", "speed-up", "drop", "size", "time", "reason")
    return _table("trials", head, [_row(head, _trial(trial)) for trial in result.trials])


def pairs(values: Mapping[str, JSON]) -> Markup:
    """Names and values; a value that is not text is shown as JSON."""
    items = (_pair(name.replace("_", " "), value) for name, value in values.items())
    return element("dl", {"class": "pairs"}, within(items, BUDGET // 4)[0])


def badge(word: str) -> Markup:
    """A verdict or an end in one word, coloured by its meaning."""
    return element("span", {"class": f"badge {word}"}, word)


def _table(name: str, head: Sequence[str], rows: Sequence[Markup]) -> Markup:
    """A table that scrolls by itself; it says so when it had to leave out rows."""
    body, shown = within(rows, BUDGET)
    titles = (element("th", {"scope": "col", **_kind(title)}, title) for title in head)
    whole = element(
        "table", {"class": name}, element("thead", {}, element("tr", {}, *titles)), element("tbody", {}, body)
    )
    scroller = element(
        "div", {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": name}, whole
    )
    if shown == len(rows):
        return scroller
    rest = f"The first {shown:,} of {len(rows):,} {name}; result.json has them all."
    return join((scroller, element("p", {"class": "quiet"}, rest)))


def _candidate(row: _view.Row, result: Result) -> Markup:
    m, reference = row.measured, row.role == "original"
    told = f"{_view.role_name(row.role, result)}, on {_short(m.runtime)}"
    name = element("span", {}, _short(m.name), element("small", {}, told))
    head = element(
        "th", {"scope": "row"}, element("span", {"class": "who"}, _draw.mark(_draw.shape(row)), name)
    )
    cells = (
        _cell("score", _words.score(m.score), _words.span(m.score_interval, _words.score)),
        _cell(
            "drop", _words.percent(m.drop), "" if reference else _words.span(m.drop_interval, _words.percent)
        ),
        _cell(
            "latency", _words.milliseconds(m.latency_ms), _words.span(m.latency_interval, _words.milliseconds)
        ),
        _cell(
            "speed-up",
            _words.ratio(m.speedup),
            "" if reference else _words.span(m.speedup_interval, _words.ratio),
        ),
        _cell("size", _words.size(m.bytes), "" if reference else _against(result, m, "size")),
        _cell("memory", _words.size(m.peak_memory_bytes), "" if reference else _against(result, m, "memory")),
        _cell("goal", _words.DASH if reference else badge(m.verdict)),
    )
    return element("tr", {"class": row.role}, head, *cells)


def _layer(choice: LayerChoice) -> tuple[str | Markup, ...]:
    name = element("code", {}, _short(choice.site))
    figures = _words.count(choice.parameters), _words.count(choice.macs)
    return (
        name,
        _short(choice.kind),
        *figures,
        _short(choice.choice),
        _words.damage(choice.damage),
        choice.reason,
    )


def _trial(trial: Trial) -> tuple[str | Markup, ...]:
    m = trial.measured
    name = element("span", {}, _short(trial.name), element("small", {}, f"on {_short(trial.runtime)}"))
    end = badge(m.verdict if m is not None and trial.state == "measured" else trial.state)
    figures = (_words.DASH,) * 3
    if m is not None:
        figures = _words.ratio(m.speedup), _words.percent(m.drop), _words.size(m.bytes)
    return str(trial.number), name, end, *figures, _words.duration(trial.seconds), trial.reason


def _row(head: Sequence[str], values: Iterable[str | Markup]) -> Markup:
    cells = (element("td", _kind(title), value) for title, value in zip(head, values, strict=True))
    return element("tr", {}, *cells)


def _cell(title: str, value: str | Markup, below: str = "") -> Markup:
    small = element("small", {}, below) if below else ""
    return element("td", {"data-label": title, **_kind(title)}, element("span", {}, value, small))


def _kind(title: str) -> dict[str, str]:
    return {"class": "number" if title in NUMBERS else title}


def _against(result: Result, measured: Measured, objective: Objective) -> str:
    factor = _view.factor(result, measured, objective)
    if factor is None:
        return ""
    figure, word = _words.compared(factor, objective)
    return f"{figure} {word.split()[0]}"


def _pair(name: str, value: JSON) -> Markup:
    return element("div", {}, element("dt", {}, _short(name)), element("dd", {}, _told(name, value)))


def _told(name: str, value: JSON) -> str:
    if isinstance(value, str):
        return value
    if type(value) is int:
        return _words.size(value) if "memory" in name or "bytes" in name else f"{value:,}"
    return json.dumps(value)


def _short(name: str) -> str:
    return _words.one_line(name, 140)
