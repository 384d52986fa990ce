"""What conformance checks run on: a zoo model, what was seen of it, and one setting of a method at all its sites."""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flyweight import discover, transforms
from flyweight.analysis.bare import layer_at
from flyweight.analysis.sites import Analysis, analyse
from flyweight.analysis.trace import trace
from flyweight.records import Batch, Plan, Step
from flyweight.runtimes import _structure
from flyweight.testing.zoo import Zoo, missing
from flyweight.transforms import Context, _options

_PROPOSED = 2
"""Plans of a structural method that are checked on each model."""


class NotApplicable(Exception):
    """Raised by a check that says nothing about this case; the message is the reason."""


class Broken(AssertionError):
    """Raised by a check that failed; the message says how."""


@dataclass(frozen=True, eq=False)
class Case:
    """One setting of one method on one model."""

    method: str
    entry: Zoo
    dtype: torch.dtype
    model: nn.Module
    """As the zoo gives it; checks must not change it."""
    original: nn.Module
    """The same in eval mode."""
    examples: Sequence[Batch]
    analysis: Analysis
    plan: Plan

    @property
    def model_name(self) -> str:
        """The zoo's name for the model, and the dtype unless it is float32."""
        return self.entry.name + (
            "" if self.dtype == torch.float32 else f" {str(self.dtype).removeprefix('torch.')}"
        )

    @property
    def setting(self) -> str:
        """The plan in a few words."""
        kinds = dict.fromkeys(f"{step.method} {json.dumps(dict(step.options))}" for step in self.plan.steps)
        return ", ".join(kinds) or "as it is"

    @functools.cached_property
    def changed(self) -> nn.Module:
        """The plan applied, once for all checks; they must not change it."""
        return self.apply()

    def apply(self, model: nn.Module | None = None, context: Context | None = None) -> nn.Module:
        """The plan applied to the model, or to another, with what was seen of this one, or another context."""
        methods = {discover.method("transforms", step.method) for step in self.plan.steps}
        whole = any(hasattr(method, name) for method in methods for name in ("together", "finish", "cut"))
        few = self.examples if whole else ()
        seen = Context(self.analysis.statistics, examples=few) if context is None else context
        return transforms.apply(self.model if model is None else model, self.plan, self.analysis.sites, seen)


def require(holds: bool, message: str) -> None:
    """Raise Broken with the message unless it holds."""
    if not holds:
        raise Broken(message)


def built(entry: Zoo, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The zoo's model, in another dtype where that is not float32."""
    model = entry.build()
    return model if dtype == torch.float32 else model.to(dtype)


def inputs(entry: Zoo, dtype: torch.dtype = torch.float32) -> list[Batch]:
    """The zoo's examples, floating tensors in another dtype where that is not float32."""
    if dtype == torch.float32:
        return list(entry.examples())
    return [each_tensor(x, lambda t: t.to(dtype) if t.is_floating_point() else t) for x in entry.examples()]


def cases(method: str, entry: Zoo) -> Iterator[Case | str]:
    """Every setting of a transform on a model, in float32 and bfloat16; or why there is none."""
    reason = missing(entry)
    if reason:
        yield reason
        return
    none = True
    for dtype in (torch.float32,) if "bfloat16" in entry.traits else (torch.float32, torch.bfloat16):
        model, examples = built(entry, dtype), inputs(entry, dtype)
        original = copy.deepcopy(model).eval()
        analysis = analyse(original, examples)
        for plan in plans_of(method, original, analysis, examples):
            none = False
            yield Case(method, entry, dtype, model, original, examples, analysis, plan)
    if none:
        yield "it has no site that takes the method"


def plans_of(method: str, model: nn.Module, analysis: Analysis, examples: Sequence[Batch]) -> list[Plan]:
    """For every level that the method proposes: the plan with that level at all sites that take it."""
    module = discover.method("transforms", method)
    if method in transforms.STRUCTURE:
        return _structural(method, model, examples)
    fits = module.places(model, examples) if hasattr(module, "places") else None
    if method in transforms.EXACT and fits is None:
        steps = tuple(
            Step(method, conv, {"norm": norm}) for conv, norm in trace(model, examples[0]).norms.items()
        )
        known = {site.name for site in analysis.sites}
        return [Plan(steps)] if steps and all(step.site in known for step in steps) else []
    found: dict[str, list[Step]] = {}
    for site in analysis.sites:
        for options in module.levels(site) if fits is None or site.name in fits else ():
            if module.refuse(site, options, layer_at(model, site.name)) is None:
                plain = _options.plain(options)
                found.setdefault(json.dumps(plain), []).append(Step(method, site.name, plain))
    return [Plan(tuple(steps)) for steps in found.values()]


def _structural(method: str, model: nn.Module, examples: Sequence[Batch]) -> list[Plan]:
    """A few of the plans that a structural method proposes, with what it decides."""
    proposed = discover.method("transforms", method).proposals(model, examples)
    context = Context(examples=examples)
    return [transforms.complete(model, plan, context) for plan in itertools.islice(proposed, _PROPOSED)]


def same_form(wanted: Any, found: Any) -> None:
    """Raise Broken unless two outputs have one structure, and tensors of one shape and dtype."""
    require(type(wanted) is type(found), f"an output of {type(wanted).__name__}, got {type(found).__name__}")
    require(_structure.describe(wanted) == _structure.describe(found), "another structure of the output")
    for one, other in zip(_structure.leaves(wanted), _structure.leaves(found), strict=True):
        require(one.shape == other.shape, f"shape {tuple(one.shape)}, got {tuple(other.shape)}")
        require(one.dtype == other.dtype, f"dtype {one.dtype}, got {other.dtype}")


def same(wanted: Any, found: Any) -> None:
    """Raise Broken unless two outputs are equal, bit for bit."""
    same_form(wanted, found)
    for one, other in zip(_structure.leaves(wanted), _structure.leaves(found), strict=True):
        require(torch.equal(one, other), "other values")


def distance(wanted: Any, found: Any) -> float:
    """Relative Euclidean distance of two outputs: the largest over their floating tensors; inf when not finite."""
    worst = 0.0
    for one, other in zip(_structure.leaves(wanted), _structure.leaves(found), strict=True):
        if one.is_floating_point():
            gap, size = (one.double() - other.double()).norm(), one.double().norm()
            worst = max(worst, float(gap / size) if size else float(gap))
    return worst if worst == worst else float("inf")


def each_tensor(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    """A batch with each of its tensors changed."""
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, dict):
        return {name: change(tensor) for name, tensor in batch.items()}
    return tuple(map(change, batch))
