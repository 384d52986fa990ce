"""Writes the figures that the tests collected into docs/promises.md: `make test`, then `python -m benchmarks.promises`.

The tests append to build/figures.jsonl; the last line of each test counts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "promises.md"
MOST = 6
"""Figures shown for one promise; the others are counted."""


def main() -> None:
    """Replace the table between the page's markers."""
    promises = dict(re.findall(r"^(\d+)\. \*(.+?)\*", PAGE.read_text(), flags=re.MULTILINE))
    found: dict[int, dict[str, tuple[str, str]]] = {}
    for line in (ROOT / "build" / "figures.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["promise"], {})[entry["test"]] = (entry["text"], entry["test"])
    lines = ["| promise | figure | test |", "|---|---|---|"]
    for number in sorted(found):
        kept = list(found[number].values())
        for index, (text, test) in enumerate(kept[:MOST]):
            title = f"{number}. {promises.get(str(number), '')}" if index == 0 else ""
            file, _, name = test.partition("::")
            lines.append(f"| {title} | {_cell(text)} | [{_cell(name)}](../{file}) |")
        if len(kept) > MOST:
            lines.append(f"| | and {len(kept) - MOST} more figures of this kind | |")
    table = "\n".join(lines) + "\n"
    text = re.sub(
        r"(<!-- figures -->\n).*?(<!-- /figures -->)",
        lambda m: m[1] + table + m[2],
        PAGE.read_text(),
        flags=re.DOTALL,
    )
    PAGE.write_text(text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
