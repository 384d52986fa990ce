"""Which models can be made narrower: `python -m benchmarks.coverage [--quick] [--again] [NAME ...]`.

Each of the small models of `benchmarks._coverage_models` is traced and loses 10, 30 and 50 % of the units of every group
by magnitude. What is left must compute what the original does with those units silenced, take a step of training, be
exported by torch.export, and at 30 % also to ONNX, where ONNX Runtime must give what PyTorch gives. Results are kept case by
case and only missing ones are measured; --again measures anew. --quick cuts once, by 30 %.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks._coverage_models import cases
from benchmarks._results import FOLDER, _commit
from flyweight.analysis.answers import floats_of
from flyweight.analysis.coupling import Coupling, couple
from flyweight.analysis.importance import local
from flyweight.errors import FlyweightError, foreign
from flyweight.inputs.check import arguments, call
from flyweight.records import Batch
from flyweight.runtimes import onnxruntime
from flyweight.transforms import Context
from flyweight.transforms._removal import proven, refuted, removed

SHARES = (0.1, 0.3, 0.5)
Record = dict[str, Any]


def main() -> None:
    """Measure what is missing and write it down case by case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="cases; all where none is named")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true")
    asked = parser.parse_args()
    path = (FOLDER / "quick" if asked.quick else FOLDER) / "coverage.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found: Record = json.loads(path.read_text())["cases"] if path.exists() else {}
    for name, build in cases().items():
        if (asked.names and name not in asked.names) or (name in found and not asked.again):
            continue
        start = time.time()
        found[name] = measured(*build(), SHARES[1:2] if asked.quick else SHARES) | {"commit": _commit()}
        print(f"{name}: {time.time() - start:.0f} s\n{row(name, found[name])}", flush=True)
        document = {"name": "coverage", "versions": versions(), "cases": found}
        path.write_text(json.dumps(document, indent=1) + "\n")


def versions() -> dict[str, str]:
    """What the results depend on."""
    import onnxruntime as runtime
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": runtime.__version__,
    }


def measured(model: nn.Module, batch: Batch, shares: tuple[float, ...]) -> Record:
    """What one model, in eval mode, can lose, and what becomes of it."""
    start = time.perf_counter()
    traced = couple(model, batch)
    seconds = time.perf_counter() - start
    if traced.reason:
        return {"reason": traced.reason}
    coupling = proven(model, traced, batch)
    refused = {group.name for group in traced.groups} - {group.name for group in coupling.groups}
    return {
        "seconds": round(seconds, 2),
        "kinds": dict(Counter(group.kind for group in coupling.groups)),
        "share": round(share(model, coupling), 4),
        "refused": {name: coupling.fixed[name] for name in sorted(refused)},
        "unknown": sorted(coupling.unknown),
        "cuts": {str(part): cut(model, coupling, batch, part) for part in shares if coupling.groups},
    }


def share(model: nn.Module, coupling: Coupling) -> float:
    """The share of the parameters' entries that belong to a unit of any group."""
    free: dict[str, dict[int, Any]] = {}
    for group in coupling.groups:
        for place in group.places:
            if place.axis is not None:
                here = free.setdefault(place.name, {}).setdefault(place.axis, np.zeros(place.size, bool))
                here[place.indices(range(group.units))] = True
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
    held = sum(
        size * math.prod(1 - float(axis.mean()) for axis in free.get(name, {}).values())
        for name, size in sizes.items()
    )
    return 1 - held / max(sum(sizes.values()), 1)


def cut(model: nn.Module, coupling: Coupling, batch: Batch, part: float) -> Record:
    """A share of the units of every group taken out: the share of the parameters that is left, and what fails, and why."""
    kept, nothing = {}, Context()
    for group in coupling.groups:
        scores = local("magnitude", model, group, nothing.gram, nothing.rows, 0)
        many = group.units - math.floor(group.units * part)
        kept[group.name] = sorted(scores.argsort(descending=True, stable=True)[:many].tolist())
    small = removed(model, coupling.groups, kept).eval()
    reason = tried(lambda: refuted(model, coupling.groups, kept, batch))
    fails = {"computes": reason} if reason else {}
    for name, check in (("trains", trains), ("torch.export", exports), ("ONNX Runtime", runs_elsewhere)):
        if name == "ONNX Runtime" and part != SHARES[1]:
            continue
        if reason := tried(functools.partial(check, small, batch)):
            too = tried(functools.partial(check, model, batch))
            fails[name] = f"nor the original: {reason}" if too else reason
    before, after = (sum(p.numel() for p in one.parameters()) for one in (model, small))
    return {"left": round(after / max(before, 1), 4), "fails": fails}


def tried(check: Callable[[], str]) -> str:
    """What a check says, or what it raises, in short."""
    try:
        with foreign(FlyweightError, "it must run"):
            return check()
    except FlyweightError as error:
        return (error.got or str(error))[:200]


def trains(model: nn.Module, batch: Batch) -> str:
    """Why a step of training does not work, or nothing."""
    small = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-3)
    loss = sum(one.float().square().mean() for one in floats_of(call(small, batch)))
    torch.as_tensor(loss).backward()
    optimizer.step()
    sound = all(bool(torch.isfinite(p).all()) for p in small.parameters())
    return "" if sound else "a parameter is not finite behind a step"


def exports(model: nn.Module, batch: Batch) -> str:
    """Why torch.export does not give a program of the same answer, or nothing."""
    args, kwargs = arguments(batch)
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, strict=False).module()
        pairs = zip(floats_of(program(*args, **kwargs)), floats_of(call(model, batch)), strict=True)
        return "" if all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs) else "another answer"


def runs_elsewhere(model: nn.Module, batch: Batch) -> str:
    """Why ONNX Runtime does not give PyTorch's answer, or nothing."""
    with tempfile.TemporaryDirectory(prefix="flyweight-") as folder, torch.no_grad():
        predict = onnxruntime.prepare(model, [batch], Path(folder))
        found, wanted = (floats_of(one) for one in (predict(batch), call(model, batch)))
    far = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))
    return "" if far < 1e-3 else f"{far:.2g} of the largest entry from PyTorch's answer"


def row(name: str, record: Record) -> str:
    """A case as a row of the table."""
    if "reason" in record:
        return f"| {name} | not traced: {cell(record['reason'])} | | | | |"
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(record["kinds"].items())) or "none"
    cells = []
    for part in map(str, SHARES):
        done = record["cuts"].get(part)
        fails = [f"{check}: {cell(reason)}" for check, reason in (done or {"fails": {}})["fails"].items()]
        cells.append("" if done is None else f"{done['left']:.2f}" + "".join(f"; not {one}" for one in fails))
    return f"| {name} | {kinds} | {record['share']:.0%} | {' | '.join(cells)} |"


def cell(text: str) -> str:
    """A text for a table, short and without its path to the installed package."""
    text = text.replace("|", "/").replace("\n", " ")
    head, _, tail = text.partition("(at ")
    return f"{head[:90].strip()} (at {tail.rpartition('/')[2]}" if tail else text[:90]


def table(document: Record) -> str:
    """The table of all cases."""
    head = "| model | groups | parameters in them | left at 10 % | at 30 % | at 50 % |\n|---|---|---|---|---|---|\n"
    rows = "".join(row(name, record) + "\n" for name, record in document["cases"].items())
    said = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return head + rows + f"\nWritten by `python -m benchmarks.coverage` with {said}.\n"


if __name__ == "__main__":
    main()
