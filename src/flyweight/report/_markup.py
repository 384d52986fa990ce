"""HTML out of values that are not trusted: the only place where text becomes markup.

A `str` is text and gets escaped; a `Markup` is markup and does not. Only this module makes a `Markup`, so a name
out of a model file cannot reach the page unescaped. Tag and attribute names are always written in the source.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flyweight.report import _words

VOID = frozenset({"meta"})


@dataclass(frozen=True)
class Markup:
    """A piece of finished, balanced HTML."""

    text: str


def element(tag: str, attributes: Mapping[str, str] | None = None, *children: str | Markup) -> Markup:
    """One element: attribute values and children that are text are escaped."""
    pairs = "".join(f' {name}="{_escape(value)}"' for name, value in (attributes or {}).items())
    return Markup(f"<{tag}{pairs}>" + ("" if tag in VOID else f"{join(children).text}</{tag}>"))


def join(parts: Iterable[str | Markup]) -> Markup:
    """The parts one after the other."""
    return Markup("".join(part.text if isinstance(part, Markup) else _escape(part) for part in parts))


def style(css: str) -> Markup:
    """A style element; the text is the package's own style sheet, which cannot be escaped inside it."""
    return Markup(f"<style>{css}</style>")


def within(parts: Iterable[Markup], budget: int) -> tuple[Markup, int]:
    """As many of the first parts as fit in `budget` bytes of UTF-8, and how many those are."""
    kept: list[Markup] = []
    for part in parts:
        budget -= len(part.text.encode())
        if budget < 0:
            break
        kept.append(part)
    return join(kept), len(kept)


def _escape(text: str) -> str:
    return html.escape(_words.clean(text), quote=True)
