"""What structure cost is learned back without labels: the smaller model is taught until it answers as the original does.

All its weights follow the slopes of how far its outputs are from the original's (Hinton et al., "Distilling the knowledge
in a neural network", arXiv 1503.02531, 2015), and what its blocks give from what the original's give (Jiao et al.,
"TinyBERT", arXiv 1909.10351, 2020). Some examples are kept apart; the model is taken as it was when it did best on them, and
where it never did better than at the start it stays as it was.

The one site is the model as a whole, "model"; the step comes behind all others that change structure.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from flyweight.analysis.answers import Answer, answer, output_of, vocabularies_of
from flyweight.analysis.blocks import blocks, heard
from flyweight.codes._options import require
from flyweight.errors import UsageError
from flyweight.records import Batch, Plan, Site, Step
from flyweight.transforms._contract import Context
from flyweight.transforms._copies import view
from flyweight.transforms._teaching import Pace, apart, error_of_rows, learn, mean, parted, pieces

SITE = "model"
_LOOKS = 12
"""How often the examples that are kept apart are asked while the others teach."""
_LEAST = 0.01
"""The root mean square that a tensor's steps are measured by, at least: one that is all zero moves too."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How long the model is taught, and in what steps."""

    passes: float = 4.0
    """How often each example teaches, above 0 and up to 1000."""
    rate: float = 0.003
    """How far the first steps move an entry, over the root mean square of its tensor, in (0, 1)."""
    seconds: float | None = None
    """The longest time, above 0; None: as long as it takes. With a limit results depend on the machine's speed."""
    seed: int = 0
    """Seeds the order of the examples, in [0, 2**32)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(0 < self.passes <= 1000, "passes", "above 0, up to 1000", self.passes)
        require(0 < self.rate < 1, "rate", "in (0, 1)", self.rate)
        require(self.seconds is None or self.seconds > 0, "seconds", "above 0, or None", self.seconds)
        require(0 <= self.seed < 2**32, "seed", "in [0, 2**32)", self.seed)


def levels(site: Site) -> Sequence[Options]:
    """None at a layer: the model is healed as a whole."""
    return ()


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why no layer can be a site of this method."""
    return f'the model is healed as a whole, at the site "{SITE}"'


def closeness(options: Options) -> float:
    """How far outputs may move: as far as what it heals has moved them."""
    return math.inf


def proposals(model: nn.Module, examples: Sequence[Batch]) -> Iterator[Plan]:
    """One plan: the model as a whole."""
    yield Plan((Step("heal", SITE),))


def complete(model: nn.Module, options: Mapping[str, Options], context: Context) -> Mapping[str, Options]:
    """The options as they are; raises UsageError for another site than the model."""
    for name in options:
        if name != SITE:
            raise UsageError(
                f'the model is healed as a whole, at the site "{SITE}"', got=repr(name), where=name
            )
    return options


def cut(model: nn.Module, options: Mapping[str, Options], context: Context) -> nn.Module:
    """A new model in eval mode that answers more like the original; raises UsageError without examples.

    Raises DataError where the model refuses an example with gradients.
    """
    chosen = complete(model, options, context)[SITE]
    student = copy.deepcopy(model).eval()
    if context.rebuilding or context.original is None:
        return student
    if not len(context.examples):
        raise UsageError("a model is healed by examples", got="none", where=SITE)
    teacher = view(context.original, {}).eval()
    examples = pieces(teacher, context.examples)
    lesson = _Lesson(
        teacher, student, examples, vocabularies_of(teacher), _ends(teacher, student, examples[0])
    )
    if not _taught(lesson, chosen):
        context.say(
            "the model was not healed: on the examples kept apart it did no better, so it stays as it was"
        )
    return student


@dataclass(frozen=True, eq=False)
class _Lesson:
    """Who teaches whom, by what."""

    teacher: nn.Module
    student: nn.Module
    examples: Sequence[Batch]
    known: set[int]
    ends: Sequence[str]
    """The blocks that are compared too, where both give as much."""

    def loss(self, index: int) -> torch.Tensor:
        """() how far the student is from the teacher on one example, in its answer and on the way."""
        with torch.no_grad(), heard(self.teacher, self.ends) as wanted:
            aim = self._answer(self.teacher, index)
        with heard(self.student, self.ends) as found:
            loss = apart(aim, self._answer(self.student, index))
        pairs = [(wanted[path], found[path]) for path in self.ends]
        errors = [error_of_rows(*pair) for pair in pairs if pair[0].shape == pair[1].shape]
        return loss + torch.stack(errors).mean() if errors else loss

    def judged(self, index: int) -> torch.Tensor:
        """() how far the student's answer is from the teacher's on one example."""
        return apart(*(self._answer(model, index) for model in (self.teacher, self.student)))

    def _answer(self, model: nn.Module, index: int) -> Answer:
        return answer(output_of(model, self.examples, index), self.known)


def _taught(lesson: _Lesson, options: Options) -> bool:
    """Teach the student in place, and leave it as it was when it did best; whether it got better, or was perfect."""
    taught, kept = parted(len(lesson.examples))
    best, state = mean(lesson.judged, kept), copy.deepcopy(lesson.student.state_dict())
    start, steps = best, 0
    if not start:
        return True
    every = max(1, round(options.passes * len(taught)) // _LOOKS)

    def look() -> None:
        nonlocal best, state, steps
        steps += 1
        if not steps % every and (now := mean(lesson.judged, kept)) < best:
            best, state = now, copy.deepcopy(lesson.student.state_dict())

    flags = [(one, one.requires_grad) for one in lesson.student.parameters() if one.is_floating_point()]
    moved = [(one.requires_grad_(), options.rate * max(_size(one), _LEAST)) for one, _ in flags]
    learn(moved, lesson.loss, taught, Pace(options.passes, options.seed, options.seconds or math.inf), look)
    lesson.student.load_state_dict(state)
    for parameter, flag in flags:
        parameter.requires_grad_(flag).grad = None
    return best < start


def _size(parameter: torch.Tensor) -> float:
    """The root mean square."""
    return float(parameter.detach().double().square().mean().sqrt()) if parameter.numel() else 0.0


def _ends(teacher: nn.Module, student: nn.Module, example: Batch) -> Sequence[str]:
    """The blocks of the teacher but for the last, whose output is told by the answer; none where the student has others."""
    chain = blocks(teacher, example)
    known = dict(student.named_modules())
    return () if chain is None or any(path not in known for path in chain.paths) else chain.paths[:-1]
