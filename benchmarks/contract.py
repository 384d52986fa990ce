"""The contract job: as fast as possible at a relative drop of at most 1 %, us and the peers side by side in one process.

    .venv-peers/bin/python -m benchmarks.contract [--quick] [--case minilm]      (make peers makes the environment)

Every model is timed in turn with eager PyTorch on the task's first example, and judged by the task's own score, paired with
the original's. A peer that breaks the bound (its drop itself, not its interval: in the peer's favour) has no speed at
that bound; one that is slower than eager PyTorch is not scored. Ours is what `flyweight optimize` returns, and must be met
by its interval.
"""

from __future__ import annotations

import argparse
import functools
import logging
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks import _int8_peers
from benchmarks._results import Row, write
from flyweight import Goal, Result, load, optimize
from flyweight.analysis.machine import cores
from flyweight.evaluation import timing
from flyweight.evaluation.quality import compare, judge
from flyweight.inputs.check import check
from flyweight.inputs.task_file import read_task
from flyweight.runtimes.torch import caller

EXAMPLES = Path(__file__).parent.parent / "examples"
CASES = {"minilm": 1.4, "efficientnet_lite0": 2.0, "fashion_cnn": 2.0}
"""Task file -> the aim of its speed-up over eager PyTorch."""
BOUND, FILE_AIM, OVERHEAD_AIM = 0.01, 0.27, 0.10


def main() -> None:
    """Measure all cases, or one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less time for the search; writes elsewhere")
    parser.add_argument("--case", choices=sorted(CASES), help="this case alone")
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    given = parser.parse_args()
    start = time.time()
    torch.set_num_threads(cores())
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    details: dict[str, Any] = {}
    for case in [given.case] if given.case else CASES:
        found, details[case] = measure(case, quick=given.quick)
        rows += found
    write("contract", rows, start, quick=given.quick or bool(given.case), extra={"details": details})


def measure(case: str, *, quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one case, and every peer's figures."""
    task, _ = check(read_task(str(EXAMPLES / f"{case}.py")))
    folder = Path(tempfile.mkdtemp(prefix="flyweight-benchmark-"))
    try:
        result = optimize(
            task,
            Goal(max_drop=BOUND, within=120 if quick else 600),
            out=folder / "ours",
            force=True,
            progress=True,
        )
        original = judge(task.score, caller(task.model), 0)
        models: dict[str, Any] = {}
        details: dict[str, Any] = {}
        for peer in _int8_peers.PEERS:
            name = peer.__name__
            print(f"{case}: {name}", file=sys.stderr, flush=True)
            try:
                models[name] = peer(task.model, task.examples, folder)
                details[name] = {"bytes": models[name].bytes}
                if _race(task, models[name], 1.0).speedup > 1:
                    drop = compare(original, judge(task.score, models[name], 0))
                    details[name] |= {"drop": drop.value, "half": drop.half}
            except Exception as error:  # a peer may fail in any way; that it did is the figure
                details[name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
                models.pop(name, None)
        ours = _ours(result, folder / "ours" / "best", task)
        races = {}
        for name, model in {"flyweight": ours, **models}.items():
            races[name] = race = _race(task, model, 4.0 if quick else 10.0)
            details.setdefault(name, {}).update(speedup=race.speedup, interval=_pair(race.speedup_interval))
        details["flyweight"] |= {
            "drop": result.best.drop,
            "bytes": result.best.bytes,
            "verdict": result.verdict,
        }
        details["flyweight"] |= {"evaluations": result.evaluations, "seconds": result.seconds}
        return _rows(case, result, races, details), details
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _ours(result: Result, best: Path, task: Any) -> Any:
    if result.best.runtime in ("onnxruntime", "openvino"):
        return load(best)
    return caller(load(best, task.model))


def _race(task: Any, model: Any, seconds: float) -> timing.Race:
    batch = task.examples[0]
    return timing.race(functools.partial(caller(task.model), batch), functools.partial(model, batch), seconds)


def _rows(case: str, result: Result, races: dict[str, timing.Race], details: dict[str, Any]) -> list[Row]:
    ours = races["flyweight"]
    fast, notes = {}, {}
    for peer in (p.__name__ for p in _int8_peers.PEERS):
        seen = details[peer]
        kept = seen.get("drop", 1.0) <= BOUND
        fast[peer] = races[peer].speedup if kept else None
        if "failed" in seen:
            notes[peer] = "failed"
        elif "drop" not in seen:
            notes[peer] = f"not scored: {races[peer].speedup:.2f} x, slower than eager PyTorch"
        else:
            notes[peer] = f"{'(' if kept else 'breaks the bound: '}drop {seen['drop']:.2%}{')' * kept}"
    notes["flyweight"] = f"(drop {result.best.drop:.2%}, {result.best.name} on {result.best.runtime})"
    interval = _pair(ours.speedup_interval)
    speed = {"unit": "x", "better": "higher", "ours": ours.speedup, "ours_interval": interval}
    size = result.best.bytes / result.baseline.bytes
    overhead = 1 - result.seconds_measuring / result.seconds
    met = float(result.status == "met")
    return [
        Row(case=case, metric="speed-up, eager PyTorch = 1", **speed, aim=CASES[case], reference=1.0),
        Row(case=case, metric="speed-up at <= 1 % drop", **speed, peers=fast, aim=1.0, notes=notes),
        Row(case=case, metric="file / fp32 file", **_lower("ratio", size), aim=FILE_AIM, reference=1.0),
        Row(
            case=case,
            metric="overhead of the search",
            **_lower("share", overhead),
            aim=OVERHEAD_AIM,
            reference=1.0,
        ),
        Row(
            case=case,
            metric="contract met (1 = yes)",
            unit="",
            better="higher",
            ours=met,
            aim=1.0,
            reference=1.0,
        ),
    ]


def _lower(unit: str, ours: float) -> dict[str, Any]:
    return {"unit": unit, "better": "lower", "ours": ours}


def _pair(interval: Any) -> tuple[float, float]:
    return (interval.low, interval.high)


if __name__ == "__main__":
    main()
