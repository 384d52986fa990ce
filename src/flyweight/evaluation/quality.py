"""Is it still good: the task's score, and the paired drop against the original with its confidence interval."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flyweight.errors import DataError, foreign
from flyweight.records import Goal, Interval, Predict, Record

FEW = 10
"""With fewer changed samples than this, the spread of the differences says little and the interval is widened."""
_Z = 1.959964


@dataclass(frozen=True)
class Scores(Record):
    """What the task's score gave: the mean, and the per-sample values if it gave them."""

    mean: float
    samples: tuple[float, ...] | None

    def interval(self) -> Interval | None:
        """95 % interval of the mean; None without samples."""
        if self.samples is None or len(self.samples) < 2:
            return None
        half = _t(len(self.samples) - 1) * statistics.stdev(self.samples) / math.sqrt(len(self.samples))
        return Interval(self.mean - half, self.mean + half)


@dataclass(frozen=True)
class Drop:
    """A relative drop (original - candidate) / |original| with its 95 % interval."""

    value: float
    interval: Interval | None

    def verdict(self, goal: Goal) -> str:
        """met, broken or unresolved: a bound is met or broken only when the interval says so."""
        low, high = (
            (self.value, self.value) if self.interval is None else (self.interval.low, self.interval.high)
        )
        if high <= goal.max_drop:
            return "met"
        return "broken" if low > goal.max_drop else "unresolved"

    @property
    def half(self) -> float:
        """Half the interval's width; 0 without an interval."""
        return 0.0 if self.interval is None else (self.interval.high - self.interval.low) / 2


def judge(score: Callable[[Predict], float | Sequence[float]], predict: Predict, seed: int) -> Scores:
    """Call the task's score once, seeded; raises DataError when it fails or gives anything but finite numbers."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    with foreign(DataError, "the task's score must not fail", where="Task.score"):
        return _scores(score(predict))


def compare(original: Scores, candidate: Scores, exact: bool = False) -> Drop:
    """The paired relative drop, by the delta method.

    exact: the candidate computes the same function up to rounding errors, so that a sample without a change is no luck.
    Raises DataError when the two were not scored on the same samples or the original scores 0.
    """
    if original.mean == 0:
        raise DataError("a relative drop needs an original score other than 0", got="0", where="Task.score")
    value = (original.mean - candidate.mean) / abs(original.mean)
    if original.samples is None or candidate.samples is None:
        return Drop(value, None)
    if len(original.samples) != len(candidate.samples):
        got = f"{len(original.samples)} and {len(candidate.samples)} samples"
        raise DataError("the score must judge the same samples each time", got=got, where="Task.score")
    if len(original.samples) < 2:
        return Drop(value, None)
    half = _half_width(np.array(original.samples), np.array(candidate.samples), exact)
    return Drop(value, Interval(value - half, value + half))


def samples_needed(samples: int, drop: Drop, max_drop: float) -> int | None:
    """How many samples would tell whether this drop is within the bound; None without an interval."""
    if drop.interval is None:
        return None
    margin = abs(max_drop - drop.value)
    if drop.half <= margin or margin == 0:
        return samples
    return math.ceil(samples * (drop.half / margin) ** 2)


def _half_width(original: np.ndarray[Any, Any], candidate: np.ndarray[Any, Any], exact: bool) -> float:
    """Half of the 95 % interval of the ratio of means of paired samples.

    Where only a few samples changed, one imagined change each way is added (Agresti & Min, "On small-sample confidence
    intervals for parameters in discrete distributions", Biometrics 2005): no change among 20 samples proves little.
    """
    mean = abs(original.mean())
    ratio = candidate.mean() / original.mean()
    influence = (candidate - ratio * original) / mean
    count = len(influence)
    changed = int(np.count_nonzero(candidate != original))
    if exact or changed >= FEW:
        return float(_t(count - 1) * influence.std(ddof=1) / math.sqrt(count))
    size = max(float(np.ptp(original)), float(np.abs(candidate - original).max()), 0.0) or mean
    variance = (np.square(influence).sum() + 2 * (size / mean) ** 2) / (count + 1)
    return float(_t(count + 1) * math.sqrt(variance / (count + 2)))


def _t(freedom: int) -> float:
    """97.5 % quantile of Student's t (Cornish-Fisher expansion; within 1 % from 4 degrees of freedom on)."""
    z, v = _Z, max(freedom, 1)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2) + third


def _scores(found: Any) -> Scores:
    rule = "the task's score must give finite numbers"
    try:
        values = np.asarray(
            found.detach().cpu() if isinstance(found, torch.Tensor) else found, dtype=np.float64
        )
    except (TypeError, ValueError):
        raise DataError(rule, got=f"{type(found).__name__} {str(found)[:60]!r}", where="Task.score") from None
    if isinstance(found, str) or found is None or values.ndim > 1 or values.size == 0:
        raise DataError(
            rule,
            got=f"{type(found).__name__} of shape {values.shape}",
            where="Task.score",
            way_out="one, or one per sample",
        )
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        where = "Task.score" if values.ndim == 0 else f"Task.score, sample {bad[0]}"
        raise DataError(rule, got=f"{values.reshape(-1)[bad[0]]}", where=where)
    if values.ndim == 0:
        return Scores(float(values), None)
    return Scores(float(values.mean()), tuple(values.tolist()))
