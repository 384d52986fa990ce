"""The report: one self-contained HTML page that a browser shows without a network and without running a script.

The page says the answer first, then the proof, then the way there. All text passes through `_markup.element`, which
escapes it, and the policy in the page's head forbids scripts and outside addresses even if that failed.
"""

from __future__ import annotations

import functools
import math
from importlib import resources

from flyweight.records import Objective, Result
from flyweight.report import _gauge, _plot, _strip, _tables, _view, _words
from flyweight.report._markup import Markup, element, style, within

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
NOTES_BUDGET = 100_000
OPEN_UP_TO = 20
"""A table with more rows starts folded."""
NO_INTERVAL = (
    "The score gives one number and not a value per sample, so the drop has no interval and was compared with the goal "
    "as it is. A score that returns a value per sample shows how sure the drop is."
)
ASKED: dict[Objective, str] = {
    "latency": "the lowest latency",
    "size": "the smallest files",
    "memory": "the least memory",
}


def render(result: Result, how_to_load: str) -> str:
    """The whole page as HTML; `how_to_load` is code that loads the artifact, shown as it is."""
    body = element(
        "main",
        {},
        _answer(result),
        _section("Candidates", _tables.candidates(result)),
        *_further(result),
        _section("Trade-off", _plot.tradeoff(result)),
        element("div", {"class": "pair"}, _certainty(result), _loading(how_to_load)),
        _layers(result),
        _notes(result),
        _trials(result),
        _about(result),
    )
    return (
        "<!doctype html>\n"
        + element("html", {"lang": "en"}, _head(result), element("body", {}, body)).text
        + "\n"
    )


def _head(result: Result) -> Markup:
    title = f"{_words.one_line(result.task, 80)}: {result.status}"
    return element(
        "head",
        {},
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("title", {}, title),
        style(_css()),
    )


@functools.cache
def _css() -> str:
    return resources.files("flyweight.report").joinpath("page.css").read_text(encoding="utf-8")


def _section(title: str, *parts: Markup) -> Markup:
    return element("section", {}, element("h2", {}, title), *parts)


def _answer(result: Result) -> Markup:
    goal, best = result.goal, result.best
    asked = (
        f"Asked for: {ASKED[goal.minimize]} with a drop of the score of at most {_words.bound(goal.max_drop)}, "
        f"within {_words.duration(goal.within)}. "
    )
    found = "Recommended" if result.status == "met" else "Nearest to that"
    named = f"{_words.one_line(best.name, 140)} on {_words.one_line(best.runtime, 60)}."
    return element(
        "header",
        {"class": result.status},
        element(
            "p",
            {"class": "task"},
            _tables.badge(result.status),
            element("span", {}, _words.one_line(result.task, 120)),
        ),
        element("h1", {}, result.verdict),
        element("p", {"class": "quiet"}, f"{asked}{found}: {named}"),
        _figures(result),
    )


def _figures(result: Result) -> Markup:
    """The key figures of the recommended candidate: the goal's first, the drop second."""
    tiles = {objective: _gain(result, objective) for objective in ASKED}
    first = tiles.pop(result.goal.minimize)
    return element("div", {"class": "tiles"}, first, _drop(result), *tiles.values())


def _gain(result: Result, objective: Objective) -> Markup:
    factor = _view.factor(result, result.best, objective)
    if factor is None or not math.isfinite(factor) or factor <= 0:
        return _tile(_words.DASH, f"{objective} not measured", [])
    figure, word = _words.compared(factor, objective)
    before, after = (_view.amount(measured, objective) for measured in (result.baseline, result.best))
    below = [f"{before} → {after}", f"change {_words.change(1 / factor)}"]
    if objective == "latency":
        below.append(f"95 % interval: {_words.compared_span(factor, result.best.speedup_interval)}")
    return _tile(figure, word, below)


def _drop(result: Result) -> Markup:
    best = result.best
    word = "drop of the score" if best.drop >= 0 else "better score"
    interval = _words.span(best.drop_interval, _words.percent)
    below = [
        f"{_words.score(result.baseline.score)} → {_words.score(best.score)}",
        f"at most {_words.bound(result.goal.max_drop)} asked",
        f"95 % interval: {interval}" if interval else "one number, so no interval",
    ]
    return _tile(_words.percent(abs(best.drop)), word, below)


def _tile(figure: str, word: str, below: list[str]) -> Markup:
    lines = (element("span", {"class": "below"}, line) for line in below)
    return element("div", {"class": "tile"}, element("b", {}, figure), element("span", {}, word), *lines)


def _further(result: Result) -> tuple[Markup, ...]:
    """Figures that are reported and not judged; no section where there are none."""
    if not result.further:
        return ()
    lead = "The recommended candidate beside the original, as reported and not judged."
    figures = _tables.pairs({name: f"{value:.4g}" for name, value in result.further.items()})
    return (_section("Further figures", element("p", {"class": "lead"}, lead), figures),)


def _certainty(result: Result) -> Markup:
    sentences = (*_told_interval(result), *_told_samples(result), _told_work(result))
    return _section("How sure this is", _gauge.gauge(result), *(element("p", {}, text) for text in sentences))


def _told_interval(result: Result) -> tuple[str, ...]:
    interval, limit = result.best.drop_interval, result.goal.max_drop
    if interval is None:
        return (NO_INTERVAL,)
    span, goal = _words.span(interval, _words.percent), _words.bound(limit)
    if interval.high <= limit:
        return (f"The whole 95 % interval of the drop, {span}, lies within the goal of {goal}.",)
    if interval.low > limit:
        return (f"The whole 95 % interval of the drop, {span}, lies beyond the goal of {goal}.",)
    return (f"The 95 % interval of the drop, {span}, reaches across the goal of {goal}.",)


def _told_samples(result: Result) -> tuple[str, ...]:
    samples, least, needed = (
        _number(result, key) for key in ("samples", "resolvable_drop", "samples_needed")
    )
    told = []
    if samples is not None and least is not None:
        told.append(
            f"Original and candidate were judged on the same {_words.plural(round(samples), 'sample')}, "
            f"which can tell a drop of {_words.percent(least)} or more from none."
        )
    if needed is not None:
        goal = f"A goal of {_words.bound(result.goal.max_drop)} needs about {_words.plural(round(needed), 'sample')}"
        enough = (
            ""
            if samples is None
            else ": there are enough"
            if samples >= needed
            else ": bring more to be sure"
        )
        told.append(f"{goal}{enough}.")
    return tuple(told)


def _told_work(result: Result) -> str:
    return (
        f"{_words.plural(result.evaluations, 'evaluation')} of the score in {_words.duration(result.seconds)}, of which "
        f"{_words.duration(result.seconds_measuring)} went into measuring. Every figure was measured on this "
        "machine, unless it is called predicted."
    )


def _number(result: Result, key: str) -> float | None:
    value = result.resolution.get(key)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None  # type: ignore[arg-type]


def _loading(how_to_load: str) -> Markup:
    code = element("pre", {"tabindex": "0"}, element("code", {}, how_to_load))
    return _section("Load the result", code, element("p", {"class": "quiet"}, "A click selects all of it."))


def _layers(result: Result) -> Markup:
    if not result.layers:
        return _section("Layers", element("p", {}, "No layer was changed one by one."))
    lead = (
        "One column per layer, from the input to the output. The bar is the predicted damage: the relative squared "
        "change of the model's output when only this layer is changed. The lanes below show what was chosen."
    )
    every = _folded("Every layer with its reason", len(result.layers), _tables.layers(result.layers))
    return _section("Layers", element("p", {"class": "lead"}, lead), _strip.strip(result.layers), every)


def _notes(result: Result) -> Markup:
    if not result.notes:
        return _section(
            "Said, not silent", element("p", {}, "Nothing was left alone, skipped or replaced unasked.")
        )
    items, shown = within((element("li", {}, note) for note in result.notes), NOTES_BUDGET)
    rest = len(result.notes) - shown
    more = (
        [element("p", {"class": "quiet"}, f"{_words.plural(rest, 'more note')} in result.json.")]
        if rest
        else []
    )
    return _section("Said, not silent", element("ul", {}, items), *more)


def _trials(result: Result) -> Markup:
    ends = ("measured", "skipped", "failed")
    counts = {end: sum(trial.state == end for trial in result.trials) for end in ends}
    told = ", ".join(f"{number:,} {end}" for end, number in counts.items() if number) or "nothing"
    table = _folded("Every trial with its end and reason", len(result.trials), _tables.trials(result))
    return _section(
        "Everything that was tried", element("p", {"class": "lead"}, f"{told}.".capitalize()), table
    )


def _folded(title: str, rows: int, table: Markup) -> Markup:
    state = {"open": "open"} if rows <= OPEN_UP_TO else {}
    return element("details", state, element("summary", {}, f"{title} ({rows:,})"), table)


def _about(result: Result) -> Markup:
    machine = _section("Machine", _tables.pairs(result.machine))
    versions = _section("Versions", _tables.pairs({**result.versions, "seed": str(result.seed)}))
    return element("div", {"class": "pair"}, machine, versions)
