"""The stages by themselves, as the command line offers them; each returns the text to print, at most 80 columns wide."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from flyweight import discover, transforms
from flyweight import session as sessions
from flyweight.analysis.machine import machine
from flyweight.artifact import export as exporting
from flyweight.artifact import format as spec
from flyweight.artifact.atomic import atomic_write_text
from flyweight.artifact.load import load_module, load_predictor
from flyweight.errors import ArtifactError, DataError, UsageError, foreign
from flyweight.evaluation import timing
from flyweight.evaluation.bench import Bench, Survey
from flyweight.evaluation.language import further
from flyweight.evaluation.quality import Scores, compare, judge
from flyweight.inputs.check import check, digest
from flyweight.optimize import SLOW_RUNTIMES
from flyweight.packing import how_to_load, write
from flyweight.planning.candidates import families, uniform
from flyweight.planning.family import Family
from flyweight.records import Goal, Interval, Plan, Predict, Result, Site, Step, Task
from flyweight.report import html
from flyweight.report.progress import Progress
from flyweight.runtimes.torch import caller
from flyweight.session import Session

WIDTH = 80


def profile(task: Task, goal: Goal) -> str:
    """The model's layers with bytes and arithmetic, and its latency on each runtime."""
    names, missing = sessions.runtimes(goal.runtime)
    with _begun(task, goal) as session:
        found = session.analysis
        lines = [
            f"{task.name}: {found.bytes / 1e6:,.1f} MB, {found.macs / 1e6:,.1f} M multiplications a prediction",
            "",
        ]
        lines += _layer_table(found.sites, found.bytes, found.macs)
        lines += ["", *_survey_table(session.bench, [(Family("float32"), names)], session)]
        return "\n".join([*lines, *_said([*missing, *session.notes])])


def dry_run(task: Task, goal: Goal, recipe: Plan | None = None) -> str:
    """What `optimize` would try, and about how long it takes; raises UsageError when the recipe does not fit the model."""
    names, missing = sessions.runtimes(goal.runtime)
    with _begun(task, goal) as session:
        model = session.bench.build(Plan(session.folds))
        runtimes = [n for n in names if n not in SLOW_RUNTIMES] or names
        ways = families(model, session.analysis.sites, goal, session.bench.context, runtimes)
        if recipe is not None:
            session.bench.build(session.completed(recipe)[0])
            ways = [Family("the recipe", {step.site: step for step in recipe.steps})]
        candidates, reasons = uniform(ways, runtimes)
        session.bench.score_original()
        once = session.bench.measuring
    lines = [f"{task.name}: one score takes {once:.1f} s; {len(candidates)} candidates would be timed:", ""]
    lines += [f"  {c.name} on {c.runtime}" for c in candidates]
    about = len(candidates) * 5 + 8 * (once + 6)
    lines += [
        "",
        f"then the promising ones scored: about {about / 60:.0f} min, at most {goal.within / 60:.0f} min",
    ]
    return "\n".join([*lines, *_said([*missing, *reasons, *session.notes])])


def apply(task: Task, recipe: Plan, goal: Goal, out: Path, *, force: bool = False) -> str:
    """Apply a plan without searching, and write the artifact to `out`/best.

    With the runtime "auto" the fastest runtime is taken. Raises UsageError when the plan does not fit the model.
    """
    sessions.check_output(out, resume=False, force=force)
    names, missing = sessions.runtimes(goal.runtime)
    with _begun(task, goal) as session:
        plan, added = session.completed(recipe)
        transforms.check(session.task.model, plan, session.analysis.sites)
        fit = [
            n
            for n in names
            if goal.runtime != "auto" or (not _refused(n, plan.steps) and n not in SLOW_RUNTIMES)
        ]
        surveys = {name: session.bench.survey(name, plan, 1.0) for name in fit}
        able = {name: survey for name, survey in surveys.items() if not survey.failure}
        if not able:
            raise UsageError(
                "some runtime must run the model", got="; ".join(s.failure for s in surveys.values())
            )
        chosen = max(able, key=lambda name: able[name].speedup)
        total = write(session, chosen, plan, None, out / "best")
        speed = f"{able[chosen].speedup:.2f} x as fast as the original, {session.analysis.bytes / total:.2f} x smaller"
        lines = [
            f"{len(plan.steps)} steps applied; {speed}, on {chosen}",
            f"artifact in {out / 'best'}, {total:,} bytes",
        ]
        lines += ["its quality was not judged: flyweight evaluate does that"]
        own = session.bench.notes[plan.digest()]
        return "\n".join([*lines, *_said([*missing, *added, *own, *session.notes])])


def evaluate(task: Task, artifact: Path | None, seed: int) -> str:
    """The score and latency of the original and, paired with it, of an artifact.

    Raises ArtifactError when the artifact does not take the task's examples.
    """
    task, notes = check(task)
    with _threads():
        batch = task.examples[0]
        scores, run = (
            judge(task.score, caller(task.model), seed),
            functools.partial(caller(task.model), batch),
        )
        lines = [f"{'':<12}{'score':>10}  {'95 % interval':<20}{'latency':>12}"]
        if artifact is None:
            return "\n".join(
                [*lines, _score_line("original", scores, timing.race(run, run).first_ms), *_said(notes)]
            )
        predict, said = _opened(artifact, task)
        race = timing.race(run, functools.partial(predict, batch))
        found = judge(task.score, predict, seed)
        more = further(task.score, caller(task.model), predict)
    drop = compare(scores, found)
    lines += [_score_line("original", scores, race.first_ms), _score_line("artifact", found, race.second_ms)]
    lines += [
        "",
        f"drop {drop.value:.3%}{_between(drop.interval)}, {race.speedup:.2f} x as fast on {said.runtime}",
    ]
    lines += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in more.items()]
    if said.model_digest != digest(task.model.state_dict()):
        notes = (
            *notes,
            "the artifact was made from other weights than the task's model has: the drop is between the two",
        )
    return "\n".join([*lines, *_said(notes)])


def verify(folder: Path) -> str:
    """Check an artifact to its last byte; raises ArtifactError that says what is wrong."""
    found = spec.read(folder)
    said = found.manifest
    lines = [
        f"sound: {folder}, {found.bytes:,} bytes in {len(found.files)} files, {len(found.tensors)} tensors"
    ]
    lines += [f"{said.task} for {said.runtime}, {len(said.plan.steps)} steps; digest {found.digest}"]
    return "\n".join([*lines, *_said(found.notes)])


def export(artifact: Path, folder: Path) -> str:
    """Write the files that other tools of an artifact's runtime take to a new folder."""
    sizes = exporting.export(artifact, folder)
    return "\n".join(f"{folder / name}, {size:,} bytes" for name, size in sizes.items())


def doctor() -> str:
    """What this machine has, and how fast each number format is on it, measured in a few seconds."""
    here = machine()
    found = here["instructions"]
    flags = (", ".join(map(str, found)) if isinstance(found, list) else "") or "no vector flags known"
    memory = int(str(here["memory_bytes"])) / 2**30
    lines = [
        f"{here['processor']}, {here['cores']} cores, {memory:.1f} GiB, {flags}",
        f"python {here['python']}, "
        + ", ".join(f"{name} {version}" for name, version in sessions.versions().items()),
        "",
    ]
    known = discover.methods("runtimes")
    lines += [_fill(f"{name}: {module.available() or 'ready'}") for name, module in known.items()]
    names, _ = sessions.runtimes("auto")
    names = [name for name in names if name not in SLOW_RUNTIMES]
    for title, task in (("linear layers", _linear_task()), ("convolutions", _convolution_task())):
        with _begun(task, Goal()) as session:
            model = session.bench.build(Plan(session.folds))
            ways = families(model, session.analysis.sites, Goal())
            able = [(way, [n for n in names if not _refused(n, way.steps.values())]) for way in ways]
            lines += [
                "",
                f"{title} (speed against eager PyTorch with float32)",
                *_survey_table(session.bench, able, session),
            ]
    return "\n".join(lines)


def write_report(result: Result, folder: Path) -> None:
    """Write a result's report.html to its folder."""
    atomic_write_text(folder / "report.html", html.render(result, how_to_load(result, folder)))


@contextmanager
def _begun(task: Task, goal: Goal) -> Iterator[Session]:
    with Progress(False, goal.within) as told, sessions.begin(task, goal, told) as session:
        yield session


@contextmanager
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(int(str(machine()["cores"])))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _layer_table(sites: Sequence[Site], size: int, macs: int) -> list[str]:
    lines = [f"{'layer':<42}{'kind':<10}{'bytes':>12} {'%':>4}{'%MACs':>7}"]
    for site in sites:
        name = site.name if len(site.name) <= 41 else "..." + site.name[-38:]
        share = 100 * site.macs / macs if macs else 0.0
        lines.append(
            f"{name:<42}{site.kind:<10}{site.bytes:>12,} {100 * site.bytes / size:>4.0f}{share:>7.1f}"
        )
    rest = size - sum(site.bytes for site in sites)
    return [*lines, f"{'everything else':<52}{rest:>12,} {100 * rest / size:>4.0f}"]


def _survey_table(bench: Bench, ways: Sequence[tuple[Family, Sequence[str]]], session: Session) -> list[str]:
    lines = [f"{'format':<36}{'runtime':<14}{'speed':>8}{'latency':>12}{'bytes':>10}"]
    for family, names in ways:
        for runtime in names:
            found = bench.survey(runtime, family.plan(session.folds), 0.6)
            lines.append(f"{family.name:<36}{runtime:<14}{_survey(found)}")
    bench.forget()
    return lines


def _survey(found: Survey) -> str:
    if found.failure:
        return f"  cannot run: {found.failure}"[: WIDTH - 50]
    return f"{found.speedup:>6.2f} x{found.latency_ms:>9.2f} ms{found.bytes / 1e6:>7.2f} MB"


def _opened(folder: Path, task: Task) -> tuple[Predict, spec.Manifest]:
    """The artifact's predictor, which takes the task's first example, and its manifest."""
    said = spec.read(folder).manifest
    predict: Predict
    if discover.method("runtimes", said.runtime).FILE:
        predict = load_predictor(folder)
    else:
        predict = caller(load_module(folder, task.model))
    rule, way_out = "the artifact must take the task's examples", f"it was made for the task {said.task!r}"
    try:
        with foreign(ArtifactError, rule, where=str(folder), way_out=way_out):
            predict(task.examples[0])
    except DataError as error:  # of an input that the artifact does not have
        raise ArtifactError(rule, got=str(error), where=str(folder), way_out=way_out) from error
    return predict, said


def _score_line(name: str, scores: Scores, latency_ms: float) -> str:
    interval = scores.interval()
    within = "-" if interval is None else f"{interval.low:.4f} to {interval.high:.4f}"
    return f"{name:<12}{scores.mean:>10.4f}  {within:<20}{latency_ms:>9.2f} ms"


def _between(interval: Interval | None) -> str:
    return "" if interval is None else f" ({interval.low:.3%} to {interval.high:.3%})"


def _refused(runtime: str, steps: Collection[Step]) -> bool:
    return discover.method("runtimes", runtime).refuse(steps) is not None


def _said(notes: Sequence[str]) -> list[str]:
    return ["", *(_fill(f"note: {note}") for note in dict.fromkeys(notes))] if notes else []


def _fill(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _linear_task() -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512), nn.GELU(), nn.Linear(512, 512)
    )
    return Task(
        name="linear layers", model=model, examples=[torch.randn(128, 512)], score=lambda predict: 1.0
    )


def _convolution_task() -> Task:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 1),
    ]
    model = nn.Sequential(*layers)
    return Task(
        name="convolutions", model=model, examples=[torch.randn(1, 32, 56, 56)], score=lambda predict: 1.0
    )
