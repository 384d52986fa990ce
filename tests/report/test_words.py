from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest

from flyweight.records import Interval
from flyweight.report import _words

NUMBERS = (
    _words.ratio,
    _words.percent,
    _words.change,
    _words.score,
    _words.damage,
    _words.milliseconds,
)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (_words.ratio(1.624), "1.62×"),
        (_words.ratio(12.34), "12.3×"),
        (_words.ratio(1234.5), "1,234×"),
        (_words.percent(0.0031), "0.31 %"),
        (_words.percent(-0.0031), "−0.31 %"),
        (_words.percent(-0.00001), "0.00 %"),
        (_words.percent(0.123), "12.3 %"),
        (_words.bound(0.01), "1 %"),
        (_words.bound(0.0015), "0.15 %"),
        (_words.tick(0.30000000000000004), "30 %"),
        (_words.tick(-0.005), "−0.5 %"),
        (_words.change(0.617), "−38.3 %"),
        (_words.change(1.25), "+25.0 %"),
        (_words.score(0.65123), "0.6512"),
        (_words.score(0.65), "0.6500"),
        (_words.score(91.25), "91.25"),
        (_words.score(-1.5), "−1.500"),
        (_words.score(123456.0), "1.235e+05"),
        (_words.damage(0.00012), "1.2e-4"),
        (_words.damage(0), "0"),
        (_words.milliseconds(0.8531), "0.853 ms"),
        (_words.milliseconds(12.414), "12.41 ms"),
        (_words.milliseconds(1240.4), "1,240 ms"),
        (_words.size(999), "999 B"),
        (_words.size(22_713_000), "22.7 MB"),
        (_words.size(999_960), "1.00 MB"),
        (_words.size(3_100_000_000_000_000), "3,100 TB"),
        (_words.count(590_208), "590 k"),
        (_words.count(7), "7"),
        (_words.duration(3.21), "3.2 s"),
        (_words.duration(59.97), "1 min"),
        (_words.duration(1100), "18 min 20 s"),
        (_words.duration(7500), "2 h 5 min"),
        (_words.span(Interval(-0.002, 0.0082), _words.percent), "−0.20 to 0.82 %"),
        (_words.span(Interval(0.9, 1.21), _words.ratio), "0.90 to 1.21×"),
        (_words.span(Interval(900, 1200), _words.size), "900 B to 1.20 kB"),
        (_words.span(None, _words.percent), ""),
        (_words.plural(1, "layer"), "1 layer"),
        (_words.plural(1200, "layer"), "1,200 layers"),
    ],
)
def test_wording(said: str, meant: str) -> None:
    assert said == meant


@pytest.mark.parametrize("show", NUMBERS)
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_a_dash(show: object, value: float | None) -> None:
    assert callable(show)
    assert show(value) == _words.DASH


@hypothesis.given(st.floats(), st.sampled_from(NUMBERS))
def test_every_number_has_a_short_word_for_any_terminal(value: float, show: object) -> None:
    assert callable(show)
    said = _words.encodable(show(value), "ascii")
    assert said.isascii()
    assert "?" not in said
    if math.isfinite(value) and 1e-6 < abs(value) < 1e6:
        assert len(said) <= 16


@hypothesis.given(st.floats(min_value=1, max_value=1e15))
def test_sizes_read_back_within_half_a_percent(value: float) -> None:
    figure, unit = _words.size(value).replace(",", "").split()
    assert float(figure) * 1000 ** ["B", "kB", "MB", "GB", "TB"].index(unit) == pytest.approx(
        value, rel=0.0051, abs=0.51
    )


@pytest.mark.parametrize(
    ("factor", "objective", "meant"),
    [
        (1.62, "latency", ("1.62×", "faster")),
        (0.5, "latency", ("2.00×", "slower")),
        (1.001, "latency", ("1.00×", "as fast")),
        (3.9, "size", ("3.90×", "smaller")),
        (0.9, "memory", ("1.11×", "more memory")),
        (None, "memory", ("–", "not measured")),
        (0.0, "size", ("–", "not measured")),
        (math.nan, "latency", ("–", "not measured")),
    ],
)
def test_compared(factor: float | None, objective: str, meant: tuple[str, str]) -> None:
    assert _words.compared(factor, objective) == meant  # type: ignore[arg-type]


def test_the_interval_of_a_slower_candidate_is_turned_with_its_figure() -> None:
    assert _words.compared_span(1.62, Interval(1.5, 1.7)) == "1.50 to 1.70×"
    assert _words.compared_span(0.5, Interval(0.4, 0.625)) == "1.60 to 2.50×"


def test_clean_shows_what_could_rewrite_a_line() -> None:
    assert _words.clean("a\x1b[2J\x00\u202eb\ud800") == "a\\x1b[2J\\x00\\u202eb\\ud800"
    assert _words.clean("line\n\tnext 中文 é") == "line\n\tnext 中文 é"


def test_clean_keeps_both_ends_of_a_long_text() -> None:
    cut = _words.clean("a" * 500_000 + "z" * 500_000, 101)
    assert cut == "a" * 50 + "…" + "z" * 50


def test_one_line_has_no_line_breaks() -> None:
    assert _words.one_line(" a\n\n b\tc ") == "a b c"


def test_encodable_replaces_only_what_is_missing() -> None:
    assert _words.encodable("1.62× −2 … é", "utf-8") == "1.62× −2 … é"
    assert _words.encodable("1.62× −2 … é", "ascii") == "1.62x -2 .. ?"
    assert _words.encodable("1.62× é", "latin-1") == "1.62× é"
