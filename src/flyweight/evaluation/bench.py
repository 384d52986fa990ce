"""Measures candidates against the original: builds them, times them in turn, scores what the runtime really outputs."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn

from flyweight import discover, transforms
from flyweight.errors import DataError, FlyweightError, ModelError, foreign
from flyweight.evaluation import memory, timing
from flyweight.evaluation.quality import Drop, Scores, compare, judge
from flyweight.inputs.check import run
from flyweight.records import Batch, Goal, Interval, Measured, Plan, Predict, Record, Site, Task, Trial
from flyweight.runtimes import _structure
from flyweight.runtimes._files import Predictor
from flyweight.runtimes.torch import caller

KEEP = 2**29
"""Bytes of prepared candidates' files up to which they are kept for the measurement that follows their survey."""
STRUCTURAL = frozenset(transforms.EXACT)
"""Methods that keep the function the model computes."""
SAME = 1e-3
"""Relative squared difference up to which a runtime's output counts as the model's own."""


@dataclass(frozen=True, kw_only=True)
class Survey(Record):
    """What is cheap to know of a candidate: how fast and how large it is."""

    speedup: float
    speedup_high: float
    """Upper end of its 95 % interval."""
    latency_ms: float
    bytes: int
    memory: int | None = None
    """Peak memory; only where the goal is memory."""
    strays: float = 0.0
    """How far the model's outputs are from the original's on the first example, as a share of their squares."""
    failure: str = ""
    """Why it cannot run; the figures mean nothing then."""


@dataclass
class Built:
    """A plan's model, and what it outputs."""

    plan: Plan
    model: nn.Module
    batch: Batch

    @functools.cached_property
    def output(self) -> object:
        """The model's output on the batch, in PyTorch."""
        return run(self.model, self.batch)


@dataclass
class Bench:
    """One task's measuring place; `measuring`: seconds spent in the task's score, in timing and in weighing memory."""

    task: Task
    goal: Goal
    sites: Sequence[Site]
    context: transforms.Context
    folder: Path
    """Where candidates' files live while they are measured."""
    threads: int = 1
    """PyTorch's while it is timed and scored. All else runs on as many as the caller has, not on what timing finds: sums on
    other numbers of threads round otherwise, and integers with them."""
    original: Scores | None = None
    evaluations: int = 0
    measuring: float = 0.0
    notes: dict[str, list[str]] = field(default_factory=dict)
    """By a built plan's digest: what its methods had to say."""
    _kept: dict[str, tuple[Built, Predictor]] = field(default_factory=dict)
    _built: Built | None = None
    """The last plan's: the next candidate is often the same plan on another runtime."""

    def score_original(self) -> Scores:
        """The task's score of the original in eager PyTorch.

        Raises DataError when it is 0, which no drop is relative to, ModelError when the model's output holds no tensor.
        """
        if not _structure.leaves(self._original(self.task.examples[0])):
            way_out = "return a tensor, or a dict of them"
            raise ModelError("the model's output must hold a tensor", got="none", way_out=way_out)
        found = self._judge(self._original)
        if found.mean == 0:
            way_out = "shift or scale the score, so that the original's is not 0"
            raise DataError(
                "the original's score must not be 0", got="0", where="Task.score", way_out=way_out
            )
        self.original = found
        return found

    def baseline(self) -> Measured:
        """The original in eager PyTorch as a measurement; needs `original`."""
        scores = self._scores()
        race = self.race(self._original)
        predictor = self._files(Plan(), "torch", self.task.model)
        size, peak = predictor.bytes, self._peak(predictor, self.task.model)
        shutil.rmtree(predictor.files[0].parent, ignore_errors=True)
        return Measured(
            name="original",
            runtime="torch",
            plan=Plan(),
            score=scores.mean,
            score_interval=scores.interval(),
            drop=0.0,
            drop_interval=Interval(0.0, 0.0) if scores.samples else None,
            latency_ms=race.first_ms,
            latency_interval=race.first_interval,
            speedup=1.0,
            speedup_interval=Interval(1.0, 1.0),
            bytes=size,
            peak_memory_bytes=peak,
            verdict="met",
        )

    def build(self, plan: Plan) -> nn.Module:
        """A new model with the plan applied."""
        notes = self.notes[plan.digest()] = list[str]()
        context = dataclasses.replace(self.context, say=notes.append)
        return transforms.apply(self.task.model, plan, self.sites, context)

    def survey(self, runtime: str, plan: Plan, seconds: float) -> Survey:
        """Build a candidate and time it in turn with the original; a candidate that cannot run says why."""
        try:
            built, predictor = self.prepare(runtime, plan)
            self._check(built, predictor)
        except FlyweightError as error:
            return Survey(speedup=0, speedup_high=0, latency_ms=0, bytes=0, failure=str(error))
        race = self.race(predictor, seconds)
        return Survey(
            speedup=race.speedup,
            speedup_high=race.speedup_interval.high,
            latency_ms=race.second_ms,
            bytes=predictor.bytes,
            memory=self._peak(predictor, built.model) if self.goal.minimize == "memory" else None,
            strays=deviation(self._answer, built.output),
        )

    def measure(self, number: int, name: str, runtime: str, plan: Plan) -> Trial:
        """Time, score and weigh one candidate in full."""
        start = time.perf_counter()
        try:
            measured, reason = self._measure(name, runtime, plan)
        except FlyweightError as error:
            measured, reason = None, str(error)
        return Trial(
            number=number,
            name=name,
            runtime=runtime,
            plan=plan,
            state="failed" if measured is None else "measured",
            reason=reason,
            measured=measured,
            seconds=time.perf_counter() - start,
        )

    def race(self, predict: Predict, seconds: float = timing.SECONDS) -> timing.Race:
        """The original in eager PyTorch against another predictor, timed in turn on the first example."""
        batch = self.task.examples[0]
        with self.measured(), timing.threads(self.threads):
            return timing.race(
                functools.partial(self._original, batch), functools.partial(predict, batch), seconds
            )

    def prepare(self, runtime: str, plan: Plan) -> tuple[Built, Predictor]:
        """The candidate's built model and its predictor; kept, up to KEEP bytes, since a survey and a measurement follow."""
        key = f"{runtime} {plan.digest()}"
        if key not in self._kept:
            if self._built is None or self._built.plan != plan:
                self._built = Built(plan, self.build(plan), self.task.examples[0])
            self._kept[key] = (self._built, self._files(plan, runtime, self._built.model))
            while len(self._kept) > 1 and sum(p.bytes for _, p in self._kept.values()) > KEEP:
                self._drop(next(iter(self._kept)))
        return self._kept[key]

    def forget(self) -> None:
        """Drop what `prepare` kept, with its files."""
        for key in list(self._kept):
            self._drop(key)

    def _drop(self, key: str) -> None:
        _, predictor = self._kept.pop(key)
        shutil.rmtree(predictor.files[0].parent, ignore_errors=True)

    def _measure(self, name: str, runtime: str, plan: Plan) -> tuple[Measured, str]:
        built, predictor = self.prepare(runtime, plan)
        deviation = self._check(built, predictor)
        race = self.race(predictor)
        scores = self._judge(predictor)
        drop = compare(self._scores(), scores, exact=exact(plan) and deviation < SAME)
        verdict = drop.verdict(self.goal)
        measured = Measured(
            name=name,
            runtime=runtime,
            plan=plan,
            score=scores.mean,
            score_interval=scores.interval(),
            drop=drop.value,
            drop_interval=drop.interval,
            latency_ms=race.second_ms,
            latency_interval=race.second_interval,
            speedup=race.speedup,
            speedup_interval=race.speedup_interval,
            bytes=predictor.bytes,
            peak_memory_bytes=self._peak(predictor, built.model),
            verdict=cast(Literal["met", "broken", "unresolved"], verdict),
        )
        return measured, _because(drop, self.goal, verdict)

    def _files(self, plan: Plan, runtime: str, model: nn.Module) -> Predictor:
        where = self.folder / f"{runtime}-{plan.digest()[:16]}"
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir(parents=True)
        method = discover.method("runtimes", runtime)
        with foreign(ModelError, f"{runtime} must load the model"):
            predictor: Predictor = method.prepare(model, self.task.examples, where)
        return predictor

    def _check(self, built: Built, predictor: Predictor) -> float:
        """How far the runtime's output is from the model's own on the first example; ModelError when it is not finite."""
        with foreign(ModelError, f"{predictor.runtime} must run the model"):
            found = predictor(built.batch)
        worst = deviation(built.output, found)
        if not worst < float("inf"):
            raise ModelError(
                "a runtime's output must be finite", got="NaN or infinity", where=predictor.runtime
            )
        return worst

    def _judge(self, predict: Predict) -> Scores:
        self.evaluations += 1
        with self.measured(), timing.threads(self.threads):
            return judge(self.task.score, predict, self.goal.seed)

    def _peak(self, predictor: Predictor, model: nn.Module) -> int | None:
        with self.measured():
            return memory.peak_memory(predictor, model, self.task.examples[0])

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Add the seconds spent inside to `measuring`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.measuring += time.perf_counter() - start

    def _scores(self) -> Scores:
        return self.original if self.original is not None else self.score_original()

    @functools.cached_property
    def _answer(self) -> object:
        """The original's output on the first example."""
        return self._original(self.task.examples[0])

    @functools.cached_property
    def _original(self) -> Predictor:
        return Predictor(runtime="torch", call=caller(self.task.model), files=())


def exact(plan: Plan) -> bool:
    """Whether a plan keeps the function the model computes."""
    return all(step.method in STRUCTURAL for step in plan.steps)


def deviation(wanted: object, found: object) -> float:
    """Relative squared difference of two outputs, the largest over their floating-point tensors; inf when not finite."""
    worst = 0.0
    for one, two in zip(_structure.leaves(wanted), _structure.leaves(found), strict=True):
        if not one.is_floating_point():
            continue
        one, two = one.detach().double().cpu(), two.detach().double().cpu()
        if one.shape != two.shape or (
            bool(torch.isfinite(one).all()) and not bool(torch.isfinite(two).all())
        ):
            return float("inf")
        both = torch.isfinite(one) & torch.isfinite(two)
        change = float((one[both] - two[both]).square().sum() / one[both].square().sum().clamp(min=1e-30))
        worst = max(worst, change)
    return worst


def measured_of(trials: Sequence[Trial]) -> list[Measured]:
    """The measurements among trials."""
    return [trial.measured for trial in trials if trial.measured is not None]


def survey_from(value: Mapping[str, object]) -> Survey:
    """The survey of `to_json`'s values."""
    return Survey(**value)  # type: ignore[arg-type]


def _because(drop: Drop, goal: Goal, verdict: str) -> str:
    if drop.interval is None:
        return f"drop {drop.value:.2%}, without an interval: the score gives one number only"
    low, high = drop.interval.low, drop.interval.high
    ends = {"met": "within", "broken": "beyond", "unresolved": "on both sides of"}[verdict]
    return f"drop {drop.value:.2%}, between {low:.2%} and {high:.2%}: {ends} the bound of {goal.max_drop:.2%}"
