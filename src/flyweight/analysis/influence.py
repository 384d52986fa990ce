"""How much each module of a model does: whether its output looks like its input, and what its change does to the output.

Block influence is 1 - the mean cosine of a block's in- and output (Men et al., "ShortGPT", arXiv 2403.03853, 2024). Damage is
measured where it counts, at the model's output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity, kl_div, log_softmax

from flyweight.analysis.answers import Answer, answer, floats_of, vocabularies_of
from flyweight.analysis.blocks import Arguments, hooked
from flyweight.inputs.check import arguments, run
from flyweight.records import Batch


@dataclass(frozen=True)
class Passage:
    """How a module ran."""

    calls: int
    """In one pass of the first example."""
    elements: int
    """0: it gives a tensor; n: a tuple or list of n, the first of them a tensor; -1: anything else."""
    sources: Mapping[str, float]
    """The arguments that have the shape of what it gives, by place or name, with the mean cosine of both."""

    @property
    def source(self) -> str:
        """The argument that is most like what the module gives; empty where none has its shape."""
        return max(self.sources, key=lambda name: self.sources[name], default="")

    @property
    def influence(self) -> float:
        """1 - the mean cosine of that argument and what the module gives: 0 of one that changes no direction."""
        return 1 - self.sources[self.source] if self.sources else 1.0


def passages(model: nn.Module, examples: Sequence[Batch]) -> dict[str, Passage]:
    """How each module inside a model in eval mode runs, by path; modules that do not run at all are left out."""
    given: dict[str, list[Arguments]] = {}
    sums: dict[str, dict[str, float]] = {}
    ends: dict[str, int] = {}
    elements: dict[str, int] = {}

    def begin(path: str, args: Arguments) -> None:
        given.setdefault(path, []).append(args)

    def end(path: str, output: Any) -> None:
        found, elements[path] = leading(output)
        ends[path] = ends.get(path, 0) + 1
        likeness = _likeness(given[path].pop(), found)
        before = sums.setdefault(path, dict.fromkeys(likeness, 0.0))
        sums[path] = {name: before[name] + value for name, value in likeness.items() if name in before}

    first: dict[str, int] = {}
    with hooked(model, [path for path, _ in model.named_modules() if path], begin, end):
        for batch in examples:
            run(model, batch)
            first = first or dict(ends)
    return {
        path: Passage(
            first.get(path, 0), elements[path], {name: one / count for name, one in sums[path].items()}
        )
        for path, count in ends.items()
    }


def leading(output: Any) -> tuple[torch.Tensor | None, int]:
    """The tensor that an output is, or begins with, and `Passage.elements` of it."""
    if isinstance(output, torch.Tensor):
        return output, 0
    if type(output) in (tuple, list) and output and isinstance(output[0], torch.Tensor):
        return output[0], len(output)
    return None, -1


def answers_of(model: nn.Module, examples: Iterable[Batch]) -> list[Answer]:
    """What counts of a model's outputs, for each example."""
    known = vocabularies_of(model)
    return [answer(run(model, batch), known) for batch in examples]


def damage(wanted: Sequence[Answer], found: Sequence[Answer]) -> float:
    """How far answers are from others: the mean divergence of logits in nats, else the relative squared change.

    The divergence is that of Kullback and Leibler; infinite where shapes differ or values are not finite.
    """
    return sum(_damage(one, two) for one, two in zip(wanted, found, strict=True)) / max(len(wanted), 1)


def reached(model: nn.Module, batch: Batch) -> set[str]:
    """The names of the parameters that a model's floating outputs depend on; one that several modules hold, by its first."""
    own = {name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.is_floating_point()}
    args, kwargs = arguments(batch)
    with torch.enable_grad():
        output = functional_call(model, own, args, kwargs)
    names = {id(tensor): name for name, tensor in own.items()}
    waiting: list[Any] = [one.grad_fn for one in floats_of(output) if one.grad_fn is not None]
    found, seen = set(), set(waiting)
    while waiting:
        node = waiting.pop()
        found.add(names.get(id(getattr(node, "variable", None)), ""))
        fresh = {other for other, _ in node.next_functions if other is not None} - seen
        seen |= fresh
        waiting += fresh
    return found - {""}


def _likeness(given: Arguments, found: torch.Tensor | None) -> dict[str, float]:
    """The mean cosine of each argument of the shape of what was given, by place or name."""
    if found is None or not found.is_floating_point() or not found.ndim or not found.numel():
        return {}
    named = {str(place): value for place, value in enumerate(given.args)} | dict(given.kwargs)
    axis = 1 if found.ndim > 3 else -1  # channels of pictures stand second
    return {
        name: float(cosine_similarity(value.double(), found.double(), dim=axis).mean())
        for name, value in named.items()
        if isinstance(value, torch.Tensor) and (value.shape, value.dtype) == (found.shape, found.dtype)
    }


def _damage(wanted: Answer, found: Answer) -> float:
    worst = 0.0
    for one, two in zip(wanted.tensors, found.tensors, strict=True):
        if one.shape != two.shape or not bool(torch.isfinite(two).all()):
            return float("inf")
        if wanted.logits:
            old, new = (log_softmax(tensor.float(), -1) for tensor in (one, two))
            change = float(kl_div(new, old, log_target=True, reduction="sum")) / max(one[..., 0].numel(), 1)
        else:
            size = float(one.double().square().sum()) or 1.0
            change = float((one.double() - two.double()).square().sum()) / size
        worst = max(worst, change)
    return worst
