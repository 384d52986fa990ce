"""Errors of others' code become errors of ours, told once, with all four parts."""

from __future__ import annotations

import pytest

from flyweight.errors import DataError, ModelError, foreign


@pytest.mark.parametrize(
    "error", [ValueError("two\nlines"), SystemExit(3), StopIteration(), AssertionError()]
)
def test_what_others_raise_becomes_ours(error: BaseException) -> None:
    with (
        pytest.raises(DataError) as caught,
        foreign(DataError, "it must work", where="there", way_out="mend it"),
    ):
        raise error
    assert caught.value.__cause__ is error
    assert caught.value.got.startswith(type(error).__name__)
    assert (caught.value.rule, caught.value.where, caught.value.way_out) == (
        "it must work",
        "there",
        "mend it",
    )


def test_parts_are_made_of_the_error_where_they_must_be() -> None:
    parts = foreign(DataError, "r", where=lambda e: f"at {e}", way_out=lambda e: f"no {e}", quoted=str)
    with pytest.raises(DataError) as caught, parts:
        raise ValueError("x")
    assert str(caught.value) == "r, got x (at at x); no x"


def test_ours_pass_and_so_does_an_interrupt() -> None:
    for kind, mine in ((ModelError, ModelError("own")), (KeyboardInterrupt, KeyboardInterrupt())):
        with pytest.raises(kind) as caught, foreign(DataError, "r"):
            raise mine
        assert caught.value is mine


def test_the_same_error_is_told_of_another_place() -> None:
    found = ModelError("rule", got="it", where="here", way_out="out").at("there")
    assert type(found) is ModelError
    assert str(found) == "rule, got it (at there); out"
