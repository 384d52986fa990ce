"""How far outputs move when a share of all units goes, without labels; the table in docs/structure.md.

    .venv/bin/python -m benchmarks.removal [CASE ...]     cases: fashion_cnn, efficientnet_lite0, minilm

The same units go in each row, as second-order importance says. Errors are relative ones, on inputs that did not calibrate.
Each case goes into benchmarks/results/removal.json and between the table's markers as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks._results import FOLDER, _commit
from benchmarks.choices import taken_in, told
from benchmarks.readme import ROOT, _between
from flyweight.records import JSON, Plan, Step
from flyweight.session import Session
from flyweight.transforms import prune

KEPT = FOLDER / "removal.json"
PAGE = ROOT / "docs" / "structure.md"
CASES = ("fashion_cnn", "efficientnet_lite0", "minilm")
RATIOS = (0.1, 0.2, 0.3, 0.5)
HEADS = ("model", "units gone", "nothing makes up", "made up for", "and healed")


def main() -> None:
    """Measure the cases that are named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    named = parser.parse_args().cases or CASES
    unknown = sorted(set(named) - set(CASES))
    if unknown:
        sys.exit(f"CASE is one of {', '.join(CASES)}, got {', '.join(unknown)}")
    for case in named:
        with taken_in(case) as (session, error):
            lines = [
                told(
                    case,
                    f"{ratio:.0%}",
                    *(f"{error(session.bench.build(plan)):.3f}" for plan in plans(session, ratio)),
                )
                for ratio in RATIOS
            ]
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        kept[case] = {"commit": _commit(), "lines": lines}
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
        PAGE.write_text(_between(PAGE.read_text(), "removal", markdown(kept)))


def plans(session: Session, ratio: float) -> tuple[Plan, ...]:
    """A share of every group gone: with nothing that makes up for it, with that, and healed too."""
    model, examples = session.task.model, session.task.examples
    steps = tuple(
        Step("prune", group.name, {"ratio": ratio}) for group in prune.groups(model, examples[0]).groups
    )
    plan, _ = session.completed(Plan(steps))
    options: Mapping[str, JSON] = {"compensate": False}
    bare = Plan(tuple(Step(step.method, step.site, {**step.options, **options}) for step in plan.steps))
    return bare, plan, Plan((*plan.steps, Step("heal", "model")))


def markdown(kept: Mapping[str, Any]) -> str:
    """The table."""
    lines = [HEADS, ("---",) * len(HEADS), *(line for case in kept.values() for line in case["lines"])]
    commits = sorted({case["commit"] for case in kept.values()})
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n`python -m benchmarks.removal`, commit {', '.join(commits)}.\n"


if __name__ == "__main__":
    main()
