"""What every command needs first: the task checked, its model analysed, a bench to measure on."""

from __future__ import annotations

import functools
import importlib.metadata
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from flyweight import discover, transforms
from flyweight.analysis import fisher, gram, lookups
from flyweight.analysis.machine import cores
from flyweight.analysis.sites import Analysis, analyse
from flyweight.analysis.trace import trace
from flyweight.artifact.format import check_replaceable
from flyweight.errors import MachineError, UsageError
from flyweight.evaluation.bench import Bench
from flyweight.evaluation.timing import fastest_threads
from flyweight.inputs.check import check, digest, run
from flyweight.records import JSON, Goal, Plan, Step, Task
from flyweight.report.progress import Progress
from flyweight.runtimes._export import names, tensors

FISHER = 16
"""Examples from which it is learned how much each channel counts: a backward pass each."""
PACKAGES = (
    "flyweight",
    "torch",
    "numpy",
    "safetensors",
    "onnx",
    "onnxruntime",
    "openvino",
    "xllamacpp",
)


@dataclass(frozen=True)
class Session:
    """A task that was taken in and analysed."""

    task: Task
    """With a copy of the model in eval mode."""
    analysis: Analysis
    """Of the model with its batch norms folded."""
    folds: tuple[Step, ...]
    bench: Bench
    notes: tuple[str, ...]
    model_digest: str
    examples_digest: str

    def completed(self, plan: Plan) -> tuple[Plan, list[str]]:
        """A plan with what its structural steps decide and the folds that its steps need, and a note on those."""
        plan = transforms.complete(self.task.model, plan, self.bench.context)
        changed = {step.site for step in plan.steps if step.method not in transforms.EXACT}
        folded = {step.site for step in plan.steps if step.method in transforms.EXACT}
        added = [fold for fold in self.folds if fold.site in changed and fold.site not in folded]
        note = f"{len(added)} batch norms were folded into convolutions that the recipe quantizes"
        return Plan((*added, *plan.steps)), [note] if added else []


@contextmanager
def begin(task: Task, goal: Goal, progress: Progress) -> Iterator[Session]:
    """Check and analyse a task; the caller's random states come back in the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    torch.manual_seed(goal.seed)
    folder = Path(tempfile.mkdtemp(prefix="flyweight-"))
    try:
        yield _analysed(task, goal, progress, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def runtimes(wanted: str) -> tuple[list[str], list[str]]:
    """The runtimes to try, and a note on each that is missing; a named one that cannot run raises MachineError."""
    known = discover.methods("runtimes")
    if wanted != "auto":
        reason = discover.method("runtimes", wanted).available()
        if reason:
            raise MachineError(f"the runtime {wanted} must be installed", got=reason)
        return [wanted], []
    tried = {name: module for name, module in known.items() if not hasattr(module, "ONLY_NAMED")}
    missing = {name: module.available() for name, module in tried.items()}
    able = [name for name, reason in missing.items() if reason is None]
    return able, [f"{name} was not tried: {reason}" for name, reason in missing.items() if reason]


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def identity(session: Session, goal: Goal) -> Mapping[str, JSON]:
    """What a study belongs to: another model, examples, goal or version is another study."""
    kept = {name: value for name, value in goal.to_json().items() if name != "within"}
    return {
        "task": session.task.name,
        "model": session.model_digest,
        "examples": session.examples_digest,
        "goal": kept,
        "flyweight": versions().get("flyweight", ""),
    }


def check_output(out: Path, *, resume: bool, force: bool) -> None:
    """Raise UsageError when the folder holds another run's files, MachineError when it cannot be written."""
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise UsageError(
            "the output must be a folder", got=f"the file {out}", where="-o", way_out="name another one"
        )
    taken = [name for name in ("study.db", "result.json", "best") if (out / name).exists()]
    if taken and not (resume or force):
        raise UsageError(
            "the output folder must not hold another run",
            got=", ".join(taken),
            where=str(out),
            way_out="--resume goes on with it, --force starts anew, -o names another folder",
        )
    if "best" in taken:
        check_replaceable(out / "best")
    if force and not resume:
        for name in ("study.db", "study.db-wal", "study.db-shm"):
            (out / name).unlink(missing_ok=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        got, way_out = error.strerror or "", "give a folder that you may write with -o"
        raise MachineError(
            "the output folder must be writable", got=got, where=str(out), way_out=way_out
        ) from error


def _analysed(task: Task, goal: Goal, progress: Progress, folder: Path) -> Session:
    progress.stage("analysing the model", 3)
    progress.step("checking the task")
    task, notes = check(task)
    model_digest = digest(task.model.state_dict())
    threads = fastest_threads(functools.partial(run, task.model, task.examples[0]), cores())
    if threads < cores():
        notes = (
            *notes,
            f"PyTorch runs the original faster with {threads} thread than with {cores()}; it is timed so",
        )
    progress.done(
        f"{sum(p.numel() for p in task.model.parameters()):,} parameters, {len(task.examples)} examples"
    )
    progress.step("tracing")
    traced = trace(task.model, task.examples[0])
    folds = tuple(Step("fold_batch_norm", conv, {"norm": norm}) for conv, norm in traced.norms.items())
    progress.done(f"{len(folds)} batch norms can be folded")
    progress.step("collecting statistics")
    plain = [transforms.plain_site(task.model, fold.site) for fold in folds]
    folded = transforms.apply(task.model, Plan(folds), plain, transforms.Context())
    analysis = analyse(folded, task.examples, goal.seed)
    progress.done(
        f"{len(analysis.sites)} layers can be changed, {analysis.macs / 1e6:,.0f} M multiplications a prediction"
    )
    said = (
        *notes,
        *([f"batch norms stay as they are: {traced.reason}"] if traced.reason else []),
        *analysis.notes,
        *_remarks(folded, analysis),
    )
    bench = Bench(task, goal, analysis.sites, _context(folded, analysis, task, goal.seed), folder, threads)
    return Session(task, analysis, folds, bench, said, model_digest, _examples_digest(task))


def _context(model: nn.Module, analysis: Analysis, task: Task, seed: int) -> transforms.Context:
    """What is known of the sites of a model with folded batch norms; what costs passes is collected when it is asked for."""
    paths = [site.name for site in analysis.sites]
    grams = gram.lazily(model, paths, task.examples)
    rows = fisher.lazily(model, paths, task.examples[:FISHER], seed=seed)
    looked_up = [site.name for site in analysis.sites if site.kind == "embedding"]
    tables = lookups.lazily(model, looked_up, task.examples, seed=seed)

    def gram_of(site: str) -> torch.Tensor | None:
        table = tables(site)
        return grams(site) if table is None else table.gram

    def rows_of(site: str) -> torch.Tensor | None:
        table = tables(site)
        return rows(site) if table is None else table.counts

    return transforms.Context(analysis.statistics, gram_of, rows=rows_of, examples=task.examples)


def _remarks(model: nn.Module, analysis: Analysis) -> list[str]:
    """Notes on layers that are not treated as the others are."""
    quantized = sum(isinstance(module, transforms.QuantizedLayer) for module in model.modules())
    found = [f"{quantized} layers are quantized already and stay as they are"] if quantized else []
    for name, seen in analysis.statistics.items():
        found += (
            [f"{name} runs {seen.calls} times in one pass; it is changed as one layer"]
            if seen.calls > 1
            else []
        )
    if not analysis.sites:
        kinds = sorted(
            {type(m).__name__ for m in model.modules() if next(m.parameters(recurse=False), None) is not None}
        )
        rule = "no layer can be changed: linear layers, convolutions and embeddings can be"
        found.append(f"{rule}, and this model's parameters are in {', '.join(kinds) or 'none of them'}")
    return found


def _examples_digest(task: Task) -> str:
    return digest(
        {
            f"{index} {name}": tensor
            for index, batch in enumerate(task.examples)
            for name, tensor in zip(names(batch), tensors(batch), strict=True)
        }
    )
