from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from importlib import resources

import hypothesis
import hypothesis.strategies as st
import pytest
from report import hostile, page, samples

from flyweight.records import Interval, Result
from flyweight.report import _view, _words, html

RESULTS = {
    "met": samples.met(),
    "infeasible": samples.infeasible(),
    "without intervals": samples.without_intervals(),
    "60 trials, 300 layers": samples.met(60, 300),
    "nothing tried": dataclasses.replace(samples.met(), trials=(), front=(), layers=(), notes=()),
}
ALLOWED = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "main",
    "header",
    "section",
    "h1",
    "h2",
    "p",
    "b",
    "i",
    "small",
    "span",
    "div",
    "ul",
    "li",
    "dl",
    "dt",
    "dd",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "figure",
    "figcaption",
    "details",
    "summary",
    "pre",
    "code",
    "svg",
    "line",
    "rect",
    "text",
    "path",
}
ATTRIBUTES = {
    "lang",
    "charset",
    "http-equiv",
    "name",
    "content",
    "class",
    "style",
    "tabindex",
    "role",
    "aria-label",
    "aria-hidden",
    "scope",
    "data-label",
    "open",
    "viewbox",
    "d",
    "x",
    "y",
    "x1",
    "y1",
    "x2",
    "y2",
    "dx",
    "dy",
    "width",
    "height",
}


SMALL = samples.met(9, 6)


def render(result: Result) -> page.Page:
    return page.read(html.render(result, samples.HOW_TO_LOAD))


PLAIN = [tag for tag, _ in render(samples.with_text(SMALL, "plain")).elements]


@pytest.fixture(params=RESULTS, scope="module")
def result(request: pytest.FixtureRequest) -> Result:
    return RESULTS[request.param]


def test_the_page_is_balanced_and_inert(result: Result) -> None:
    read = render(result)
    assert read.faults == []
    assert read.tags() <= ALLOWED
    assert {name for _, about in read.elements for name in about} <= ATTRIBUTES


def test_the_policy_comes_before_everything_but_the_encoding(result: Result) -> None:
    first = render(result).elements[2:4]
    assert first[0] == ("meta", {"charset": "utf-8"})
    assert first[1][1] == {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    }


def test_no_address_and_no_script(result: Result) -> None:
    text = html.render(result, samples.HOW_TO_LOAD)
    for forbidden in ("http:", "https:", "//", "url(", "@import", "src=", "href=", "<script", "javascript:"):
        assert forbidden not in text, forbidden


def test_the_answer_comes_first_with_its_mark(result: Result) -> None:
    text = render(result).text()
    assert text.index(result.status) < text.index(_words.one_line(result.verdict)) < text.index("Candidates")


def test_met_and_infeasible_are_marked_by_a_word() -> None:
    for name in ("met", "infeasible"):
        read = render(RESULTS[name])
        assert [tag for tag, about in read.elements if about.get("class") == name] == ["header"]
        assert read.with_class("badge")[0]["class"] == f"badge {name}"


def test_the_key_figures_are_the_result_s() -> None:
    result = samples.met()
    text, best = render(result).text(), result.best
    shown = text[text.index("Recommended") : text.index("Candidates")]
    assert f"{best.speedup:.2f}× faster" in shown
    assert f"95 % interval: {best.speedup_interval.low:.2f} to {best.speedup_interval.high:.2f}×" in shown
    assert f"{100 * best.drop:.2f} % drop of the score" in shown
    assert best.drop_interval is not None
    assert f"{100 * best.drop_interval.low:.2f} to {100 * best.drop_interval.high:.2f} %" in shown
    assert f"{result.baseline.bytes / best.bytes:.2f}× smaller" in shown
    assert f"change −{100 - 100 / best.speedup:.1f} %" in shown
    assert f"{result.baseline.latency_ms:.2f} ms → {best.latency_ms:.2f} ms" in shown


def test_the_goal_s_figure_comes_first() -> None:
    text = render(RESULTS["without intervals"]).text()
    assert (
        text.index("smaller 90.9 MB") < text.index("drop of the score 0.65") < text.index("slower 12.41 ms")
    )
    assert "memory not measured" in text


def test_a_worse_candidate_is_called_slower_and_a_better_score_better() -> None:
    result = samples.met()
    best = dataclasses.replace(result.best, speedup=0.5, speedup_interval=Interval(0.4, 0.625), drop=-0.004)
    text = render(dataclasses.replace(result, best=best)).text()
    assert "2.00× slower" in text
    assert "95 % interval: 1.60 to 2.50×" in text
    assert "0.40 % better score" in text


def test_the_table_has_original_best_and_alternatives_with_their_figures() -> None:
    result = samples.met()
    text = render(result).text()
    table = text[text.index("Candidates") : text.index("Trade-off")]
    for row in _view.rows(result):
        if row.role == "other":
            assert row.measured.name not in table.replace(result.best.name, "")
            continue
        m = row.measured
        for figure in (
            m.name,
            f"{m.score:.4f}",
            f"{m.latency_ms:.2f} ms",
            f"{m.speedup:.2f}×",
            f"{m.bytes / 1e6:.1f} MB",
        ):
            assert figure in table


def test_every_trial_and_layer_stands_on_the_page_with_its_reason() -> None:
    result = RESULTS["60 trials, 300 layers"]
    text = render(result).text()
    trials = text[text.index("Everything that was tried") :]
    for trial in result.trials:
        assert f"{trial.number} {trial.name} on {trial.runtime} " in trials
        assert trial.reason in trials
    layers = text[text.index("Every layer with its reason") : text.index("Said, not silent")]
    for layer in result.layers:
        assert f"{layer.site} {layer.kind} " in layers
        assert layer.reason in layers
    counts = {
        state: sum(trial.state == state for trial in result.trials)
        for state in ("measured", "skipped", "failed")
    }
    assert f"{counts['measured']} measured, {counts['skipped']} skipped, {counts['failed']} failed." in text


def test_long_tables_start_folded_and_short_ones_open() -> None:
    assert [
        about.get("open") for tag, about in render(samples.met(60, 300)).elements if tag == "details"
    ] == [None, None]
    assert [about.get("open") for tag, about in render(samples.met(9, 6)).elements if tag == "details"] == [
        "open"
    ] * 2


def test_how_sure_it_is() -> None:
    met, infeasible = render(RESULTS["met"]).text(), render(RESULTS["infeasible"]).text()
    assert "lies within the goal of 1 %" in met
    assert "2,000 samples, which can tell a drop of 0.51 % or more from none" in met
    assert "A goal of 1 % needs about 1,300 samples: there are enough." in met
    assert "lies beyond the goal of 0.1 %" in infeasible
    assert "needs about 51,000 samples: bring more to be sure" in infeasible
    assert "gives one number" in render(RESULTS["without intervals"]).text()
    across = dataclasses.replace(samples.met().best, drop_interval=Interval(0.001, 0.02))
    assert "reaches across the goal of 1 %" in render(dataclasses.replace(samples.met(), best=across)).text()


def test_notes_machine_versions_seed_and_work_are_there() -> None:
    result = samples.met()
    text = render(result).text()
    assert all(note in text for note in result.notes)
    assert "AMD EPYC 7B13" in text
    assert "memory 8.35 GB" in text
    assert "openvino 2026.4.1" in text
    assert "seed 0" in text
    assert f"{result.evaluations} evaluations of the score in 18 min 23 s, of which 14 min 31 s" in text


def test_how_to_load_is_shown_letter_by_letter() -> None:
    code = 'predict = load("a<b>&\\"c\\"")\nif x < 3 and y > 4:\n    pass\n'
    read = page.read(html.render(samples.met(), code))
    assert code in [text for tag, text in read.texts if tag == "code"]


@pytest.mark.parametrize("text", hostile.STRINGS)
def test_hostile_text_in_every_field_stays_text(text: str) -> None:
    read = page.read(html.render(samples.with_text(SMALL, text), text))
    assert read.faults == []
    assert read.tags() <= ALLOWED
    assert {name for _, about in read.elements for name in about} <= ATTRIBUTES
    assert [tag for tag, _ in read.elements] == PLAIN
    assert _words.one_line(text)[:20] in read.text()


@pytest.mark.parametrize("text", ["<" * 1_000_000, "'" * 3000, "\u202e\x00" * 3000, "中" * 3000])
def test_the_page_stays_small_whatever_is_in_it(text: str) -> None:
    result = samples.with_text(samples.met(300, 300), text)
    rendered = html.render(dataclasses.replace(result, notes=(text,) * 1000), text)
    assert len(rendered.encode()) < 1_500_000
    assert "result.json has them all" in rendered
    assert "more notes in result.json" in rendered


def test_usual_pages_are_small() -> None:
    assert len(html.render(samples.met(), "").encode()) < 100_000
    assert len(html.render(samples.met(60, 300), "").encode()) < 300_000


@hypothesis.given(st.floats(), st.floats(), st.floats(), st.integers(0, 2**60))
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_figures_give_a_page(drop: float, speedup: float, score: float, size: int) -> None:
    result = samples.met(9, 6)
    best = dataclasses.replace(
        result.best,
        drop=drop,
        drop_interval=Interval(drop, score),
        speedup=speedup,
        speedup_interval=Interval(speedup, drop),
        score=score,
        latency_ms=speedup,
        bytes=size,
    )
    goal = dataclasses.replace(result.goal, minimize="size" if size % 2 else "latency")
    read = render(dataclasses.replace(result, best=best, front=(best, *result.front), goal=goal))
    assert read.faults == []
    assert not re.search(r"\b(nan|inf)\b", read.text())
    assert all("nan" not in (about.get("style") or "") for about in read.with_class("spot"))


@pytest.mark.parametrize("value", [None, True, "many", math.nan, [1]])
def test_a_resolution_that_says_nothing_is_left_out(value: object) -> None:
    resolution = {"samples": value, "resolvable_drop": value, "samples_needed": value}
    text = render(dataclasses.replace(samples.met(), resolution=resolution)).text()  # type: ignore[arg-type]
    assert "needs about" not in text
    assert "can tell a drop" not in text


def test_the_same_result_gives_the_same_bytes() -> None:
    assert html.render(samples.met(), "x") == html.render(Result.from_json(samples.met().to_json()), "x")


@pytest.mark.heavy
def test_the_same_result_gives_the_same_bytes_in_another_process() -> None:
    code = (
        "import json, sys; from flyweight.records import Result; from flyweight.report import html;"
        "sys.stdout.buffer.write(html.render(Result.from_json(json.load(sys.stdin)), 'x').encode())"
    )
    given = json.dumps(samples.met().to_json())
    env = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], input=given.encode(), capture_output=True, env=env, check=True
    )
    assert done.stdout.decode() == html.render(samples.met(), "x")


def test_text_has_enough_contrast_in_both_schemes() -> None:
    css = resources.files("flyweight.report").joinpath("page.css").read_text(encoding="utf-8")
    schemes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    ]
    assert len(schemes) == 2
    for scheme in schemes:
        pairs = [
            (ink, paper) for ink in ("ink", "quiet", "best", "good", "bad") for paper in ("paper", "raised")
        ]
        pairs += [
            ("good", "good-wash"),
            ("bad", "wash"),
            ("doubt", "doubt-wash"),
            ("ink", "wash"),
            ("quiet", "wash"),
        ]
        for ink, paper in pairs:
            assert contrast(scheme[ink], scheme[paper]) >= 4.5, (ink, paper, scheme)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, as WCAG 2 defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
