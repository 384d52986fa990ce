"""What changes of a model's layers bring, one by one: quality, time and size, each as (after - before) / before."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flyweight import transforms
from flyweight.analysis import fisher, gram
from flyweight.analysis.sites import analyse, model_bytes
from flyweight.evaluation import timing
from flyweight.evaluation.quality import judge
from flyweight.inputs.check import check
from flyweight.records import Plan, Record, Task
from flyweight.runtimes.torch import caller
from flyweight.transforms import Context


@dataclass(frozen=True, kw_only=True)
class Improvement(Record):
    """What one plan brings, measured in eager PyTorch."""

    plan: Plan
    """Completed."""
    quality: float
    """Of the mean score: above 0 is better."""
    time: float
    """Of one prediction of the first example, timed in turn with the original: below 0 is faster."""
    size: float
    """Of the bytes of all parameters and buffers: below 0 is smaller."""


def improvements(
    task: Task, plans: Iterable[Plan], *, seconds: float = timing.SECONDS, seed: int = 0
) -> Iterator[Improvement]:
    """What each of some plans brings by itself; seconds: for timing each.

    Raises what `check` and `transforms.apply` do for a task or a plan that does not fit.
    """
    task, _ = check(task)
    found = analyse(task.model, task.examples)
    paths = [site.name for site in found.sites]
    context = Context(
        found.statistics,
        gram.lazily(task.model, paths, task.examples),
        rows=fisher.lazily(task.model, paths, task.examples, seed=seed),
        examples=task.examples,
    )
    batch, original = task.examples[0], caller(task.model)
    before = judge(task.score, original, seed).mean
    for plan in plans:
        done = transforms.complete(task.model, plan, context)
        changed = transforms.apply(task.model, done, found.sites, context)
        after = judge(task.score, caller(changed), seed).mean
        race = timing.race(
            functools.partial(original, batch), functools.partial(caller(changed), batch), seconds
        )
        yield Improvement(
            plan=done,
            quality=(after - before) / abs(before) if before else after,
            time=1 / race.speedup - 1,
            size=model_bytes(changed) / model_bytes(task.model) - 1,
        )
