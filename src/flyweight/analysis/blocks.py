"""The backbone of a model: blocks that run one after another, each on what the one before gave.

Where a model has such a chain it can be worked on block after block: the hidden states between two blocks are all that
must be kept of the blocks before. What a block is called with beside the hidden state (masks, positions) is that of the
unchanged model.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from flyweight.analysis.calls import unfused
from flyweight.errors import FlyweightError, ModelError, foreign
from flyweight.inputs.check import run
from flyweight.records import Batch

_Dated: TypeAlias = "tuple[torch.Tensor, int] | None"
_CONTAINERS = (nn.ModuleList, nn.Sequential)
_STATE = "hidden_states"
"""How the hidden state is called where it is no positional argument."""
_CLOSE = 1e-3
"""Relative difference from the model's own pass that still counts as the same."""


@dataclass(frozen=True)
class Chain:
    """Paths of 2 or more modules in the order in which they run: the hidden state of each is the output of the one before."""

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

    home: str
    """The path of what holds the list or sequence that it is in, or the list that is in, and so on."""
    calls: int = 0
    begun: int = 0
    ended: int = 0
    given: _Dated = None
    gave: _Dated = None


class _Stop(BaseException):
    """Ends a pass that has told all; no Exception, which a model could take for its own."""


def blocks(model: nn.Module, example: Batch) -> Chain | None:
    """The chain that divides a model in eval mode best, or None where there is none that can be run by itself.

    Its modules are children of one module's lists and sequences, run once each, in order, and take the output of the one
    before, or its first element, as it is. Of all such chains it is the one with the largest sum of square roots of
    parameters: many blocks, and much in them. A chain is refused where running the blocks one by one gives another output
    than the model does, as with a cache that remembers earlier calls.
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
    """For each example the hidden state that enters the chain, or None where one does not; no later layer is run."""
    found = [_entries(model, chain.paths[:1], batch) for batch in examples]
    return None if None in found else tuple(one[0][1] for one in found if one is not None)


def calls(model: nn.Module, paths: Collection[str], example: Batch) -> tuple[str, ...]:
    """Some modules in the order in which they begin in a pass of one example, each as often as it is called."""
    found: list[str] = []
    with hooked(model, paths, lambda path, given: found.append(path), _ignore):
        run(model, example)
    return tuple(found)


def leaving(block: nn.Module, arguments: Arguments, state: torch.Tensor) -> torch.Tensor:
    """The hidden state after a block that is given `state`, which stays as it is; ModelError where it gives no tensor."""
    with torch.no_grad():
        return passing(block, arguments, state)


def passing(block: nn.Module, arguments: Arguments, state: torch.Tensor) -> torch.Tensor:
    """As `leaving`, with gradients."""
    output = _first(_called(block, arguments, state))
    if output is None:
        raise ModelError("a block must give a tensor first", got="none", where=type(block).__name__)
    return output


def called(block: nn.Module, arguments: Arguments, state: torch.Tensor) -> Any:
    """All that a block gives when it gets `state`, which stays as it is."""
    with torch.no_grad():
        return _called(block, arguments, state)


def _called(block: nn.Module, arguments: Arguments, state: torch.Tensor) -> Any:
    state = state.clone()
    args = (state, *arguments.args[1:]) if arguments.args else ()
    kwargs = dict(arguments.kwargs) if args else {**arguments.kwargs, _STATE: state}
    with unfused():
        return block(*args, **kwargs)


def reach(block: nn.Module, arguments: Arguments, state: torch.Tensor, paths: Collection[str]) -> None:
    """Run a block as `leaving` does, until each of some modules in it was called; what comes after is not run."""
    waiting = set(paths)

    def end(path: str, output: Any) -> None:
        waiting.discard(path)
        if not waiting:
            raise _Stop

    with hooked(block, paths, _ignore, end), contextlib.suppress(_Stop):
        leaving(block, arguments, state)


def _runs(model: nn.Module, example: Batch) -> dict[str, _Run]:
    """How those children of lists and sequences run that run once in a pass."""
    found = {
        f"{path}.{name}".lstrip("."): _Run(_home(model, path))
        for path, module in model.named_modules()
        if isinstance(module, _CONTAINERS)
        for name, _ in module.named_children()
    }
    clock = itertools.count(1)

    def begin(path: str, given: Arguments) -> None:
        one = found[path]
        one.calls, one.begun, one.given = one.calls + 1, next(clock), _dated(_state(given))

    def end(path: str, output: Any) -> None:
        found[path].ended, found[path].gave = next(clock), _dated(_first(output))

    with hooked(model, list(found), begin, end):
        run(model, example)
    return {path: one for path, one in found.items() if one.calls == 1}


def _home(model: nn.Module, path: str) -> str:
    """The path itself, or of the nearest module around it that is neither list nor sequence; in the end the model's."""
    while path and isinstance(model.get_submodule(path), _CONTAINERS):
        path = path.rpartition(".")[0]
    return path


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
    """Whether the second began after the first had ended, in the same place, and was given what the first gave, unchanged."""
    return first.home == second.home and first.ended < second.begun and _same(first.gave, second.given)


def _repeats(model: nn.Module, chain: Chain, example: Batch) -> bool:
    """Whether running the blocks one by one gives what the model's own pass gives."""
    found, ends = stream(model, chain, [example]), list[torch.Tensor]()

    def end(path: str, output: Any) -> None:
        ends.extend(last.clone() for last in [_first(output)] if last is not None)

    with hooked(model, chain.paths[-1:], _ignore, end):
        run(model, example)
    if found is None:
        return False
    state = found.states[0]
    try:
        with foreign(ModelError, "blocks must take their arguments a second time"):
            for path, arguments in zip(chain.paths, found.arguments, strict=True):
                state = leaving(model.get_submodule(path), arguments[0], state)
    except FlyweightError:
        return False
    gap = torch.dist(state.double(), ends[0].double()) if state.shape == ends[0].shape else math.inf
    return bool(gap <= _CLOSE * ends[0].double().norm())


def _entries(
    model: nn.Module, paths: Sequence[str], batch: Batch
) -> list[tuple[Arguments, torch.Tensor]] | None:
    """Of each block its arguments, and a copy of the first's hidden state; None where they do not run as a chain."""
    found: list[tuple[Arguments, torch.Tensor]] = []
    gave: list[_Dated] = [None]

    def begin(path: str, given: Arguments) -> None:
        state, index = _state(given), len(found)
        if state is None or path != paths[index] or (index and not _same(gave[0], _dated(state))):
            raise _Stop
        found.append((_emptied(given), state.new_empty(0) if index else state.clone()))
        if len(found) == len(paths):
            raise _Stop

    def end(path: str, output: Any) -> None:
        gave[0] = _dated(_first(output))

    with hooked(model, paths, begin, end), contextlib.suppress(_Stop):
        run(model, batch)
    return found if len(found) == len(paths) else None


@contextlib.contextmanager
def hooked(
    model: nn.Module,
    paths: Collection[str],
    begin: Callable[[str, Arguments], None],
    end: Callable[[str, Any], None],
) -> Iterator[None]:
    """Tell of the beginning and end of each call of some modules, which PyTorch runs without shortcuts meanwhile."""
    with contextlib.ExitStack() as undo:
        undo.enter_context(unfused())
        for path in paths:
            module = model.get_submodule(path)

            def before(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path
            ) -> None:
                begin(path, Arguments(args, kwargs))

            def after(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                end(path, output)

            undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(after).remove)
        yield


def _ignore(path: str, value: Any) -> None:
    """Have no use for a call."""


def _state(given: Arguments) -> torch.Tensor | None:
    """The hidden state among a block's arguments: the first one, or the one of that name."""
    state = given.args[0] if given.args else given.kwargs.get(_STATE)
    return state if isinstance(state, torch.Tensor) else None


def _emptied(given: Arguments) -> Arguments:
    if given.args:
        return Arguments((None, *given.args[1:]), given.kwargs)
    return Arguments((), {name: value for name, value in given.kwargs.items() if name != _STATE})


def _first(output: Any) -> torch.Tensor | None:
    """A block's output, or the first element of it, where that is a tensor."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, torch.Tensor) else None


def _dated(tensor: torch.Tensor | None) -> _Dated:
    """A tensor, with how often it was changed in place so far."""
    if tensor is None:
        return None
    return tensor, 0 if tensor.is_inference() else tensor._version


def _same(first: _Dated, second: _Dated) -> bool:
    """Whether both are one tensor, not changed in place between."""
    return first is not None and second is not None and first[0] is second[0] and first[1] == second[1]
