"""Quality without one to four layers, chosen by how they are missed and made up for, or by block influence alone.

    .venv/bin/python -m benchmarks.depth [minilm] [smollm2] [--quick]

minilm: the search of examples/minilm.py, its mean of 1 / rank. smollm2: the right next token's probability, the geometric
mean of each window (1 / perplexity), its weights taken off their 4-bit grid (examples/smollm2.py). Nothing is trained.
The table goes into benchmarks/results/depth.json and between its markers in docs/structure.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from benchmarks._results import FOLDER, _commit
from benchmarks.readme import ROOT, _between
from flyweight import Plan, Task, transforms
from flyweight.analysis.influence import answers_of, damage
from flyweight.inputs.check import run
from flyweight.inputs.language_model import language_task
from flyweight.transforms import Context, drop

sys.path.insert(0, str(ROOT / "examples"))
FILE, PAGE = FOLDER / "depth.json", ROOT / "docs" / "structure.md"
WAYS = {
    "missed least, made up for": ("damage", True),
    "missed least": ("damage", False),
    "block influence (ShortGPT)": ("influence", False),
}
MOST = 4
WINDOW, WINDOWS, JUDGING = 256, 16, 12
"""Tokens of a window; windows of text that are learned from or held out; those that judge."""
CALIBRATING, HELD = 8, 2
"""Examples that are learned from, at most, and those after them on which outputs are compared."""
SENTENCES = 150
"""Sentences that are searched."""


def main() -> None:
    """Measure the cases that are named, or all, and write the table as soon as one is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help=", ".join(CASES))
    parser.add_argument(
        "--quick", action="store_true", help="one layer, a quarter of the judging; nothing is written"
    )
    asked = parser.parse_args()
    for name in asked.cases or CASES:
        start = time.time()
        found = measured(name, quick=asked.quick)
        found |= {"seconds": round(time.time() - start), "commit": _commit()}
        if not asked.quick:
            known = json.loads(FILE.read_text()) if FILE.exists() else {}
            FILE.write_text(json.dumps({**known, name: found}, indent=1) + "\n")
            PAGE.write_text(_between(PAGE.read_text(), "depth", table(json.loads(FILE.read_text()))))


def measured(name: str, *, quick: bool) -> dict[str, Any]:
    """The quality of the original, and by way the quality and the layers gone, for each number of layers."""
    task = CASES[name](4 if quick else 1)
    learned = min(CALIBRATING, len(task.examples) - HELD)
    context, held = Context(examples=task.examples[:learned]), task.examples[learned:][:HELD]
    wanted = answers_of(task.model, held)
    found: dict[str, Any] = {"original": quality(task, task.model)}
    print(name, found, flush=True)
    plans = {
        by: drop.plan(task.model, context.examples, 1 if quick else MOST, by=by)
        for by in dict.fromkeys(by for by, _ in WAYS.values())
    }
    for label, (by, compensate) in WAYS.items():
        steps = [
            step if compensate else dataclasses.replace(step, options={**step.options, "compensate": False})
            for step in plans[by].steps
        ]
        found[label] = []
        for count in range(1, len(steps) + 1):
            small = transforms.apply(task.model, Plan(tuple(steps[:count])), [], context)
            row = {"quality": quality(task, small), "change": damage(wanted, answers_of(small, held))}
            found[label].append({"layers": [one.site for one in steps[:count]], **row})
            print(name, label, found[label][-1], flush=True)
    return found


def quality(task: Task, model: nn.Module) -> float:
    """The mean of the task's score; higher is better."""
    values = task.score(lambda batch: run(model, batch))
    return statistics.fmean(values) if isinstance(values, Sequence) else float(values)


def table(document: dict[str, Any]) -> str:
    """Quality as a share of the original's, and the change of the output, by case, way and number of layers gone."""
    lines = ["| model | layers chosen by | 1 gone | 2 gone | 3 gone | 4 gone |", "|---|---|---|---|---|---|"]
    for name, found in document.items():
        for label in WAYS:
            cells = [
                f"{row['quality'] / found['original']:.1%} ({row['change']:.3f})" for row in found[label]
            ]
            lines.append(f"| {name} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def minilm(part: int) -> Task:
    """The sentence encoder with 1 / part of the sentences."""
    import minilm as example

    example.SENTENCES = SENTENCES // part
    return example.task()


def smollm2(part: int) -> Task:
    """The language model with 1 / part of the windows that judge."""
    import smollm2 as example

    folder = example.prepared()
    return language_task(
        folder / "model",
        folder / "speeches.txt",
        window=WINDOW,
        calibrating=WINDOWS,
        judging=max(JUDGING // part, 8),
    )


CASES: dict[str, Callable[[int], Task]] = {"minilm": minilm, "smollm2": smollm2}

if __name__ == "__main__":
    main()
