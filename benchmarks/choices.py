"""What decided the defaults of number formats: plans with and without a choice, side by side, in docs/quantization.md.

    .venv/bin/python -m benchmarks.choices [TABLE ...]          tables: activations, smooth, rotation, tied, blocks

Errors are those of the PyTorch model that a plan gives, on inputs that did not calibrate; `blocks` is timed on runtimes, in
turn, and wants a calm machine. Each table goes into benchmarks/results/choices.json and between its markers on the page.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import _weight_cases as cases
from benchmarks._results import FOLDER, _commit
from benchmarks._rotated import rotated
from benchmarks.readme import ROOT, _between
from flyweight import Goal, Task, discover, transforms
from flyweight.analysis.machine import cores
from flyweight.evaluation.timing import race
from flyweight.inputs.check import run
from flyweight.inputs.language_model import language_task
from flyweight.records import JSON, Plan, Site, Step
from flyweight.report.progress import Progress
from flyweight.runtimes._structure import leaves
from flyweight.session import Session, begin
from flyweight.transforms import smooth

KEPT = FOLDER / "choices.json"
PAGE = ROOT / "docs" / "quantization.md"
HELD = 4
"""Batches of a task's examples that judge and do not calibrate."""
CALIBRATING, JUDGING = 16, 8
"""Windows of text."""
SECONDS = 4.0
"""For one comparison of two forms' speed."""
Options = Mapping[str, JSON]
Line = tuple[str, ...]


def main() -> None:
    """Measure the tables that are named, or all, and write each as soon as it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    named = parser.parse_args().tables
    unknown = sorted(set(named) - set(TABLES))
    if unknown:
        sys.exit(f"TABLE is one of {', '.join(TABLES)}, got {', '.join(unknown)}")
    torch.set_num_threads(cores())
    for name in named or TABLES:
        head, *lines = list(TABLES[name]())
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        kept[name] = {"commit": _commit(), "head": head, "lines": lines}
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
        PAGE.write_text(_between(PAGE.read_text(), f"choices {name}", markdown(kept[name])))


def markdown(table: Mapping[str, Any]) -> str:
    """A kept table as text."""
    rule = "|---" * len(table["head"]) + "|"
    lines = [f"| {' | '.join(line)} |" for line in (table["head"], *table["lines"])]
    return (
        "\n".join(
            [lines[0], rule, *lines[1:], "", f"`python -m benchmarks.choices`, commit {table['commit']}."]
        )
        + "\n"
    )


def activations() -> Iterator[Line]:
    """Rounded inputs: the range of the weights, one range or one a row, biases kept or corrected."""
    yield (
        "model",
        "method",
        "keep, [-64, 64]",
        "correct, [-64, 64]",
        "keep, full range",
        "correct, full range",
    )
    static, tensor, row = ("static_int8", {}), ("dynamic_int8", {}), ("dynamic_int8", {"per_row": True})
    for name, methods in (
        ("fashion_cnn", (static,)),
        ("efficientnet_lite0", (static,)),
        ("minilm", (static, tensor, row)),
    ):
        with taken_in(name) as (session, error):
            for method, options in methods:
                label = f"{method}, one a row" if options else method
                ways = (
                    {"reduced": reduced, "bias": bias}
                    for reduced in (True, False)
                    for bias in ("keep", "correct")
                )
                found = [error(everywhere(session, method, {**options, **way})) for way in ways]
                yield told(name, label, *(f"{value:.4f}" for value in found))


def smoothing() -> Iterator[Line]:
    """Scales moved between layers: weights in few bits, and rounded inputs, with them and without."""
    yield ("model", "layers", "as it is", "with `smooth`")
    with speaking() as (session, judge):
        linear = [site for site in session.analysis.sites if site.kind == "linear" and not site.tied]
        places = smooth.places(session.task.model, session.task.examples)
        for bits in (4, 3):
            moved = [Step("smooth", place, {"bits": bits, "group": 32}) for place in places]
            for rounding in ("nearest", "error_feedback"):
                options = {
                    "bits": bits,
                    "group": 32,
                    "symmetric": False,
                    "scale": "float16",
                    "rounding": rounding,
                }
                steps = steps_at(linear, "weight_only", options)
                pair = [judge(session.bench.build(Plan((*more, *steps)))) for more in ((), moved)]
                yield told("SmolLM2-135M", f"weights of {bits} bits, {rounding}", *map(nats, pair))
    with taken_in("minilm") as (session, error):
        places = smooth.places(session.task.model, session.task.examples)
        some = [site for site in session.analysis.sites if site.name in places]
        for method in ("static_int8", "dynamic_int8"):
            moved = [Step("smooth", place, {"target": "activations"}) for place in places]
            for label, sites in (
                (f"{method}, those {len(some)}", some),
                (f"{method}, all", session.analysis.sites),
            ):
                steps = able(session, method, {}, sites)
                pair = [error(session.bench.build(Plan((*more, *steps)))) for more in ((), moved)]
                yield told("minilm", label, *(f"{value:.4f}" for value in pair))


def rotation() -> Iterator[Line]:
    """Hidden states turned by a random orthogonal matrix: weights in few bits, with a scale a channel or a group."""
    yield ("weights", "rounding", "as it is", "turned")
    found: list[list[str]] = []
    for change in (None, rotated):
        column = []
        with speaking(change) as (session, judge):
            linear = [s for s in session.analysis.sites if s.kind == "linear" and "lm_head" not in s.name]
            linear = [site for site in linear if not site.tied]
            for bits, group in ((4, None), (4, 32), (3, 32), (2, 32)):
                for rounding in ("nearest", "error_feedback"):
                    options = {"bits": bits, "group": group, "symmetric": False, "scale": "float16"}
                    steps = steps_at(linear, "weight_only", {**options, "rounding": rounding})
                    column.append(nats(judge(session.bench.build(Plan(steps)))))
                    label = f"{bits} bits, " + (f"groups of {group}" if group else "a channel")
                    if change is None:
                        found.append([label, rounding])
        found = [[*line, cell] for line, cell in zip(found, column, strict=True)]
    for line in found:
        yield told(*line)


def tied() -> Iterator[Line]:
    """A weight that is both embedding and head: what it costs in few bits."""
    yield ("code, rounding", "bits in the file", "KL to the original")
    from benchmarks._weight_ours import stored_bytes

    codes: list[tuple[str, dict[str, JSON]]] = [
        (f"integer {bits}, a scale per row", {"bits": bits}) for bits in (8, 6, 5, 4, 3)
    ]
    codes += [
        (f"entropy, step {step}, nearest", {"code": "entropy", "step": step}) for step in (0.125, 0.25, 0.5)
    ]
    filled = {"code": "entropy", "rounding": "waterfilling"}
    codes += [(f"entropy, waterfilling, level {level}", {**filled, "level": level}) for level in (1e-4, 2e-4)]
    with speaking() as (session, judge):
        head = next(site for site in session.analysis.sites if site.tied)
        for label, options in codes:
            model = session.bench.build(Plan((Step("weight_only", head.name, options),)))
            layer: Any = model.get_submodule(head.name)
            bits = 8 * stored_bytes({head.name: layer}) / layer.weight.numel()
            yield told(label, f"{bits:.2f}", nats(judge(model)))


def blocks() -> Iterator[Line]:
    """Layers as wide as a small language model's, by the rows that they meet: how fast each form of their weights is."""
    rows = (1, 8, 32, 128)
    yield ("form", "file, MB", *(f"{count} rows" if count > 1 else "1 row" for count in rows))
    group: dict[str, JSON] = {"group": 32}
    forms: list[tuple[str, str, str, dict[str, JSON]]] = [
        ("ONNX Runtime, floats", "onnxruntime", "", {}),
        ("ONNX Runtime, 4 bits in groups of 32", "onnxruntime", "weight_only", {"bits": 4, **group}),
        ("ONNX Runtime, `block_int8`, 4 bits", "onnxruntime", "block_int8", {"bits": 4, **group}),
        ("ONNX Runtime, `block_int8`, 8 bits", "onnxruntime", "block_int8", {"bits": 8, **group}),
        ("ONNX Runtime, `dynamic_int8`", "onnxruntime", "dynamic_int8", {}),
        ("ONNX Runtime, 8 bits a channel", "onnxruntime", "weight_only", {"bits": 8}),
        ("OpenVINO, floats", "openvino", "", {}),
        ("OpenVINO, 8 bits a channel", "openvino", "weight_only", {"bits": 8}),
        ("OpenVINO, 4 bits in groups of 32", "openvino", "weight_only", {"bits": 4, **group}),
    ]
    torch.manual_seed(0)
    inputs = [torch.randn(count, 576) for count in rows]
    task = Task(
        name="blocks", model=nn.Sequential(*(_Feed() for _ in range(8))), examples=inputs, score=lambda _: 1.0
    )
    with begin(task, Goal(), Progress(False, 0.0)) as session, tempfile.TemporaryDirectory() as folder:
        predictors = []
        for number, (_, runtime, method, options) in enumerate(forms):
            where = Path(folder, str(number))
            where.mkdir()
            model = everywhere(session, method, options) if method else session.task.model
            predictors.append(discover.method("runtimes", runtime).prepare(model, inputs, where))
        for (label, *_), predictor in zip(forms, predictors, strict=True):
            times = [
                race(lambda x=x: predictors[0](x), lambda x=x, fast=predictor: fast(x), SECONDS).speedup  # type: ignore[misc]
                for x in inputs
            ]
            yield told(label, f"{predictor.bytes / 1e6:.1f}", *(f"{value:.2f}" for value in times))


class _Feed(nn.Module):
    """The linear layers of a block of SmolLM2-135M, one after another, with a sum around them."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((576, 576), (576, 192), (192, 576), (576, 1536), (1536, 576))
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x
        for layer in self.layers:
            x = torch.nn.functional.silu(layer(x))
        return x + kept


@contextmanager
def taken_in(name: str) -> Iterator[tuple[Session, Callable[[nn.Module], float]]]:
    """A task of examples/, analysed without its last batches, and the median relative error of a model's output on those."""
    task: Task = cases._example(name).task()
    examples = list(task.examples)
    held = examples[-HELD:]
    with begin(dataclasses.replace(task, examples=examples[:-HELD]), Goal(), Progress(False, 0.0)) as session:
        wanted = [leaves(run(session.task.model, batch)) for batch in held]

        def error(model: nn.Module) -> float:
            found = (leaves(run(model, batch)) for batch in held)
            return statistics.median(_distance(a, b) for a, b in zip(wanted, found, strict=True))

        yield session, error


@contextmanager
def speaking(
    change: Callable[[nn.Module], nn.Module] | None = None,
) -> Iterator[tuple[Session, Callable[[nn.Module], tuple[float, float]]]]:
    """SmolLM2-135M, or what a change makes of it, analysed; and a model's KL to the unchanged one with its standard error."""
    folder = cases._example("smollm2").prepared()
    task = language_task(
        folder / "model",
        folder / "speeches.txt",
        window=cases.WINDOW,
        calibrating=CALIBRATING,
        judging=JUDGING,
    )
    figures = cases.language_judge(task)

    def judge(model: nn.Module) -> tuple[float, float]:
        # decoded once, not at every call
        plain = {
            path: layer
            for path, layer in model.named_modules()
            if isinstance(layer, transforms.QuantizedLayer)
        }
        fast = transforms._copies.view(model, {path: layer.plain() for path, layer in plain.items()})
        found = figures(fast)
        return found["kl"], found["kl_error"]

    taken = dataclasses.replace(task, model=change(task.model)) if change else copy.copy(task)
    with begin(taken, Goal(), Progress(False, 0.0)) as session:
        yield session, judge


def everywhere(session: Session, method: str, options: Options) -> nn.Module:
    """The task's model with a method at every site that takes it."""
    plan, _ = session.completed(Plan(able(session, method, options, session.analysis.sites)))
    return session.bench.build(plan)


def able(session: Session, method: str, options: Options, sites: Sequence[Site]) -> tuple[Step, ...]:
    """A step at each of the sites that the method does not refuse."""
    module = discover.method("transforms", method)
    read = transforms._options.read(module, options, "")
    model = session.task.model
    kept = [site for site in sites if module.refuse(site, read, model.get_submodule(site.name)) is None]
    return steps_at(kept, method, options)


def steps_at(sites: Sequence[Site], method: str, options: Options) -> tuple[Step, ...]:
    """One step at each site."""
    return tuple(Step(method, site.name, options) for site in sites)


def nats(found: tuple[float, float]) -> str:
    """A KL with its standard error."""
    return f"{found[0]:.4f} ± {found[1]:.0e}"


def told(*cells: str) -> Line:
    """A line, said on the terminal too."""
    print(" | ".join(cells), flush=True)
    return cells


def _distance(wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    apart, size = (sum(float(t.double().square().sum()) for t in ts) for ts in (
        [a - b for a, b in zip(wanted, found, strict=True)], wanted,
    ))  # fmt: skip
    return (apart / size) ** 0.5


TABLES: Mapping[str, Callable[[], Iterator[Line]]] = {
    "activations": activations,
    "smooth": smoothing,
    "rotation": rotation,
    "tied": tied,
    "blocks": blocks,
}


if __name__ == "__main__":
    main()
