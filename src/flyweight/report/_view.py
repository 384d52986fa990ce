"""What the page and the terminal both show: which candidates, in which role, and by what they are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flyweight.records import Measured, Objective, Result
from flyweight.report import _words

Role = Literal["original", "best", "front", "other"]


@dataclass(frozen=True)
class Row:
    """A measured candidate with its role in the result."""

    role: Role
    measured: Measured


def identity(measured: Measured) -> tuple[str, str]:
    """What makes two measurements the same candidate: runtime and plan."""
    return measured.runtime, measured.plan.digest()


def rows(result: Result) -> tuple[Row, ...]:
    """Original, best, the rest of the front, then every other measured trial; each candidate once."""
    tried = [trial.measured for trial in result.trials if trial.measured is not None]
    found = [Row("original", result.baseline), Row("best", result.best)]
    seen = {identity(result.baseline), identity(result.best)}
    roles: tuple[tuple[Role, list[Measured]], ...] = (("front", list(result.front)), ("other", tried))
    for role, candidates in roles:
        for measured in candidates:
            if identity(measured) not in seen:
                seen.add(identity(measured))
                found.append(Row(role, measured))
    return tuple(found)


def role_name(role: Role, result: Result) -> str:
    """The role in words; the best of an infeasible result is only the nearest."""
    names = {"original": "original", "best": "best", "front": "alternative", "other": "other trial"}
    return "nearest" if role == "best" and result.status == "infeasible" else names[role]


def factor(result: Result, measured: Measured, objective: Objective) -> float | None:
    """How many times better than the original, above 1 when better; None where it was not measured."""
    if objective == "latency":
        return measured.speedup
    if objective == "size":
        return _divided(result.baseline.bytes, measured.bytes)
    return _divided(result.baseline.peak_memory_bytes, measured.peak_memory_bytes)


def amount(measured: Measured, objective: Objective) -> str:
    """What the objective counts, with its unit, such as "12.41 ms"."""
    if objective == "latency":
        return _words.milliseconds(measured.latency_ms)
    return _words.size(measured.bytes if objective == "size" else measured.peak_memory_bytes)


def _divided(before: int | None, after: int | None) -> float | None:
    return before / after if before and after else None
