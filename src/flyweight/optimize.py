"""The flow: take in, analyse, propose, transform, run, judge - again, until goal or time is reached - pack, report."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flyweight import session as sessions
from flyweight import transforms
from flyweight.analysis.machine import machine
from flyweight.artifact.atomic import atomic_write_text
from flyweight.errors import DataError, UsageError
from flyweight.evaluation.bench import Bench, Survey, measured_of, survey_from
from flyweight.evaluation.language import further
from flyweight.evaluation.quality import Scores
from flyweight.inputs.language_model import Judge
from flyweight.packing import how_to_load, pack
from flyweight.planning import advice, choose
from flyweight.planning.candidates import families, uniform
from flyweight.planning.damage import EXAMPLES, damages
from flyweight.planning.family import Candidate, Family
from flyweight.planning.thinner import thinner
from flyweight.records import Goal, Measured, Plan, Result, Step, Task, Trial
from flyweight.report import html
from flyweight.report.progress import Progress
from flyweight.runtimes.torch import caller
from flyweight.search.hunt import Hunt, Tools
from flyweight.search.study import Study
from flyweight.session import Session

SLOW_RUNTIMES = frozenset({"torch_compile"})
"""Runtimes that take a minute to prepare; tried only when named, or when nothing else can run the model."""
SURVEY = {"latency": 2.0, "size": 0.7, "memory": 0.7}
"""Seconds for which a candidate is timed before it is scored, by what is minimized."""
RESERVE = 0.08
"""Share of the time kept for packing and the report."""


def optimize(
    task: Task,
    goal: Goal,
    *,
    out: str | Path,
    recipe: Plan | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
) -> Result:
    """Find the smallest or fastest form of a task's model within the goal's bound, measured; write it to the folder `out`.

    recipe: measure this plan alone instead of searching. resume: go on with the run that `out` holds; force: start anew
    over it. progress: tell on stderr what is being done. The task's model is never changed. `out` gets result.json,
    report.html, study.db and best/, the artifact. Raises a FlyweightError that says what is wrong with the input.
    """
    start, folder = time.monotonic(), Path(out)
    sessions.check_output(folder, resume=resume, force=force)
    names, missing = sessions.runtimes(goal.runtime)
    with Progress(progress, goal.within) as told, sessions.begin(task, goal, told) as session:
        if recipe is not None:
            session.bench.build(
                session.completed(recipe)[0]
            )  # what does not fit is refused before the work starts
        with Study.open(folder / "study.db", sessions.identity(session, goal), resume=resume) as study:
            run = Run(session, goal, study, told, start)
            original = run.baseline()
            hunt = run.hunt(original, names, recipe)
            run.check_trials(hunt)
            best, original, met = run.packed(hunt.measured(), original, folder / "best")
            result = run.result(hunt, best, original, met=met, missing=missing)
            _write(result, folder)
            told.note(f"report in {folder / 'report.html'}")
    return result


@dataclasses.dataclass
class Run:
    """One run's parts; each method is a stage that the study remembers."""

    session: Session
    goal: Goal
    study: Study
    told: Progress
    start: float
    notes: list[str] = dataclasses.field(default_factory=list)
    skipped: list[Trial] = dataclasses.field(default_factory=list)
    _at: str = ""
    """The stage that is being told, after the survey."""

    @property
    def bench(self) -> Bench:
        """Where candidates are measured."""
        return self.session.bench

    def baseline(self) -> Measured:
        """The original, scored and timed."""
        self.told.stage("measuring the original", 2)
        self.told.step("scoring")
        kept = self.study.remember("original", "scores", lambda: self.bench.score_original().to_json())
        samples = None if kept["samples"] is None else tuple(kept["samples"])
        self.bench.original = Scores(kept["mean"], samples)
        self.told.done(f"score {kept['mean']:.4g}" + (f" over {len(samples):,} samples" if samples else ""))
        self.told.step("timing")
        original = self.baseline_measured()
        self.told.done(f"{original.latency_ms:.2f} ms, {original.bytes / 1e6:.1f} MB")
        return original

    def baseline_measured(self) -> Measured:
        """The original's measurement, made once."""
        kept = self.study.remember("original", "measured", lambda: self.bench.baseline().to_json())
        return Measured.from_json(kept)

    def hunt(self, original: Measured, names: Sequence[str], recipe: Plan | None) -> Hunt:
        """Search, or measure the recipe on every runtime."""
        model = self.bench.build(Plan(self.session.folds))
        runtimes = [name for name in names if name not in SLOW_RUNTIMES] or list(names)
        self.notes += [
            f"{name} was not tried: it compiles for a minute; name it with --runtime"
            for name in set(names) - set(runtimes)
        ]
        if recipe is None:
            self.told.stage("learning how much layers count, to choose what to try")
            found = families(model, self.session.analysis.sites, self.goal, self.bench.context, runtimes)
        else:
            plan, notes = self.session.completed(recipe)
            transforms.check(self.session.task.model, plan, self.session.analysis.sites)
            self.notes += notes
            found = [
                Family(
                    "recipe", {step.site: step for step in plan.steps if step.method not in transforms.EXACT}
                )
            ]
        candidates, reasons = uniform(found, runtimes)
        self.notes += reasons
        thin = self._thinned if recipe is None else _as_it_is
        hunt = Hunt(self.goal, original, self.session.analysis.sites, self._tools(thin))
        self.told.stage("timing every candidate", len(candidates))
        hunt.run(candidates)
        return hunt

    def check_trials(self, hunt: Hunt) -> None:
        """Raise DataError when candidates were scored and not one of them could be: then the score is at fault."""
        failed = [trial for trial in hunt.trials.values() if trial.state == "failed"]
        if failed and not any(trial.measured for trial in hunt.trials.values()):
            raise DataError(
                "the score must work on some candidate as it does on the original",
                got=failed[0].reason,
                where=f"{failed[0].name} on {failed[0].runtime}",
                way_out="judge each prediction by itself: score is called once for each candidate",
            )

    def packed(
        self, found: Sequence[Measured], original: Measured, folder: Path
    ) -> tuple[Measured, Measured, bool]:
        """Pack the best: it, the original timed beside it, and whether it is within the contract.

        What is slower than the original when it is timed again gives way to the next best.
        """
        while True:
            chosen = choose.best(found, self.goal, original)
            nearest = chosen or choose.nearest(found, self.goal, original)
            best, timed = pack(self.session, nearest, original, folder, self.told)
            if chosen is None or choose.improves(best, self.goal, timed):
                return best, timed, chosen is not None
            self.notes.append(
                f"{best.name} on {best.runtime} was {best.speedup:.2f} x as fast when it was timed again"
            )
            found = [best if _same(m, best) else m for m in found]

    def result(
        self, hunt: Hunt, best: Measured, original: Measured, *, met: bool, missing: Sequence[str]
    ) -> Result:
        """Everything that was found, in one record; best: as packed, original: as timed beside it."""
        kept = self.study.trials()
        done = {(trial.runtime, trial.plan.digest()) for trial in kept}
        trials = [*kept, *(t for t in self.skipped if (t.runtime, t.plan.digest()) not in done)]
        found = measured_of(trials)
        front = choose.front(
            [*found, original], self.goal, original
        )  # all as they were measured beside one another
        samples = self.bench.original.samples if self.bench.original else None
        lossy = [m for m in found if m.drop_interval and m.drop]
        return Result(
            task=self.session.task.name,
            status="met" if met else "infeasible",
            verdict=advice.verdict(best, self.goal, original, met=met, scored=bool(found)),
            goal=self.goal,
            machine=machine(),
            baseline=original,
            best=best,
            front=tuple(best if _same(m, best) else m for m in front),
            trials=tuple(dataclasses.replace(trial, number=index) for index, trial in enumerate(trials)),
            layers=self._layers(hunt, best),
            resolution=advice.resolution(
                best if best.drop else (lossy or [best])[0], len(samples) if samples else None, self.goal
            ),
            notes=(*self.session.notes, *missing, *self.notes, *self.bench.notes.get(best.plan.digest(), ())),
            evaluations=self.bench.evaluations,
            seconds=time.monotonic() - self.start,
            seconds_measuring=self.bench.measuring,
            versions=sessions.versions(),
            seed=self.goal.seed,
            further=self._further(best),
        )

    def _further(self, best: Measured) -> dict[str, float]:
        """Figures about the best that are reported and not judged."""

        def compute() -> dict[str, Any]:
            predict = self.bench.prepare(best.runtime, best.plan)[1]
            with self.bench.measured():
                found = further(self.session.task.score, caller(self.session.task.model), predict)
            self.bench.forget()
            return dict(found)

        if not isinstance(self.session.task.score, Judge):
            return {}
        self.told.stage("comparing the recommended model with the original")
        kept: dict[str, float] = self.study.remember(
            "further", f"{best.runtime} {best.plan.digest()}", compute
        )
        return kept

    def _tools(self, thin: Callable[[Family], Family | None]) -> Tools:
        return Tools(self._survey, self._measure, self._skip, self._damages, thin, self._time_used)

    def _stage(self, name: str) -> None:
        """Tell a stage once, however often the search comes back to it in a row."""
        if name != self._at:
            self._at = name
            self.told.stage(name)

    def _time_used(self) -> float:
        """Share of the time that is used up, less a reserve for packing."""
        return (time.monotonic() - self.start) / (self.goal.within * (1 - RESERVE))

    def _plan(self, candidate: Candidate) -> Plan:
        return candidate.family.plan(self.session.folds, candidate.spared)

    def _survey(self, candidate: Candidate) -> Survey:
        plan = self._plan(candidate)
        if candidate.spared or self._at:
            self._stage("timing further candidates")
        self.told.step(f"{candidate.name} on {candidate.runtime}")
        key = f"{candidate.runtime} {plan.digest()}"
        found = self.study.remember(
            "survey",
            key,
            lambda: self.bench.survey(candidate.runtime, plan, SURVEY[self.goal.minimize]).to_json(),
        )
        survey = survey_from(found)
        self.told.done(survey.failure or f"{survey.speedup:.2f} x as fast, {survey.bytes / 1e6:.1f} MB")
        return survey

    def _measure(self, candidate: Candidate) -> Trial:
        plan, name, runtime = self._plan(candidate), candidate.name, candidate.runtime
        self._stage("scoring the promising candidates")
        self.told.step(f"{name} on {runtime}")
        trial = self.study.trial(
            name, runtime, plan, lambda number: self.bench.measure(number, name, runtime, plan)
        )
        best = choose.best(measured_of(self.study.trials()), self.goal, self.baseline_measured())
        self.told.done(trial.reason, best=best is not None and best == trial.measured)
        return trial

    def _skip(self, candidate: Candidate, reason: str) -> Trial:
        """Not stored: a resumed run decides anew."""
        trial = Trial(
            number=0,
            name=candidate.name,
            runtime=candidate.runtime,
            plan=self._plan(candidate),
            state="skipped",
            reason=reason,
            measured=None,
            seconds=0.0,
        )
        self.skipped.append(trial)
        return trial

    def _damages(self, family: Family, examples: int = EXAMPLES) -> dict[str, float]:
        """Damage per site of a family, each site alone, on up to so many of the task's examples."""

        def compute() -> dict[str, Any]:
            model = self.bench.build(Plan(self.session.folds))
            self._stage("measuring how sensitive each layer is")
            self.told.step(f"sensitivity of {len(family.steps)} layers to {family.name}")
            left = self.goal.within - (time.monotonic() - self.start)
            limit = max(1.0, min(0.1 * self.goal.within, left))
            with self.bench.measured():
                found = damages(
                    model,
                    self.session.analysis.sites,
                    family.steps,
                    self.bench.context,
                    self.session.task.examples[:examples],
                    seconds=limit,
                )
            self.told.done("measured")
            return found

        kept: dict[str, float] = self.study.remember("damage", family.plan(()).digest(), compute)
        return kept

    def _thinned(self, family: Family) -> Family | None:
        """A family with the units gone that count least."""
        self._stage("finding units that can go")
        self.told.step(f"tracing {self.session.task.name}")
        model, size = self.bench.build(Plan(self.session.folds)), self.goal.minimize != "latency"
        found = thinner(
            self.session.task.model, model, self.session.analysis.sites, self.bench.context, size=size
        )
        self.told.done(f"{len(found.groups)} groups of units can lose some")
        return found.thinned(family)

    def _layers(self, hunt: Hunt, chosen: Measured) -> tuple[Any, ...]:
        origin = next(
            (c for c, t in hunt.trials.items() if t.measured and t.measured.plan == chosen.plan), None
        )
        steps: Mapping[str, Step] = origin.family.steps if origin else {}
        found = self._damages(origin.family, 1) if origin and steps else {}
        return advice.layers(self.session.analysis.sites, chosen.plan, steps, found)


def _as_it_is(recipe: Family) -> None:
    """A recipe loses no units that it does not name."""


def _same(one: Measured, two: Measured) -> bool:
    return one.runtime == two.runtime and one.plan == two.plan


def _write(result: Result, folder: Path) -> None:
    atomic_write_text(folder / "result.json", json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n")
    atomic_write_text(folder / "report.html", html.render(result, how_to_load(result, folder)))


def read_result(folder: Path) -> Result:
    """The result that a run left in its folder; raises UsageError when there is none."""
    path = folder / "result.json"
    if not path.is_file():
        raise UsageError(
            "the folder must hold a run's result.json",
            got=str(folder),
            way_out="run flyweight optimize first",
        )
    return Result.from_json(json.loads(path.read_text()))
