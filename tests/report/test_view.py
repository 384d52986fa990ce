from __future__ import annotations

import dataclasses

import pytest
from report import samples

from flyweight.report import _view


def test_each_candidate_appears_once_in_its_first_role() -> None:
    result = samples.met()
    rows = _view.rows(result)
    measured = [trial.measured for trial in result.trials if trial.measured]
    assert [row.role for row in rows[:2]] == ["original", "best"]
    assert len(rows) == 1 + len(measured)
    assert {_view.identity(row.measured) for row in rows[1:]} == {_view.identity(m) for m in measured}
    assert [row.measured for row in rows if row.role == "front"] == [
        m for m in result.front if m != result.best
    ]


def test_a_best_that_is_the_original_still_has_its_row() -> None:
    result = samples.met()
    rows = _view.rows(dataclasses.replace(result, best=result.baseline, front=(), trials=()))
    assert [row.role for row in rows] == ["original", "best"]


def test_the_best_of_an_infeasible_result_is_only_the_nearest() -> None:
    assert _view.role_name("best", samples.met()) == "best"
    assert _view.role_name("best", samples.infeasible()) == "nearest"


def test_factors_are_the_result_s() -> None:
    result = samples.met()
    best, original = result.best, result.baseline
    assert _view.factor(result, best, "latency") == best.speedup
    assert _view.factor(result, best, "size") == pytest.approx(original.bytes / best.bytes)
    assert best.peak_memory_bytes
    assert original.peak_memory_bytes
    assert _view.factor(result, best, "memory") == pytest.approx(
        original.peak_memory_bytes / best.peak_memory_bytes
    )
    assert _view.factor(result, dataclasses.replace(best, peak_memory_bytes=None), "memory") is None


def test_amounts_have_units() -> None:
    best = dataclasses.replace(samples.met().best, latency_ms=7.66, bytes=22_700_000, peak_memory_bytes=None)
    assert [_view.amount(best, o) for o in ("latency", "size", "memory")] == ["7.66 ms", "22.7 MB", "–"]
