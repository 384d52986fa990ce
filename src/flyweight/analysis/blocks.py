"""The backbone of a model: blocks that run one after another, each on what the one before gave.

Where a model has such a chain it can be worked on block after block: the hidden states between two blocks are all that
must be kept of the blocks before. What a block is called with beside the hidden state (masks, positions) is that of the
unchanged model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from flyweight.analysis.calls import unfused
from flyweight.inputs.check import run
from flyweight.records import Batch

_CONTAINERS = (nn.ModuleList, nn.Sequential)
_STATE = "hidden_states"
"""How the hidden state is called where it is no positional argument."""
_CLOSE = 1e-3
"""Relative difference from the model's own pass that still counts as the same."""


@dataclass(frozen=True)
class Chain:
    """Paths of modules in the order in which they run, at least 2: each one's hidden state is the output of the one before."""

    paths: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Arguments:
    """What a block is called with, but for the hidden state, whose place is left empty."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Stream:
    """What the blocks of a chain need to run by themselves."""

    arguments: tuple[tuple[Arguments, ...], ...]
    """Of each block, for each example; tensors are those of the model's own pass, not copies."""
    states: tuple[torch.Tensor, ...]
    """For each example the hidden state that enters the first block."""


@dataclass
class _Run:
    """How a module ran in one pass."""

    calls: int = 0
    begun: int = 0
    ended: int = 0
    given: tuple[torch.Tensor, int] | None = None
    gave: tuple[torch.Tensor, int] | None = None
    before: list[str] = field(default_factory=list)


class _Stop(BaseException):
    """Ends a pass that has told all; no Exception, which a model could take for its own."""


def blocks(model: nn.Module, example: Batch) -> Chain | None:
    """The chain that divides a model in eval mode best, or None where there is none that can be run by itself.

    Its modules are children of lists or sequences, run once each, in order, and take the output of the one before, or its
    first element, as it is. Of all such chains it is the one with the largest sum of square roots of parameters: many
    blocks, and much in them. A chain is refused where running the blocks one by one gives another output than the model
    does, as with a cache that remembers earlier calls.
    """
    chain = _heaviest(model, _runs(model, example))
    return chain if chain is not None and _repeats(model, chain, example) else None


def stream(model: nn.Module, chain: Chain, examples: Sequence[Batch]) -> Stream | None:
    """What the chain's blocks get in a pass of each example, or None where one of these passes takes another way."""
    found = [_entries(model, chain.paths, batch) for batch in examples]
    entries = [one for one in found if one is not None]
    if not entries or len(entries) < len(found):
        return None
    arguments = tuple(zip(*([arguments for arguments, _ in one] for one in entries), strict=True))
    return Stream(arguments, tuple(one[0][1] for one in entries))


def entering(model: nn.Module, chain: Chain, examples: Sequence[Batch]) -> tuple[torch.Tensor, ...] | None:
    """For each example the hidden state that enters the chain, or None where one does not reach it; later layers do not run."""
    found = [_entries(model, chain.paths[:1], batch) for batch in examples]
    return None if None in found else tuple(one[0][1] for one in found if one is not None)


def leaving(block: nn.Module, arguments: Arguments, state: torch.Tensor) -> torch.Tensor:
    """The hidden state after a block that is given `state`, which stays as it is."""
    state = state.clone()
    args = (state, *arguments.args[1:]) if arguments.args else ()
    kwargs = dict(arguments.kwargs) if args else {**arguments.kwargs, _STATE: state}
    with torch.no_grad(), unfused():
        output = _first(block(*args, **kwargs))
    if output is None:
        raise TypeError(f"{type(block).__name__} gives no tensor")
    return output


def _runs(model: nn.Module, example: Batch) -> dict[str, _Run]:
    """How the children of lists and sequences run in one pass, in their order in the model."""
    paths = {
        f"{path}.{name}".lstrip("."): child
        for path, module in model.named_modules()
        if isinstance(module, _CONTAINERS)
        for name, child in module.named_children()
    }
    found = {path: _Run() for path in paths}
    clock = itertools.count(1)

    def begin(path: str, state: torch.Tensor | None) -> None:
        one = found[path]
        one.calls, one.begun, one.given = one.calls + 1, next(clock), _dated(state)

    def end(path: str, state: torch.Tensor | None) -> None:
        found[path].ended, found[path].gave = next(clock), _dated(state)

    with _hooked(model, list(paths), begin, end), unfused():
        run(model, example)
    return {path: one for path, one in found.items() if one.calls == 1}


def _heaviest(model: nn.Module, runs: Mapping[str, _Run]) -> Chain | None:
    """The chain with the largest sum of square roots of parameters."""
    best: dict[str, tuple[float, tuple[str, ...]]] = {}
    for path, one in sorted(runs.items(), key=lambda item: item[1].ended):
        before = [best[other] for other in best if _follows(runs[other], one)]
        weight, paths = max(before, key=lambda found: found[0], default=(0.0, ()))
        own = sum(p.numel() for p in model.get_submodule(path).parameters())
        best[path] = (weight + math.sqrt(own), (*paths, path))
    chains = [found for found in best.values() if len(found[1]) > 1]
    return Chain(max(chains, key=lambda found: found[0])[1]) if chains else None


def _follows(first: _Run, second: _Run) -> bool:
    """Whether the second began after the first had ended, and was given what the first gave, unchanged."""
    return first.ended < second.begun and _same(first.gave, second.given)


def _repeats(model: nn.Module, chain: Chain, example: Batch) -> bool:
    """Whether running the blocks one by one gives what the model's own pass gives."""
    found = stream(model, chain, [example])
    if found is None:
        return False
    ends: list[torch.Tensor] = []

    def end(path: str, state: torch.Tensor | None) -> None:
        ends.extend([] if state is None else [state.clone()])

    with _hooked(model, chain.paths[-1:], lambda path, state: None, end), unfused():
        run(model, example)
    state = found.states[0]
    try:
        for path, arguments in zip(chain.paths, found.arguments, strict=True):
            state = leaving(model.get_submodule(path), arguments[0], state)
    except Exception:  # the user's blocks may raise anything when they meet their arguments a second time
        return False
    if not ends or state.shape != ends[0].shape:
        return False
    gap = (state.double() - ends[0].double()).norm()
    return bool(gap <= _CLOSE * ends[0].double().norm())


def _entries(
    model: nn.Module, paths: Sequence[str], batch: Batch
) -> list[tuple[Arguments, torch.Tensor]] | None:
    """Of each block its arguments and, of the first, a copy of its hidden state; None where they do not form a chain."""
    found: list[tuple[Arguments, torch.Tensor]] = []
    left: list[tuple[torch.Tensor, int] | None] = [None]

    def begin(path: str, state: torch.Tensor | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        index = len(found)
        if path != paths[index] or state is None or (index and not _same(left[0], _dated(state))):
            raise _Stop
        rest = Arguments((None, *args[1:]) if args else (), {k: v for k, v in kwargs.items() if v is not state})
        found.append((rest, state.clone() if not index else state.new_empty(0)))
        if len(found) == len(paths):
            raise _Stop

    def end(path: str, state: torch.Tensor | None) -> None:
        left[0] = _dated(state)

    with _hooked(model, paths, begin, end), unfused():
        try:
            run(model, batch)
        except _Stop:
            pass
    return found if len(found) == len(paths) else None
