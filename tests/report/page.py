"""Reads a page as a browser would, for the report's tests only."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta"}


@dataclass
class Page(HTMLParser):
    """Every element with its attributes, every piece of text, and what is wrong with the nesting."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if len(dict(attrs)) != len(attrs):
            self.faults.append(f"an attribute twice in {tag}")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack.pop() != tag:
            self.faults.append(f"unexpected end of {tag}")

    def handle_data(self, data: str) -> None:
        self.texts.append((self.stack[-1] if self.stack else "", data))

    def text(self) -> str:
        """All text outside the style sheet, pieces apart by a space, white space made single."""
        return " ".join(" ".join(data for tag, data in self.texts if tag != "style").split())

    def tags(self) -> set[str]:
        """The names of all elements."""
        return {tag for tag, _ in self.elements}

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        """The attributes of the elements that have a class."""
        return [
            attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()
        ]


def read(html: str) -> Page:
    """The page of a piece of HTML; whatever stays open is a fault."""
    page = Page()
    page.feed(html)
    page.close()
    page.faults += [f"{tag} stays open" for tag in page.stack]
    return page
