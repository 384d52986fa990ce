"""Layers changed block after block, in the order in which they run, each fitted to the inputs that it will really get.

What a method learns of a layer's inputs is learned in the model as changed so far, as in Frantar et al., GPTQ (arXiv
2210.17323, 2022); the original's inputs of the same examples run alongside, so that a rounding can make up for the drift. Two hidden
states of each example are held, and the matrices of one block. Within a block the layers that read one tensor are changed
together, and those behind them see the change.

What runs before the chain of blocks is changed first, what runs after it last. A model without such a chain is left to the
caller, as are examples that take different ways through it: then all is learned in the original.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from flyweight.analysis import blocks
from flyweight.analysis.blocks import Arguments, Chain
from flyweight.analysis.gram import crosses, grams
from flyweight.records import Batch
from flyweight.transforms._contract import Context
from flyweight.transforms._copies import view

Changes = dict[str, nn.Module]
"""New modules by their paths in the model."""


@dataclass(frozen=True, eq=False)
class Work:
    """What is to be changed, and how."""

    learning: Sequence[str]
    """Sites whose change asks the context for matrices, in the order in which they run."""
    others: Sequence[str]
    """The other sites that change."""
    context: Context
    change: Callable[[str, Context], Mapping[str, nn.Module]]
    """The new modules for a site, with what the context knows."""

    @property
    def sites(self) -> list[str]:
        """All sites."""
        return [*self.others, *self.learning]

    def among(self, sites: Collection[str]) -> Work:
        """The work at some of its sites."""
        learning, others = ([site for site in some if site in sites] for some in (self.learning, self.others))
        return dataclasses.replace(self, learning=learning, others=others)


@dataclass(frozen=True, eq=False)
class _Place:
    """A block of the original, and what enters it in each example: there, and in the model as changed so far."""

    path: str
    block: nn.Module
    arguments: Sequence[Arguments]
    original: Sequence[torch.Tensor]
    current: Sequence[torch.Tensor]

    def examples(self) -> list[Batch]:
        """What the sides take."""
        states = zip(self.original, self.current, strict=True)
        return [{"index": torch.tensor(i), "original": a, "current": b} for i, (a, b) in enumerate(states)]

    def side(self, name: str, changes: Changes) -> nn.Module:
        """The block, changed at some paths of the model, as a model of hidden states: the original or the current ones."""
        return _Side(self.changed(changes), self.arguments, name)

    def own(self, path: str) -> str:
        """The path in a side of a module that has this path in the model."""
        return "block" + path.removeprefix(self.path)

    def changed(self, changes: Changes) -> nn.Module:
        """The block with other modules at some paths of the model."""
        return view(
            self.block, {path.removeprefix(self.path).lstrip("."): new for path, new in changes.items()}
        )


class _Side(nn.Module):
    """A block with its arguments in all examples, as a model of hidden states."""

    def __init__(self, block: nn.Module, arguments: Sequence[Arguments], side: str) -> None:
        super().__init__()
        self.block, self.arguments, self.side = block, arguments, side

    def forward(self, index: torch.Tensor, original: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        """The next hidden state in the example of that index, on one side."""
        state = original if self.side == "original" else current
        return blocks.leaving(self.block, self.arguments[int(index)], state)


def in_order(model: nn.Module, work: Work) -> Changes | None:
    """The new modules for all sites, or None where the model's blocks cannot be run one by one on the context's examples.

    The model stays as it is. Raises what the changes raise, and DataError where an activation is NaN or infinite.
    """
    model, examples = view(model, {}).eval(), work.context.examples
    chain = blocks.blocks(model, examples[0])
    if chain is None:
        return None
    outside = {site for site in work.sites if not any(_inside(site, path) for path in chain.paths)}
    early = blocks.earlier(model, chain, outside, examples[0])
    changes = _outside(model, {}, work.among(early))
    along = _along(model, chain, changes, work)
    if along is None:
        return None
    changes |= along
    return changes | _outside(model, changes, work.among(outside - early))


def _outside(model: nn.Module, changes: Changes, work: Work) -> Changes:
    """The new modules for sites outside the chain, all learned in one state of the model."""
    current = view(model, changes) if changes else model
    return _all(
        work, _knowing(work, model, current, work.context.examples, {site: site for site in work.learning})
    )


def _along(model: nn.Module, chain: Chain, early: Changes, work: Work) -> Changes | None:
    """The new modules in the chain, block after block, of a model that is changed already before it."""
    examples, changes = work.context.examples, Changes()
    stream = blocks.stream(model, chain, examples)
    entering = blocks.entering(view(model, early), chain, examples) if early else ()
    if stream is None or entering is None:
        return None
    original, current = stream.states, entering or stream.states
    for path, arguments in zip(chain.paths, stream.arguments, strict=True):
        place = _Place(path, model.get_submodule(path), arguments, original, current)
        found = _within(place, work.among([site for site in work.sites if _inside(site, path)]))
        current = _after(place.changed(found), arguments, current)
        original = _after(place.block, arguments, original)
        changes |= found
    return changes


def _within(place: _Place, work: Work) -> Changes:
    """The new modules of a block: those that read one tensor together, and each behind the changes before it."""
    changes = _all(work.among(work.others), work.context)
    for stage in _stages(place, work.learning):
        sides = place.side("original", {}), place.side("current", changes)
        part = work.among(stage)
        known = _knowing(part, *sides, place.examples(), {site: place.own(site) for site in stage})
        changes |= _all(part, known)
    return changes


def _stages(place: _Place, sites: Sequence[str]) -> list[list[str]]:
    """Sites of a block in groups that read one tensor, as told by the first example, in the order in which they come."""
    if not sites:
        return []
    own = {site: place.own(site) for site in sites}
    shared = grams(place.side("current", {}), list(own.values()), place.examples()[:1])
    stages: dict[int, list[str]] = {}
    for site in sites:
        stages.setdefault(id(shared.get(own[site], site)), []).append(site)
    return list(stages.values())


def _knowing(
    work: Work, original: nn.Module, current: nn.Module, examples: Sequence[Batch], paths: Mapping[str, str]
) -> Context:
    """The context with matrices of some sites, collected when one is asked for; paths: where the sites are in the modules."""

    @functools.cache
    def gram() -> Mapping[str, torch.Tensor]:
        return grams(current, list(paths.values()), examples)

    @functools.cache
    def cross() -> Mapping[str, torch.Tensor]:
        return crosses(original, current, list(paths.values()), examples)

    def of(site: str) -> torch.Tensor | None:
        return gram().get(paths[site])

    def across(site: str) -> torch.Tensor | None:
        return None if current is original else cross().get(paths[site])

    return dataclasses.replace(work.context, gram=of, cross=across)


def _all(work: Work, context: Context) -> Changes:
    """The new modules for all sites of the work, in one context."""
    return {path: new for site in work.sites for path, new in work.change(site, context).items()}


def _after(
    block: nn.Module, arguments: Sequence[Arguments], states: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The hidden states behind a block, for those before it."""
    return tuple(blocks.leaving(block, given, state) for given, state in zip(arguments, states, strict=True))


def _inside(site: str, path: str) -> bool:
    """Whether a site is the module of that path, or in it."""
    return site == path or site.startswith(f"{path}.")
