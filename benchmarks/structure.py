"""Quality without training when a part of the multiplications is removed: ours beside Torch-Pruning's criteria.

    .venv-peers-structure/bin/python -m benchmarks.structure [--quick] [--case minilm]   (make peers makes the environment)

Each method takes one share of every group of channels, heads and neurons, set such that the model's multiplications fall
by 10 to 50 %, as counted by PyTorch on the task's first example. The task's own score judges, paired with the original's;
nothing is trained. --quick removes 30 % alone, against three criteria, on fewer samples.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._results import FOLDER, Row, _commit, write
from benchmarks._structure_peers import CRITERIA, RENORMED, pruned
from flyweight import Task
from flyweight.analysis import gram
from flyweight.analysis.sites import analyse
from flyweight.evaluation.quality import Drop, compare, judge
from flyweight.inputs.check import call
from flyweight.records import Batch
from flyweight.runtimes.torch import caller
from flyweight.transforms import Context, _removal, prune

EXAMPLES = Path(__file__).parent.parent / "examples"
CASES = {"fashion_cnn": {}, "efficientnet_lite0": {"ROUNDS": 6}, "minilm": {"SENTENCES": 200}}
"""Task file -> what --quick sets in it."""
SHARES, AIM = (0.1, 0.2, 0.3, 0.4, 0.5), 0.25
"""Of multiplications that go; at 30 %, ours may lose so much of what the best peer loses."""
_SHORT = 0.05
"""A peer that removes so much less than it was asked for does not count."""
_LEAST = 1e-4
"""A drop below this counts as this, so that ratios stay finite."""
Method = Callable[[float], nn.Module]
"""From the share of every group that goes to the model that is left."""


def main() -> None:
    """Measure all cases, or one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", choices=sorted(CASES), help="this case alone, beside what is there")
    asked = parser.parse_args()
    start, cases = time.time(), [asked.case] if asked.case else list(CASES)
    warnings.simplefilter("ignore")
    rows = [row for row in _before(quick=asked.quick) if row.case not in cases]
    for case in cases:
        rows += measured(case, quick=asked.quick)
    write("structure", rows, start, quick=asked.quick)


def _before(*, quick: bool) -> list[Row]:
    """The rows that earlier runs wrote."""
    path = (FOLDER / "quick" if quick else FOLDER) / "structure.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [
        Row(**{name: value for name, value in row.items() if name not in ("ratio", "met")}) for row in rows
    ]


def measured(case: str, *, quick: bool) -> list[Row]:
    """The rows of one case."""
    task = opened(case, CASES[case] if quick else {})
    model, examples = task.model.eval(), task.examples
    original = judge(task.score, caller(model), 0)
    rough, exact = ours(model, examples)
    theirs = {
        name: functools.partial(pruned, name, model, examples)
        for name in (("l2", f"l2{RENORMED}", "random") if quick else (*CRITERIA, f"l2{RENORMED}"))
    }
    rows = []
    for share in SHARES[2:3] if quick else SHARES:
        own, found = (
            nearest(rough, model, examples[0], share),
            nearest(theirs["random"], model, examples[0], share),
        )
        drops = {"flyweight": compare(original, judge(task.score, caller(exact(own)), 0))}
        notes = {"flyweight": f"commit {_commit()}"}
        for name, method in theirs.items():
            try:
                small = method(found)
                gone = 1 - macs(small, examples[0]) / macs(model, examples[0])
                notes[name] = f"{gone:.1%} gone"
                if gone > share - _SHORT:
                    drops[name] = compare(original, judge(task.score, caller(small), 0))
            except Exception as error:  # a peer may fail in any way; that it did is the figure
                notes[name] = f"failed: {type(error).__name__}: {str(error)[:100]}"
        print(case, share, drops, notes, file=sys.stderr, flush=True)
        rows.append(_row(case, share, drops, notes))
    return rows


def opened(case: str, settings: dict[str, int]) -> Task:
    """The task of an example, some of its numbers set otherwise."""
    sys.path.insert(0, str(EXAMPLES))
    module = importlib.import_module(case)
    for name, value in settings.items():
        setattr(module, name, value)
    task: Task = module.task()
    return task


def ours(model: nn.Module, examples: Sequence[Batch]) -> tuple[Method, Method]:
    """The method `prune` with one ratio for all groups that were proven: its sizes alone, and as it is."""
    found, batch = analyse(model, examples), examples[0]
    paths = [site.name for site in found.sites]
    context = Context(found.statistics, gram.lazily(model, paths, examples), examples=examples)
    groups = prune.groups(model, batch).groups

    def rough(share: float) -> nn.Module:
        kept = {group.name: range(group.units - math.floor(group.units * share)) for group in groups}
        return _removal.removed(model, groups, kept)

    def exact(share: float) -> nn.Module:
        return prune.cut(model, {group.name: prune.Options(ratio=share) for group in groups}, context)

    return rough, exact


def nearest(method: Method, model: nn.Module, batch: Batch, share: float) -> float:
    """The share of every group that must go for a share of the multiplications to go."""
    before = macs(model, batch)
    tried = {0.0: 0.0, 0.95: 1.0}
    for _ in range(8):
        low = max(part for part, gone in tried.items() if gone <= share)
        high = min(part for part, gone in tried.items() if part > low)
        middle = (low + high) / 2
        tried[middle] = 1 - macs(method(middle), batch) / before
    return min(tried, key=lambda part: abs(tried[part] - share))


def macs(model: nn.Module, batch: Batch) -> int:
    """Multiplications of one call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(model, batch)
    return int(counter.get_total_flops()) // 2


def _row(case: str, share: float, drops: Mapping[str, Drop], notes: dict[str, str]) -> Row:
    own = drops["flyweight"]
    return Row(
        case=case,
        metric=f"drop at {share:.0%} of multiplications gone",
        unit="share of the score",
        better="lower",
        ours=max(own.value, _LEAST),
        ours_interval=(own.value - own.half, own.value + own.half),
        peers={
            name: max(drops[name].value, _LEAST) if name in drops else None
            for name in notes
            if name != "flyweight"
        },
        aim=AIM if share == SHARES[2] else None,
        notes=notes,
    )


def table(document: dict[str, Any]) -> str:
    """The drops as a table."""
    names = list(dict.fromkeys(name for row in document["rows"] for name in row["peers"]))
    head = ["model", "multiplications gone", "flyweight", *names]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in document["rows"]:
        drops = [row["ours"], *(row["peers"].get(name) for name in names)]
        cells = ["failed" if drop is None else f"{drop:.2%}" for drop in drops]
        lines.append(f"| {row['case']} | {row['metric'].split()[2]} | {' | '.join(cells)} |")
    said = f"by `python -m benchmarks.structure` with Torch-Pruning {document['versions']['torch-pruning']}"
    return "\n".join(lines) + f"\n\nRelative drops of the task's score, at least 0.01 %, {said}.\n"


if __name__ == "__main__":
    main()
