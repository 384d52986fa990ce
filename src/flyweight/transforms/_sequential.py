"""Layers changed block after block, in the order in which they run, each fitted to the inputs that it will really get.

What a method learns of a layer's inputs is learned in the model as changed so far, as in Frantar et al., GPTQ (arXiv
2210.17323, 2022); the original's inputs of the same examples run alongside, so that a rounding can make up for the drift. Two
hidden states of each example are held, and the matrices of one block. Within a block the layers that read one tensor are
changed together, and those behind them see the change.

What runs before the chain of blocks is changed first, what runs after it last. A model without such a chain is left to the
caller, as are examples that take different ways through it: then all is learned in the original.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import nn

from flyweight.analysis import blocks
from flyweight.analysis.bare import is_bare, layer_at
from flyweight.analysis.blocks import Arguments, Chain
from flyweight.analysis.gram import both, grams, moments
from flyweight.records import Batch
from flyweight.transforms._contract import Context, unheard
from flyweight.transforms._copies import view
from flyweight.transforms._quantized import QuantizedLayer
from flyweight.transforms._teaching import parted

Changes = dict[str, nn.Module]
"""New modules by their paths in the model."""


@dataclass(frozen=True, eq=False)
class Work:
    """What is to be changed, and how."""

    learning: Sequence[str]
    """Sites whose change asks the context for matrices, in the order in which they run."""
    others: Sequence[str]
    """The other sites that change."""
    drifting: Set[str]
    """Those of the learning sites whose change asks for cross matrices too."""
    context: Context
    change: Callable[[str, Context], Mapping[str, nn.Module]]
    """The new modules for a site, with what the context knows."""
    tied: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By site: the other modules that hold its weight, which change with it."""
    settle: Callable[[Place, Changes], Changes] | None = None
    """What becomes of a block's new modules when all are there, in view of what leaves the block."""
    began: nn.Module | None = None
    """The model that is changed, where that is another than the original: of its structure, with other values."""
    moments: bool = False
    """Whether changes learn from `Context.moments` in place of matrices."""

    @property
    def sites(self) -> list[str]:
        """All sites."""
        return [*self.others, *self.learning]

    def paths(self, site: str) -> tuple[str, ...]:
        """All modules that change with a site."""
        return (site, *self.tied.get(site, ()))

    def among(self, sites: Collection[str]) -> Work:
        """The work at some of its sites."""
        learning, others = ([site for site in some if site in sites] for some in (self.learning, self.others))
        return dataclasses.replace(self, learning=learning, others=others)


@dataclass(frozen=True, eq=False)
class Place:
    """A block of the original, and what enters it in each example: there, and in the model as changed so far."""

    path: str
    block: nn.Module
    arguments: Sequence[Arguments]
    original: Sequence[torch.Tensor]
    current: Sequence[torch.Tensor]
    share: float = 1.0
    """Which part of the model's blocks it is: one over their number."""
    say: Callable[[str], None] = unheard
    """Takes a note, as `Context.say`."""
    twin: nn.Module | None = None
    """The block of the model that is changed, where that is another than the original."""

    @property
    def drifted(self) -> bool:
        """Whether the model gives this block, or makes of it, something else than the original even without changes."""
        return self.current is not self.original or self.twin is not None

    @functools.cached_property
    def wanted(self) -> tuple[torch.Tensor, ...]:
        """What leaves the block of the original in each example."""
        return _after(self.block, self.arguments, self.original)

    def examples(self) -> list[Batch]:
        """What the sides take."""
        states = zip(self.original, self.current, strict=True)
        return [{"index": torch.tensor(i), "original": a, "current": b} for i, (a, b) in enumerate(states)]

    def side(self, name: str, changes: Changes, until: Sequence[str] = ()) -> nn.Module:
        """The original's block, or the changed one, as a model of its states; until: see `_Stage`."""
        block = self.block if name == "original" else self.changed(changes)
        return _Side(block, self.arguments, name, [self.inner(path) for path in until])

    def own(self, path: str) -> str:
        """The path in a side of a module that has this path in the model."""
        return "block" + path.removeprefix(self.path)

    def inner(self, path: str) -> str:
        """The path in the block of a module that has this path in the model."""
        return path.removeprefix(self.path).lstrip(".")

    def changed(self, changes: Changes) -> nn.Module:
        """The block with other modules at some paths of the model."""
        return view(self.twin or self.block, {self.inner(path): _plain(new) for path, new in changes.items()})


@dataclass(frozen=True, eq=False)
class _Whole:
    """A model without blocks, or what is outside of them: a place in which the whole model runs."""

    model: nn.Module
    began: nn.Module
    batches: Sequence[Batch]

    @property
    def drifted(self) -> bool:
        """Whether the model differs from the original even without changes."""
        return self.began is not self.model

    def examples(self) -> Sequence[Batch]:
        """What the sides take."""
        return self.batches

    def side(self, name: str, changes: Changes, until: Sequence[str] = ()) -> nn.Module:
        """The original or the changed model; until: see `_Stage`."""
        return self.model if name == "original" else view(self.began, changes)

    def own(self, path: str) -> str:
        """The path in a side of a module that has this path in the model."""
        return path


@dataclass(frozen=True)
class _Stage:
    """Sites of a block that are changed together."""

    sites: Sequence[str]
    until: Sequence[str]
    """Sites after which a pass has told all; none where a site runs more than once, or not at all in the first example."""


class _Side(nn.Module):
    """A block with its arguments in all examples, as a model of hidden states."""

    def __init__(
        self, block: nn.Module, arguments: Sequence[Arguments], name: str, until: Sequence[str]
    ) -> None:
        super().__init__()
        self.block, self.arguments, self.name, self.until = block, arguments, name, until

    def forward(self, index: torch.Tensor, original: torch.Tensor, current: torch.Tensor) -> None:
        """Run the example of that index, on one side."""
        state, given = original if self.name == "original" else current, self.arguments[int(index)]
        if self.until:
            blocks.reach(self.block, given, state, self.until)
        else:
            blocks.leaving(self.block, given, state)


def in_order(model: nn.Module, work: Work) -> Changes | None:
    """The new modules for all sites, or None where the model's blocks cannot be run one by one on the context's examples.

    The model stays as it is. Raises what the changes raise, and DataError where an activation is NaN or infinite.
    """
    model, examples = view(model, {}).eval(), work.context.examples
    chain = blocks.blocks(model, examples[0])
    if chain is None:
        return None
    homes = {site: {_home(path, chain) for path in work.paths(site)} for site in work.sites}
    if any(len(found) > 1 for found in homes.values()):
        return None  # what a block shares with others cannot be changed when its turn comes
    outside = {site for site, found in homes.items() if found == {None}}
    watched = {path for site in outside for path in work.paths(site) if not is_bare(layer_at(model, path))}
    order = blocks.calls(model, {*watched, chain.paths[0]}, examples[0])
    before = order[: order.index(chain.paths[0])]
    early = {site for site in outside if any(path in before for path in work.paths(site))}
    changes = one_by_one(model, {}, work.among(early))
    along = _along(model, chain, changes, work)
    if along is None:
        return None
    changes |= along
    return changes | one_by_one(model, changes, work.among(outside - early))


def one_by_one(model: nn.Module, changes: Changes, work: Work) -> Changes:
    """The new modules for all sites in a model that is changed already, learned in the whole model, one behind the other."""
    began = view(work.began or model, changes) if changes or work.began else model
    return within(_Whole(model, began, work.context.examples), work)


def _along(model: nn.Module, chain: Chain, early: Changes, work: Work) -> Changes | None:
    """The new modules in the chain, block after block, of a model that is changed already before it."""
    examples, changes = work.context.examples, Changes()
    stream = blocks.stream(model, chain, examples)
    began = work.began or model
    entering = blocks.entering(view(began, early), chain, examples) if early or work.began else ()
    if stream is None or entering is None:
        return None
    original, current = stream.states, entering or stream.states
    for path, arguments in zip(chain.paths, stream.arguments, strict=True):
        block, share = model.get_submodule(path), 1 / len(chain.paths)
        twin = began.get_submodule(path) if work.began else None
        place = Place(path, block, arguments, original, current, share, work.context.say, twin)
        found = within(place, work.among([site for site in work.sites if _inside(site, path)]))
        if work.settle is not None:
            found = work.settle(place, found)
        changes |= found
        if path != chain.paths[-1]:
            apart = bool(work.drifting) or work.settle is not None or work.moments
            original, current = behind(place, found, apart)
    return changes


def behind(place: Place, found: Changes, drifting: bool) -> tuple[tuple[torch.Tensor, ...], ...]:
    """The original's and the current hidden states behind a block; one and the same where nobody asks how far they drift."""
    current = _after(place.changed(found), place.arguments, place.current)
    apart = drifting and (found or place.drifted)
    return place.wanted if apart else current, current


def within(place: Place | _Whole, work: Work) -> Changes:
    """The new modules of a block: those that read one tensor together, and each behind the changes before it."""
    changes = _all(work.among(work.others), work.context)
    for stage in _stages(place, work.learning, work.tied):
        part, own = work.among(stage.sites), {site: place.own(site) for site in stage.sites}
        current = place.side("current", changes, stage.until)
        original = place.side("original", {}, stage.until) if changes or place.drifted else current
        changes |= _all(part, _knowing(part, original, current, place.examples(), own))
    return changes


def _stages(place: Place | _Whole, sites: Sequence[str], tied: Collection[str]) -> list[_Stage]:
    """Sites of a block in groups that read one tensor, as told by the first example, in the order in which they run."""
    if not sites:
        return []
    side, first, paths = place.side("current", {}), place.examples()[0], [place.own(site) for site in sites]
    shared, order = grams(side, paths, [first]), blocks.calls(side, paths, first)
    groups: dict[object, list[str]] = {}
    for site in sorted(sites, key=lambda site: (order + tuple(paths)).index(place.own(site))):
        matrix = shared.get(place.own(site))
        groups.setdefault(site if matrix is None else id(matrix), []).append(site)
    once = {site for site in sites if order.count(place.own(site)) == 1 and site not in tied}
    return [_Stage(group, group if once.issuperset(group) else []) for group in groups.values()]


def _knowing(
    work: Work, original: nn.Module, current: nn.Module, examples: Sequence[Batch], own: Mapping[str, str]
) -> Context:
    """The context with the matrices of the sites that learn; own: their paths in the original and in the current module."""
    if not own:
        return work.context
    paths = list(own.values())
    if work.moments:
        halves = ([examples[index] for index in some] for some in parted(len(examples)))
        taught, judged = (moments(original, current, paths, half) for half in halves)
        know = {
            site: (taught[path], judged[path])
            for site, path in own.items()
            if path in taught and path in judged
        }
        return dataclasses.replace(work.context, moments=know.get)
    crossed: Mapping[str, torch.Tensor] = {}
    if original is not current and not work.drifting.isdisjoint(own):
        found, crossed = both(original, current, paths, examples)
    else:
        found = grams(current, paths, examples)
    return dataclasses.replace(
        work.context, gram=lambda site: found.get(own[site]), cross=lambda site: crossed.get(own[site])
    )


def _plain(module: nn.Module) -> nn.Module:
    """A module that computes the same without decoding its weight in every call."""
    return module.plain() if isinstance(module, QuantizedLayer) else module


def _all(work: Work, context: Context) -> Changes:
    """The new modules for all sites of the work, in one context."""
    return {path: new for site in work.sites for path, new in work.change(site, context).items()}


def _after(
    block: nn.Module, arguments: Sequence[Arguments], states: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The hidden states behind a block, for those before it."""
    return tuple(blocks.leaving(block, given, state) for given, state in zip(arguments, states, strict=True))


def _home(path: str, chain: Chain) -> str | None:
    """The block that a module is in; None: it is outside the chain."""
    return next((block for block in chain.paths if _inside(path, block)), None)


def _inside(site: str, path: str) -> bool:
    """Whether a site is the module of that path, or in it."""
    return site == path or site.startswith(f"{path}.")
