"""Whole blocks taken out for good: layers, attention or feed-forward halves, residual branches.

What stands in a block's place has no weights and gives one of its arguments, or zeros where it was a branch that is added to
something: what leaves the model's output nearer. A layer before it takes over what can be taken over exactly
(`_takeover`). Blocks that matter little are told by what their removal does to the output, or by block influence (Men et al.,
"ShortGPT", arXiv 2403.03853, 2024). What was decided is written into the step's options, and weights that nothing reads any
more go in steps of their own, so that a stored artifact is rebuilt without data.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flyweight.analysis.answers import Answer
from flyweight.analysis.bare import is_bare
from flyweight.analysis.blocks import blocks as chain_of
from flyweight.analysis.blocks import calls
from flyweight.analysis.influence import Passage, answers_of, damage, passages, reached
from flyweight.codes._options import require, require_one_of
from flyweight.errors import FlyweightError, ModelError, UsageError, foreign
from flyweight.records import Batch, Plan, Site, Step
from flyweight.transforms import _options
from flyweight.transforms._contract import Context
from flyweight.transforms._copies import substitute, view
from flyweight.transforms._removal import removed, widened
from flyweight.transforms._takeover import taken_over

GIVES = ("input", "zeros")
_NO_MODULE = "a block is the path of a module in the model"
_EXAMPLES = 4
"""Examples on which the output is compared."""
_CLEARLY = 0.5
"""Zeros are taken where they leave the output nearer than the input does by this factor."""
_CORRECTED = 3
"""Candidates whose damage is measured with what others take over, of those with the least damage without."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What stands in the block's place."""

    compensate: bool = True
    """Whether a layer before it takes over what it gave."""
    gives: str = ""
    """"input": one of its arguments; "zeros": zeros like it; empty: the input, unless zeros change less by far."""
    source: str = ""
    """Which argument, by place or name; empty: the one that is most like what the block gives."""
    elements: int = 0
    """0: it gives a tensor; n: a tuple of n, the first of them the tensor, the others None."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_one_of(self.gives, "gives", ("", *GIVES))
        require(self.elements >= 0, "elements", "at least 0", self.elements)
        require(bool(self.gives) or not self.source, "source", "told with what it gives", self.source)


class Dropped(nn.Module):
    """What stands in the place of a block that is gone."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.gives, self.source, self.elements = options.gives, options.source, options.elements

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One of the arguments, or zeros like it, in the form of the block's output."""
        found = args[int(self.source)] if self.source.isdecimal() else kwargs[self.source]
        given = torch.zeros_like(found) if self.gives == "zeros" else found
        return (given, *[None] * (self.elements - 1)) if self.elements else given


def levels(site: Site) -> Sequence[Options]:
    """None at a layer: `proposals` says which blocks there are."""
    return ()


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why a layer by itself cannot be dropped, or None; what it gives is looked at by `complete`."""
    return _NO_MODULE if is_bare(module) or not site.name else None


def closeness(options: Options) -> float:
    """How far outputs may move: without a block they may be anything."""
    return math.inf


def blocks(model: nn.Module, examples: Sequence[Batch]) -> dict[str, Passage]:
    """The modules that hold others with weights, run once, and give what has the shape of an argument; by path."""
    found = passages(_evaluating(model), examples)
    return {path: one for path, one in found.items() if _holds(model, path) and not _misfit(one)}


def proposals(model: nn.Module, examples: Sequence[Batch]) -> Iterator[Plan]:
    """A plan for each of `blocks` without which the model runs."""
    for path in blocks(model, examples):
        with contextlib.suppress(UsageError):
            done = complete(model, {path: Options()}, Context(examples=examples))
            yield Plan(tuple(Step("drop", one, _options.plain(options)) for one, options in done.items()))


def complete(model: nn.Module, options: Mapping[str, Options], context: Context) -> Mapping[str, Options]:
    """The options by block, with what stands in its place, and those of modules that nothing reads any more.

    Raises UsageError for what is no such module, or without which the model does not run, or without examples.
    """
    for path in options:
        _check_place(model, path, options)
    open_ones = {path: chosen for path, chosen in options.items() if not (chosen.gives and chosen.source)}
    if not open_ones:
        return options
    if not len(context.examples):
        raise UsageError(
            "what stands in a block's place is found by examples", got="none", where=next(iter(open_ones))
        )
    model, examples = _evaluating(model), context.examples[:_EXAMPLES]
    seen, wanted = passages(model, examples), answers_of(model, examples)
    done = {**options}
    for path, chosen in open_ones.items():
        done[path], _ = _decided(model, path, chosen, seen.get(path), examples, wanted)
    return done | _unread(model, done, seen, examples[0])


def cut(model: nn.Module, options: Mapping[str, Options], context: Context) -> nn.Module:
    """A new model in eval mode without the blocks; raises as `complete` does."""
    decided = complete(model, options, context)
    for path in decided:
        _check_place(model, path, decided)
    small = substitute(model, {path: Dropped(chosen) for path, chosen in decided.items()}).eval()
    making_up = [path for path, chosen in decided.items() if chosen.compensate]
    if context.rebuilding or not len(context.examples) or not making_up:
        return small
    wide, _ = widened(_evaluating(model), ())
    for path in calls(small, making_up, context.examples[0]):
        small = _corrected(wide, small, path, context)
    return small


def left(known: Mapping[str, Site], site: str, options: Options) -> Mapping[str, Site]:
    """The layers that are left of those known."""
    return {name: one for name, one in known.items() if not f"{name}.".startswith(f"{site}.")}


def plan(
    model: nn.Module, examples: Sequence[Batch], count: int, *, within: Sequence[str] = (), by: str = "damage"
) -> Plan:
    """Steps that drop `count` blocks, at least 1, one after another: each the one that is missed least without those before.

    within: paths of the blocks to choose from; else the layers that run one behind the other, or `blocks` if there are none.
    by: "damage" at the model's output, after others took over what they can; or "influence", as ShortGPT does, where nothing
    is made up for. Raises UsageError where there are not that many.
    """
    require(count >= 1, "count", "at least 1", count)
    require_one_of(by, "by", ("damage", "influence"))
    model = _evaluating(model)
    chain = None if within else chain_of(model, examples[0])
    paths = list(within or (chain.paths if chain else blocks(model, examples[:_EXAMPLES])))
    gives = "input" if chain else ""
    if by == "influence":
        known = passages(model, examples)
        chosen = sorted((path for path in paths if path in known), key=lambda path: known[path].influence)
        steps = [Step("drop", path, {"compensate": False, "gives": "input"}) for path in chosen[:count]]
    else:
        steps = _least_missed(model, examples, count, {path: Options(gives=gives) for path in paths})
    if len(steps) < count:
        raise UsageError(f"a model must have {count} blocks that can be dropped", got=str(len(steps)))
    return Plan(tuple(steps))


def _least_missed(
    model: nn.Module, examples: Sequence[Batch], count: int, options: Mapping[str, Options]
) -> list[Step]:
    """The steps of `plan`, by damage."""
    few = examples[:_EXAMPLES]
    wanted, context = answers_of(model, few), Context(examples=examples)
    ways = _ways(model, options, few, wanted)
    chosen: dict[str, Options] = {}

    def missed(found: nn.Module) -> float:
        return damage(wanted, answers_of(found, few))

    for _ in range(count):
        rest = [path for path in ways if not any(_nested(path, other) for other in chosen)]
        without = {path: {**chosen, path: ways[path][0]} for path in rest}
        plain = {path: missed(_without(model, without[path])) if chosen else ways[path][1] for path in rest}
        able = sorted((path for path in rest if plain[path] < math.inf), key=lambda path: plain[path])
        better = {path: missed(cut(model, without[path], context)) for path in able[:_CORRECTED]}
        if not better:
            break
        best = min(better, key=lambda path: better[path])
        chosen[best] = ways[best][0]
    return [Step("drop", path, _options.plain(options[path])) for path in chosen]


def _ways(
    model: nn.Module, options: Mapping[str, Options], examples: Sequence[Batch], wanted: Sequence[Answer]
) -> dict[str, tuple[Options, float]]:
    """What stands in the place of each block, and the damage without it alone; blocks that cannot go are left out."""
    seen = passages(model, examples)
    found = {}
    for path, chosen in options.items():
        with contextlib.suppress(UsageError):
            found[path] = _decided(model, path, chosen, seen.get(path), examples, wanted)
    return found


def _evaluating(model: nn.Module) -> nn.Module:
    """The model in eval mode: a copy, where any of its modules is in training mode."""
    return copy.deepcopy(model).eval() if any(module.training for module in model.modules()) else model


def _check_place(model: nn.Module, path: str, options: Mapping[str, Options]) -> None:
    """Raise UsageError unless a path is that of a module inside the model, and in no other that goes."""
    known = dict(model.named_modules())
    if not path or path not in known:
        near = difflib.get_close_matches(path, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "flyweight.transforms.drop.blocks lists them"
        raise UsageError(_NO_MODULE, got=repr(path), where=path, way_out=hint)
    outer = [other for other in options if other != path and _nested(path, other) and path.startswith(other)]
    if outer:
        raise UsageError("a block goes once", got=f"it is in {outer[0]}", where=path)


def _nested(path: str, other: str) -> bool:
    """Whether one is the other or lies in it."""
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def _holds(model: nn.Module, path: str) -> bool:
    """Whether a module holds others, and a weight of two dimensions or more."""
    module = model.get_submodule(path)
    return bool(list(module.children())) and any(p.ndim > 1 for p in module.parameters())


def _misfit(seen: Passage | None) -> str:
    """Why a module cannot be left out, as it ran; empty where it can."""
    if seen is None:
        return "it does not run on the examples"
    if seen.calls != 1:
        return f"it runs {seen.calls} times in one pass"
    if seen.elements < 0:
        return "it gives no tensor, and no tuple that begins with one"
    return "" if seen.sources else "what it gives has the shape of no argument"


def _decided(
    model: nn.Module,
    path: str,
    chosen: Options,
    seen: Passage | None,
    examples: Sequence[Batch],
    wanted: Sequence[Answer],
) -> tuple[Options, float]:
    """The options with what changes the output least, of what makes the model run, and how much."""
    reason = _misfit(seen)
    if reason or seen is None:
        raise UsageError("a block must run once, and give what it gets", got=reason, where=path)
    ways = [
        dataclasses.replace(chosen, gives=gives, source=chosen.source or seen.source, elements=seen.elements)
        for gives in ([chosen.gives] if chosen.gives else GIVES)
    ]
    found, reasons = dict[Options, float](), list[str]()
    for way in ways:
        try:
            with foreign(ModelError, "it must run"):
                found[way] = damage(wanted, answers_of(_without(model, {path: way}), examples))
        except FlyweightError as failure:
            reasons.append(failure.got or str(failure))
    best = min(found, key=lambda way: found[way] * (_CLEARLY if way.gives == "input" else 1), default=ways[0])
    if not found.get(best, math.inf) < math.inf:
        got = reasons[0] if reasons else "an output of another shape, or one that is not finite"
        raise UsageError("the model must run without a block", got=got, where=path)
    return best, found[best]


def _unread(
    model: nn.Module, done: Mapping[str, Options], seen: Mapping[str, Passage], batch: Batch
) -> dict[str, Options]:
    """What stands in the place of modules all of whose parameters the output depended on, and does no more.

    Raises UsageError where it would depend on none at all.
    """
    small = _without(model, done)
    with foreign(UsageError, "what a model's output depends on must be told by its gradients"):
        before, after = reached(model, batch), reached(small, batch)
    if not after:
        raise UsageError(
            "a model's output must depend on some of its weights", got="on none", where=next(iter(done))
        )
    dead = {id(p) for name, p in model.named_parameters() if name in before - after}
    found: dict[str, Options] = {}
    for path, module in model.named_modules():
        own = {id(p) for p in module.parameters()}
        if (
            not own
            or not own <= dead
            or path not in seen
            or any(_nested(path, other) for other in (*done, *found))
        ):
            continue
        elements = max(seen[path].elements, 0)
        found[path] = Options(
            compensate=False, gives="input", source=seen[path].source or "0", elements=elements
        )
    return found if found and _equal(model, {**done, **found}, small, batch) else {}


def _without(model: nn.Module, options: Mapping[str, Options]) -> nn.Module:
    """The model without some modules, to look through: parameters are its own."""
    return view(model, {path: Dropped(chosen) for path, chosen in options.items()})


def _equal(model: nn.Module, options: Mapping[str, Options], other: nn.Module, batch: Batch) -> bool:
    """Whether a model without some modules gives what another does, bit for bit."""
    try:
        with foreign(ModelError, "it must run"):
            one, two = answers_of(_without(model, options), [batch])[0], answers_of(other, [batch])[0]
    except FlyweightError:
        return False
    return all(map(torch.equal, one.tensors, two.tensors))


def _corrected(original: nn.Module, model: nn.Module, path: str, context: Context) -> nn.Module:
    """The model with a layer that takes over what a block gave, where the output is nearer to the original's with it."""
    wide, examples = widened(model, context.examples)
    values = taken_over(original, wide, path, examples)
    if not values:
        context.say(f"no layer takes over what {path} gave")
        return model
    held = dict(model.named_parameters())
    new = removed(model, (), {}, {name: value.to(held[name].dtype) for name, value in values.items()})
    few = context.examples[:_EXAMPLES]
    wanted = answers_of(original, examples[:_EXAMPLES])
    helps = damage(wanted, answers_of(new, few)) < damage(wanted, answers_of(model, few))
    if not helps:
        context.say(
            f"what {path} gave is taken over by no layer: the output would be farther from the original's"
        )
    return new if helps else model
