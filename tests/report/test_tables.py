from __future__ import annotations

import dataclasses

from report import page, samples

from flyweight.records import JSON
from flyweight.report import _tables, _words


def test_every_cell_of_a_row_has_its_column() -> None:
    result = samples.met()
    for table in (_tables.candidates(result), _tables.trials(result), _tables.layers(result.layers)):
        read = page.read(table.text)
        columns = sum(about.get("scope") == "col" for _, about in read.elements)
        rows = sum(tag == "tr" for tag, _ in read.elements) - 1
        assert (
            sum(tag == "td" or about.get("scope") == "row" for tag, about in read.elements) == rows * columns
        )


def test_tables_scroll_by_keyboard() -> None:
    about = page.read(_tables.trials(samples.met()).text).with_class("scroll")
    assert [(item["tabindex"], item["role"], item["aria-label"]) for item in about] == [
        ("0", "region", "trials")
    ]


def test_the_end_of_a_trial_is_its_verdict_or_its_state() -> None:
    result = samples.met(30)
    badges = [about["class"] for about in page.read(_tables.trials(result).text).with_class("badge")]
    assert badges == [f"badge {t.measured.verdict if t.measured else t.state}" for t in result.trials]


def test_a_table_that_is_too_long_says_what_is_missing() -> None:
    result = samples.met(2)
    trials = tuple(dataclasses.replace(result.trials[0], number=n, reason="x" * 3000) for n in range(300))
    text = page.read(_tables.trials(dataclasses.replace(result, trials=trials)).text).text()
    shown = text.count("x" * 3000)
    assert 50 < shown < 300
    assert f"The first {shown} of 300 trials; result.json has them all." in text


def test_pairs_show_scalars_sizes_and_lists() -> None:
    values: dict[str, JSON] = {
        "cores": 2,
        "memory_total": 8_347_000_000,
        "avx": True,
        "flags": ["a", "<b>"],
        "none": None,
        "n": 12345,
    }
    text = page.read(_tables.pairs(values).text).text()
    assert text == 'cores 2 memory total 8.35 GB avx true flags ["a", "<b>"] none null n 12,345'


def test_the_original_has_no_verdict_and_the_nearest_is_named() -> None:
    read = page.read(_tables.candidates(samples.infeasible()).text)
    assert len(read.with_class("badge")) == sum(tag == "tr" for tag, _ in read.elements) - 2
    assert "nearest, on" in read.text()
    assert _words.DASH in read.text()
