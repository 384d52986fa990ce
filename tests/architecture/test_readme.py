"""The tree of files in README.md is the real one, with a purpose beside each name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from architecture.source import ROOT

README = ROOT.parents[1] / "README.md"
TREE = re.compile(r"<!-- tree -->(.*?)<!-- /tree -->", re.DOTALL)
LINE = re.compile(r"^(?P<indent>[\s│├└─|`+\-*]*)(?P<name>[\w./]+)(?P<purpose>.*)$")


def parsed(text: str) -> Iterator[tuple[str, str]]:
    """(path, purpose) of each line of a tree, whatever it is drawn with; a path is relative to the tree's first line."""
    above: list[tuple[int, str]] = []
    for raw in text.splitlines():
        found = LINE.match(raw.rstrip())
        if not found or raw.strip().startswith("```"):
            continue
        depth, name = len(found["indent"]), found["name"].rstrip("/")
        above = [(at, part) for at, part in above if at < depth]
        above.append((depth, name))
        yield "/".join(part for _, part in above[1:]), found["purpose"].strip(" \t#-—:")


def real() -> set[str]:
    """Every folder and module that is not private."""
    paths = {path.relative_to(ROOT) for path in ROOT.rglob("*.py")}
    paths |= {path.parent for path in paths if path.parent != Path()}
    return {str(path) for path in paths if not any(part.startswith("_") for part in path.parts)}


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    found = TREE.search(README.read_text())
    assert found, "README.md has no tree between <!-- tree --> and <!-- /tree -->"
    return {path: purpose for path, purpose in parsed(found[1]) if path}


def test_every_file_is_in_the_readme(told: dict[str, str]) -> None:
    assert real() - told.keys() == set()


def test_every_file_in_the_readme_is_there(told: dict[str, str]) -> None:
    assert [path for path in told if not (ROOT / path).exists()] == []


def test_every_file_in_the_readme_has_a_purpose(told: dict[str, str]) -> None:
    assert [path for path, purpose in told.items() if len(purpose) < 8] == []


@pytest.mark.parametrize(
    "tree",
    [
        "```\nsrc/flyweight/\n├── cli.py        one command\n└── search/       try many\n    └── study.py  the memory\n```",
        "    src/flyweight/\n      cli.py        one command\n      search/       try many\n        study.py    the memory",
        "flyweight\n|-- cli.py  # one command\n`-- search/  # try many\n    `-- study.py  # the memory",
    ],
)
def test_trees_of_any_drawing_are_read(tree: str) -> None:
    assert dict(parsed(tree)) | {"": ""} == {
        "": "", "cli.py": "one command", "search": "try many", "search/study.py": "the memory",
    }  # fmt: skip
