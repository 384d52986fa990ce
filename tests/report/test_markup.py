from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
from report import hostile, page

from flyweight.report import _words
from flyweight.report._markup import Markup, element, join, within


@hypothesis.given(st.text(alphabet=st.characters(), max_size=80))
def test_any_text_comes_back_as_the_text_it_was(text: str) -> None:
    read = page.read(element("p", {"title": text}, text).text)
    assert read.faults == []
    assert [tag for tag, _ in read.elements] == ["p"]
    assert read.elements[0][1]["title"] == _words.clean(text)
    assert "".join(data for _, data in read.texts) == _words.clean(text)


@pytest.mark.parametrize("text", hostile.STRINGS)
def test_no_hostile_string_makes_an_element_or_attribute(text: str) -> None:
    read = page.read(element("p", {"title": text}, text, element("b", {}, text)).text)
    assert [(tag, list(attributes)) for tag, attributes in read.elements] == [("p", ["title"]), ("b", [])]


def test_markup_is_not_escaped_twice() -> None:
    assert element("p", None, element("b", {}, "a & b")).text == "<p><b>a &amp; b</b></p>"


def test_meta_has_no_end() -> None:
    assert element("meta", {"charset": "utf-8"}).text == '<meta charset="utf-8">'


def test_join_escapes_texts_only() -> None:
    assert join(("<", Markup("<i></i>"))) == Markup("&lt;<i></i>")


def test_within_keeps_the_first_parts_that_fit() -> None:
    parts = [element("p", {}, "ä" * 10)] * 5  # 7 + 20 bytes each
    assert within(parts, 54) == (join(parts[:2]), 2)
    assert within(parts, 53) == (join(parts[:1]), 1)
    assert within(parts, 1000)[1] == 5
    assert within([], 0) == (Markup(""), 0)
