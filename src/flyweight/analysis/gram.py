"""How the inputs of layers go together: mean outer products, collected in one streamed pass over the examples.

Shapes: I inputs of one output channel, kernel elements included, in the order of the layer's weight; a convolution with P > 1
groups has a matrix for each, (P, I, I). Padding tokens are inputs like any other. Sites that read the same tensor in every
pass share one matrix: it is computed and held once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from flyweight.analysis._patches import input_rows, reading, row_count
from flyweight.analysis.bare import layer_at
from flyweight.analysis.calls import Call, Watch, unfused
from flyweight.errors import DataError, ModelError, UsageError
from flyweight.inputs.check import run_example
from flyweight.records import Batch

_ENOUGH = 64
"""Rows of one call, over the inputs of one output, that tell enough of how these go together."""
_LINES = 8
"""Lines of a convolution's outputs that are taken at least."""


@dataclass
class _Sum:
    """A running sum of outer products."""

    total: torch.Tensor  # (P, I, I) float32
    left: torch.Tensor  # (P, I) float32: the sum of what stands on the left of the products
    rows: int = 0


@dataclass(frozen=True, eq=False)
class Moments:
    """How a site's inputs go together in a model, and with those that it had in the original: means over rows, float64."""

    gram: torch.Tensor
    """(P, I, I): the model's inputs with themselves."""
    cross: torch.Tensor
    """(P, I, I): the original's inputs with the model's."""
    mean: torch.Tensor
    """(P, I): the model's inputs."""
    before: torch.Tensor
    """(P, I): the original's inputs."""
    rows: int

    def joined(self, other: Moments) -> Moments:
        """Those of the rows of both."""
        share = self.rows / (self.rows + other.rows)

        def mean(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
            return share * one + (1 - share) * two

        return Moments(
            mean(self.gram, other.gram),
            mean(self.cross, other.cross),
            mean(self.mean, other.mean),
            mean(self.before, other.before),
            self.rows + other.rows,
        )


def grams(model: nn.Module, sites: Collection[str], examples: Sequence[Batch]) -> Mapping[str, torch.Tensor]:
    """Mean x x^T over the inputs x (I,) of each site, (I, I) or (P, I, I) float32, by the site's path.

    Embeddings have no matrix, nor have sites that no example reaches. Raises DataError without examples, or where an input
    is NaN or infinite or the model refuses an example, ModelError for a site without a weight of its own, UsageError for
    an unknown site.
    """
    return _collected((model,), sites, examples)[0]


def lazily(
    model: nn.Module, sites: Collection[str], examples: Sequence[Batch]
) -> Callable[[str], torch.Tensor | None]:
    """A function from a site to its matrix of `grams`, or None; all are collected when the first is asked for."""
    collected = functools.cache(lambda: grams(model, sites, examples))
    return lambda site: collected().get(site)


def both(
    original: nn.Module, model: nn.Module, sites: Collection[str], examples: Sequence[Batch]
) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
    """The `grams` of a model, and the mean x_original x^T of each site's inputs in two models of one structure.

    The original's inputs of one example are held at a time. Raises as `grams` does, and ModelError for a site that is
    called with inputs of another shape in the other model.
    """
    return _collected((original, model), sites, examples)


def moments(
    original: nn.Module, model: nn.Module, sites: Collection[str], examples: Sequence[Batch]
) -> Mapping[str, Moments]:
    """What `both` gives, with the means, by the site's path; raises as that does.

    Of convolutions with many more outputs than inputs of one, lines of outputs are left out.
    """
    squares, crosses, leaders = _summed((original, model), sites, examples, _ENOUGH)
    _means(squares), _means(crosses)  # which refuse what is not finite
    known = {path: _moments(own, crosses[path]) for path, own in squares.items() if own.rows}
    return {path: known[leader] for path, leader in leaders.items() if leader in known}


def _moments(own: _Sum, crossed: _Sum) -> Moments:
    def mean(total: torch.Tensor) -> torch.Tensor:
        return total.double() / own.rows

    return Moments(mean(own.total), mean(crossed.total), mean(own.left), mean(crossed.left), own.rows)


def _collected(
    models: tuple[nn.Module, ...], sites: Collection[str], examples: Sequence[Batch]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Means of each site's inputs in the last model with themselves and, of two models, of the first's with the last's."""
    squares, crosses, leaders = _summed(models, sites, examples)
    own = {path: (mean + mean.mT) / 2 for path, mean in _means(squares).items()}
    return _shared(own, leaders), _shared(_means(crosses), leaders)


def _summed(
    models: tuple[nn.Module, ...], sites: Collection[str], examples: Sequence[Batch], enough: int = 0
) -> tuple[dict[str, _Sum], dict[str, _Sum], dict[str, str]]:
    """Sums of `_streamed`, and of each site the one that leads it.

    Which sites share is read off the first example; where a later one disagrees, all begins anew with those sites apart.
    """
    if not len(examples):
        raise DataError("there must be examples to learn a layer's inputs from", got="none")
    watched = [(model, site_weights(model, sites)) for model in models]
    reads = _joint(_watched(model, weights, examples, 0, _ignore) for model, weights in watched)
    apart: set[str] = set()
    while True:
        leaders = _leaders(reads, sites, apart)
        squares, crosses, differing = _streamed(watched, examples, leaders, enough)
        if not differing:
            return squares, crosses, leaders
        apart |= differing


def _shared(means: Mapping[str, torch.Tensor], leaders: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Each site's matrix: that of its leader."""
    return {path: means[leader] for path, leader in leaders.items() if leader in means}


def _streamed(
    watched: Sequence[tuple[nn.Module, Mapping[int, str]]],
    examples: Sequence[Batch],
    leaders: Mapping[str, str],
    enough: int,
) -> tuple[dict[str, _Sum], dict[str, _Sum], set[str]]:
    """Sums of the sites that lead, in the last model and of both; and the sites that read other tensors than their leader.

    enough: rows of one call, over the inputs of one output, beyond which some are left out; 0: none are.
    """
    squares: dict[str, _Sum] = {}
    crosses: dict[str, _Sum] = {}
    waiting: dict[str, list[Call]] = {}
    odd: set[str] = set()

    def keep(path: str, call: Call) -> None:
        if leaders[path] == path:
            waiting.setdefault(path, []).append(_kept(call))

    def add(path: str, call: Call) -> None:
        if leaders[path] != path:
            return
        _add(squares, path, call, call, enough)
        if len(watched) > 1:
            partner = _partner(call, waiting.get(path, []))
            if partner is None:
                odd.add(path)
            else:
                _add(crosses, path, partner, call, enough)

    for index in range(len(examples)):
        waiting.clear()
        steps = [*[keep] * (len(watched) - 1), add]
        reads = _joint(
            _watched(model, weights, examples, index, seen)
            for (model, weights), seen in zip(watched, steps, strict=True)
        )
        odd.update(path for path, calls in waiting.items() if calls)
        if odd:  # raised here, not where it is seen: there it would pass for the model's own error
            rule = "both models must call a site alike"
            raise ModelError(rule, got=f"other inputs in examples[{index}]", where=f"layer {min(odd)}")
        differing = {path for path, leader in leaders.items() if reads.get(path) != reads.get(leader)}
        if differing:
            return squares, crosses, differing
    return squares, crosses, set()


def _watched(
    model: nn.Module,
    weights: Mapping[int, str],
    examples: Sequence[Batch],
    index: int,
    seen: Callable[[str, Call], None],
) -> dict[str, list[object]]:
    """Run one example, hand its calls to seen, and tell of each site which tensors it read, numbered as they came."""
    number = _numbering()
    reads: dict[str, list[object]] = {}

    def note(path: str, call: Call) -> None:
        if call.kind != "embedding":
            reads.setdefault(path, []).append((number(call.input), *reading(call)))
            seen(path, call)

    with unfused(), Watch(weights, note, lambda path, function: None):
        run_example(model, examples, index)
    return reads


def _numbering() -> Callable[[torch.Tensor], int]:
    """A function that gives equal numbers to one tensor with one content; it keeps no tensor alive."""
    known: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}
    numbers = itertools.count()

    def number(tensor: torch.Tensor) -> int:
        version = 0 if tensor.is_inference() else tensor._version
        before = known.get(id(tensor))  # an id may be that of a tensor that is gone
        if before is None or before[0]() is not tensor or before[1] != version:
            known[id(tensor)] = (weakref.ref(tensor), version, next(numbers))
        return known[id(tensor)][2]

    return number


def _joint(reads: Iterable[Mapping[str, list[object]]]) -> dict[str, list[object]]:
    """What sites read in one model after the other."""
    joined: dict[str, list[object]] = {}
    for one in reads:
        for path, tokens in one.items():
            joined.setdefault(path, []).append(tokens)
    return joined


def _leaders(
    reads: Mapping[str, list[object]], sites: Collection[str], apart: Collection[str]
) -> dict[str, str]:
    """Of each site the first one that reads the same tensors; sites apart, and such as did not run, lead themselves."""
    first: dict[str, str] = {}
    return {
        path: path if path in apart or path not in reads else first.setdefault(repr(reads[path]), path)
        for path in sites
    }


def _ignore(path: str, call: Call) -> None:
    """Have no use for a call."""


def _add(sums: dict[str, _Sum], path: str, left: Call, right: Call, enough: int) -> None:
    """Add the outer products of two calls' rows."""
    every = _every(right, enough) if enough else 1
    for a, b in zip(input_rows(left, every), input_rows(right, every), strict=True):
        if path not in sums:
            sums[path] = _Sum(a.new_zeros(len(a), a.shape[2], b.shape[2]), a.new_zeros(len(a), a.shape[2]))
        sums[path].rows += a.shape[1]
        sums[path].left += a.sum(1)
        if len(a) == 1:
            sums[path].total[0].addmm_(a[0].T, b[0])
        else:
            sums[path].total.baddbmm_(a.mT, b)


def _every(call: Call, enough: int) -> int:
    """Of how many lines of a convolution's outputs one is enough."""
    if call.kind != "conv":
        return 1
    spare = row_count(call) // (enough * max(math.prod(call.weight.shape[1:]), 1))
    return max(1, min(spare, call.output.shape[2] // _LINES))


def _means(sums: Mapping[str, _Sum]) -> dict[str, torch.Tensor]:
    return {path: _mean(path, found) for path, found in sums.items() if found.rows}


def _mean(path: str, found: _Sum) -> torch.Tensor:
    """The mean (I, I), or (P, I, I) of P > 1 groups."""
    mean = found.total / found.rows
    if not bool(torch.isfinite(mean).all()):
        raise DataError(
            "activations must be finite",
            got="NaN, infinite or overflowing values",
            where=f"layer {path}",
            way_out="check the examples and the model's weights",
        )
    return mean[0] if len(mean) == 1 else mean


def _kept(call: Call) -> Call:
    """The call with a copy of its input, which the model may change in place later."""
    return dataclasses.replace(call, input=call.input.detach().clone())


def _partner(call: Call, waiting: list[Call]) -> Call | None:
    """The original model's call that goes with this one, which waits no longer; None when there is none of its shape."""
    return waiting.pop(0) if waiting and waiting[0].input.shape == call.input.shape else None


def site_weights(model: nn.Module, sites: Collection[str]) -> dict[int, str]:
    """id(weight) -> path of each site; raises UsageError for a path that is none, ModelError for a site without a weight."""
    found: dict[int, str] = {}
    for path in sites:
        try:
            layer = layer_at(model, path)
        except AttributeError:
            raise UsageError("a site must be a layer of the model", got=repr(path)) from None
        weight = layer._parameters.get("weight")
        if weight is None:
            raise ModelError(
                "a site must have a weight of its own",
                got=type(layer).__name__,
                where=f"layer {path}",
                way_out="collect before the layer is changed",
            )
        found[id(weight)] = path
    return found
