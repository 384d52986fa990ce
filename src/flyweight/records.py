"""The nouns that travel between the stages. All are frozen; those that reach a file go to JSON and back.

Units: latency in milliseconds, sizes in bytes, time in seconds, drops as fractions of the original's score.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

import torch

from flyweight.errors import UsageError

Batch: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...] | dict[str, torch.Tensor]"
Predict: TypeAlias = Callable[[Batch], Any]
JSON: TypeAlias = "None | bool | int | float | str | list[JSON] | dict[str, JSON]"
Objective: TypeAlias = Literal["latency", "size", "memory"]
OBJECTIVES: tuple[Objective, ...] = ("latency", "size", "memory")
PLAN_VERSION = 1


class Record:
    """A dataclass that goes to JSON, field by field."""

    def to_json(self) -> dict[str, JSON]:
        """Plain JSON values by the fields' names; records among them as they go to JSON themselves."""
        return {item.name: plain(getattr(self, item.name)) for item in dataclasses.fields(cast(Any, self))}


def plain(value: Any) -> Any:
    """A value as JSON has it: records, mappings and tuples become dicts and lists."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the user brings: a trained model, unlabelled examples and a judge."""

    name: str
    """A short name for reports."""
    model: torch.nn.Module
    """The trained model; it is never changed."""
    examples: Sequence[Batch]
    """Unlabelled inputs. The first is traced and timed, all calibrate. A Batch is a tensor (`model(x)`),
    a tuple (`model(*xs)`) or a dict (`model(**xs)`) of tensors."""
    score: Callable[[Predict], float | Sequence[float]]
    """Judges a `predict(batch) -> output`; higher is better. Per-sample values give an interval."""
    train: Iterable[tuple[Batch, Any]] | None = None
    """Re-iterable (batch, target) pairs; only needed to heal by training."""
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    """`loss(output, target)`; only needed to heal by training."""


@dataclass(frozen=True, kw_only=True)
class Goal(Record):
    """What the user can afford and what should get smaller. Raises UsageError when out of range."""

    max_drop: float = 0.01
    """Largest relative drop of the score, in [0, 1): (original - candidate) / |original|."""
    minimize: Objective = "latency"
    """What should get smaller: "latency", "size" or "memory"."""
    within: float = 1200.0
    """Time for the whole search, in seconds, above 0."""
    runtime: str = "auto"
    """A runtime's name, or "auto" to measure all that are installed."""
    seed: int = 0
    """Seeds every random choice, in [0, 2**32)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require(_is_number(self.max_drop) and 0 <= self.max_drop < 1, "max_drop", "in [0, 1)", self.max_drop)
        _require(self.minimize in OBJECTIVES, "minimize", f"one of {', '.join(OBJECTIVES)}", self.minimize)
        _require(_is_number(self.within) and self.within > 0, "within", "a time above 0 seconds", self.within)
        _require(
            type(self.seed) is int and 0 <= self.seed < 2**32, "seed", "an integer in [0, 2**32)", self.seed
        )
        _require(
            isinstance(self.runtime, str) and self.runtime,
            "runtime",
            "a runtime's name or auto",
            self.runtime,
        )


@dataclass(frozen=True)
class Interval:
    """A two-sided 95 % confidence interval [low, high]."""

    low: float
    high: float

    def to_json(self) -> list[JSON]:
        """[low, high]."""
        return [self.low, self.high]

    @staticmethod
    def from_json(value: Any) -> Interval | None:
        """The interval of [low, high]; None stays None."""
        return None if value is None else Interval(float(value[0]), float(value[1]))


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place in a model where something can be decided."""

    name: str
    """The module's path in the model, as in `model.named_modules()`, or that of a parameter, see `analysis.bare`."""
    kind: Literal["linear", "conv", "embedding"]
    """What the module computes."""
    parameters: int
    """Number of weights and biases."""
    bytes: int
    """Bytes of those, as they come."""
    macs: int
    """Multiply-accumulates in one forward pass of the first example."""
    tied: tuple[str, ...] = ()
    """Paths of the other modules that hold the same weight: it is changed once, for all of them."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all modules that hold the weight, its own first."""
        return (self.name, *self.tied)


@dataclass(frozen=True)
class Step(Record):
    """One decision: a method at a site, with its options as plain JSON values."""

    method: str
    site: str
    options: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """An ordered set of decisions; empty means: leave the model alone."""

    steps: tuple[Step, ...] = ()

    def to_json(self) -> dict[str, JSON]:
        """The plan as plain JSON values."""
        return {"flyweight_plan": PLAN_VERSION, "steps": [step.to_json() for step in self.steps]}

    @staticmethod
    def from_json(value: Any) -> Plan:
        """The plan of `to_json`'s values; raises UsageError that names the place of what is wrong."""
        if not isinstance(value, dict) or set(value) != {"flyweight_plan", "steps"}:
            raise UsageError(
                'a plan is {"flyweight_plan": 1, "steps": [...]}',
                got=_short(value),
                where="the plan's top level",
            )
        if type(value["flyweight_plan"]) is not int or value["flyweight_plan"] != PLAN_VERSION:
            raise UsageError(
                f"this version reads plans of version {PLAN_VERSION}", got=_short(value["flyweight_plan"])
            )
        if not isinstance(value["steps"], list):
            raise UsageError("steps must be a list", got=_short(value["steps"]), where="steps")
        return Plan(tuple(_step(item, index) for index, item in enumerate(value["steps"])))

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex: equal plans have equal digests."""
        return hashlib.sha256(canonical(self.to_json())).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Measured(Record):
    """A candidate as measured: the original, the best and every point of the front have this shape."""

    name: str
    """What it is, in a few words."""
    runtime: str
    plan: Plan
    score: float
    score_interval: Interval | None
    """None when the task's score gives one number only."""
    drop: float
    """(original - this) / |original|; negative when better."""
    drop_interval: Interval | None
    """Of the paired difference; None when the task's score gives one number only."""
    latency_ms: float
    """Median time of one prediction of the first example."""
    latency_interval: Interval
    speedup: float
    """The original's latency / this one's, measured in turn."""
    speedup_interval: Interval
    bytes: int
    """Bytes of the files."""
    peak_memory_bytes: int | None
    """Memory that loading and running adds to a process; None where it cannot be measured."""
    verdict: Literal["met", "broken", "unresolved"]
    """Whether the drop is within the goal; unresolved: the samples cannot tell."""

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Measured:
        """The measurement of `to_json`'s values."""
        read = dict(value)
        for name in ("score_interval", "drop_interval", "latency_interval", "speedup_interval"):
            read[name] = Interval.from_json(read[name])
        return Measured(**{**read, "plan": Plan.from_json(read["plan"])})


@dataclass(frozen=True, kw_only=True)
class Trial(Record):
    """One candidate's history: what was tried and how it ended."""

    number: int
    name: str
    runtime: str
    plan: Plan
    state: Literal["measured", "skipped", "failed"]
    reason: str
    """Why it was skipped or failed, or what its verdict rests on."""
    measured: Measured | None
    seconds: float

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Trial:
        """The trial of `to_json`'s values."""
        measured = None if value["measured"] is None else Measured.from_json(value["measured"])
        return Trial(**{**value, "plan": Plan.from_json(value["plan"]), "measured": measured})


@dataclass(frozen=True, kw_only=True)
class LayerChoice(Record):
    """What was decided at one site of the best candidate, and why."""

    site: str
    kind: str
    parameters: int
    macs: int
    choice: str
    """The method with its options in a few words, or "float32"."""
    reason: str
    damage: float | None
    """Predicted: relative squared change of the model's output when only this layer is changed."""


@dataclass(frozen=True, kw_only=True)
class Result(Record):
    """The answer of a run: the verdict, the proof and the way there."""

    task: str
    status: Literal["met", "infeasible"]
    verdict: str
    """The answer in one sentence."""
    goal: Goal
    machine: Mapping[str, JSON]
    """Processor, cores, memory, threads, operating system."""
    baseline: Measured
    """The original, in eager PyTorch."""
    best: Measured
    """The recommended candidate; when infeasible, the nearest to the goal."""
    front: tuple[Measured, ...]
    """Measured candidates that no other beats in drop and objective at once, best objective first."""
    trials: tuple[Trial, ...]
    layers: tuple[LayerChoice, ...]
    resolution: Mapping[str, JSON]
    """samples, resolvable_drop (what these samples can tell), samples_needed (for the goal)."""
    notes: tuple[str, ...]
    """Everything that was left alone, fell back or changed nothing."""
    evaluations: int
    """How often the task's score was called."""
    seconds: float
    seconds_measuring: float
    """The part of seconds spent in the task's score and in timing predictions."""
    versions: Mapping[str, str]
    seed: int
    further: Mapping[str, float] = field(default_factory=dict)
    """Figures about the best that are reported and not judged, by name; of a language model, how close it stays."""

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Result:
        """The result of `to_json`'s values."""
        read = dict(value)
        read["goal"] = Goal(**read["goal"])
        for name in ("baseline", "best"):
            read[name] = Measured.from_json(read[name])
        for name, of in (("front", Measured.from_json), ("trials", Trial.from_json)):
            read[name] = tuple(of(item) for item in read[name])
        read["layers"] = tuple(LayerChoice(**item) for item in read["layers"])
        read["notes"] = tuple(read["notes"])
        return Result(**read)


def canonical(value: JSON) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes. NaN and Inf raise ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _step(item: Any, index: int) -> Step:
    where = f"steps[{index}]"
    if not isinstance(item, dict) or not {"method", "site"} <= set(item) <= {"method", "site", "options"}:
        raise UsageError("a step has method, site and options", got=_short(item), where=where)
    for name, kind in (("method", str), ("site", str), ("options", dict)):
        if name in item and not isinstance(item[name], kind):
            raise UsageError(
                f"{name} must be {kind.__name__}", got=_short(item[name]), where=f"{where}.{name}"
            )
    return Step(item["method"], item["site"], item.get("options", {}))


def _require(holds: object, name: str, rule: str, got: object) -> None:
    if not holds:
        raise UsageError(f"{name} must be {rule}", got=_short(got), where=name)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
