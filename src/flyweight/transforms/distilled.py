"""Weights tuned after rounding without labels: block by block, and in the end the model as a whole.

Integers follow their slopes, passed through the rounding, and so do scales and values of palettes: Cheng et al., SignRound
(arXiv 2309.05516, 2023); first blocks, then end to end, as in Chen et al., EfficientQAT (arXiv 2407.11062, 2024). A block is
tuned, on what the changed blocks before it give, until it gives what the original's gives, by squared error; the model by the
Kullback-Leibler divergence from the original's logits, or the relative squared error of any other output (Hinton et al.,
"Distilling the knowledge in a neural network", arXiv 1503.02531, 2015). No labels are asked for.

Some examples are kept apart; where what was tuned is not better on them, it stays as it was. What is stored is what
`weight_only` stores. Tuning takes passes forward and backward, and memory for four float copies of the weights that are tuned
at a time. Tied weights, and models without a chain of blocks, are tuned as a whole only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from flyweight.analysis.answers import answer, output_of, vocabularies_of
from flyweight.analysis.bare import is_bare
from flyweight.analysis.blocks import passing
from flyweight.analysis.calls import unfused
from flyweight.codes import integer
from flyweight.codes._options import require, require_one_of
from flyweight.errors import UsageError
from flyweight.records import JSON, Site
from flyweight.transforms import weight_only
from flyweight.transforms._contract import Context
from flyweight.transforms._copies import view
from flyweight.transforms._quantized import QuantizedLayer
from flyweight.transforms._sequential import Changes, Place
from flyweight.transforms._teaching import Pace, apart, error_of_rows, learn, mean, parted, still
from flyweight.transforms._teaching import pieces as pieces
from flyweight.transforms._tuned import Numbers, TunedLayer

CODES = ("integer", "ternary", "palette")
"""Codes whose integers are evenly spaced, or whose values are their own."""
_NO_BETTER = "on the examples kept apart that did no better, so it stays as it was before"
_OWN = ("block_passes", "passes", "seconds", "seed")
_LEVELS, _OTHERS = 0.01, 0.001
"""How far the first step moves levels, in steps of the grid, and all else, as a share."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the weight is stored and rounded, and how long the model is tuned; the latter is the same at all sites."""

    stored: weight_only.Options = field(default_factory=weight_only.Options)
    """How the weight is stored and rounded: options of `weight_only`, named beside the others."""
    block_passes: float = 1.0
    """How often each example teaches a block, from 0 to 1000."""
    passes: float = 0.5
    """How often each example teaches the whole model, from 0 to 1000."""
    seconds: float | None = None
    """The longest time to tune, above 0; None: as long as it takes. With a limit results depend on the machine's speed."""
    seed: int = 0
    """Seeds the order of the examples, in [0, 2**32)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_one_of(self.stored.code, "code", CODES)
        require(0 <= self.block_passes <= 1000, "block_passes", "from 0 to 1000", self.block_passes)
        require(0 <= self.passes <= 1000, "passes", "from 0 to 1000", self.passes)
        require(self.seconds is None or self.seconds > 0, "seconds", "above 0, or None", self.seconds)
        require(type(self.seed) is int and 0 <= self.seed < 2**32, "seed", "in [0, 2**32)", self.seed)

    def plain(self) -> dict[str, JSON]:
        """What `read` reads: all that differs from the defaults."""
        own = {name: getattr(self, name) for name in _OWN if getattr(self, name) != getattr(Options(), name)}
        return self.stored.plain() | own


_SMALL = integer.Options(bits=2, symmetric=False, scale="float16")
LEVELS = (Options(stored=weight_only.Options(coding=_SMALL), block_passes=0.25, passes=0.25),)


def read(options: Mapping[str, JSON], where: str) -> Options:
    """The Options of plain values: its own, and those of `weight_only`; raises UsageError."""
    stored = weight_only.read({name: value for name, value in options.items() if name not in _OWN}, where)
    own = {name: options[name] for name in _OWN if name in options}
    for name, value in own.items():
        known = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        require(known and (value is not None or name == "seconds"), f"{where}.{name}", "a number", value)
    try:
        return Options(stored=stored, **own)  # type: ignore[arg-type]  # checked above and by Options
    except UsageError as error:
        raise UsageError(error.rule, got=error.got, where=f"{where}.{error.where}") from None


def levels(site: Site) -> Sequence[Options]:
    """The options worth trying first: a rounding that leaves something to tune, and a short time."""
    return LEVELS


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why the options do not fit the site, or None."""
    if is_bare(module):
        return "a parameter that is read, in no layer that is called, is not tuned; weight_only stores it"
    return weight_only.refuse(site, options.stored, module)


def learns(options: Options) -> str:
    """Which matrices the rounding asks for, as that of `weight_only`."""
    return weight_only.learns(options.stored)


def closeness(options: Options) -> float:
    """Relative change of a model's output, all its sites rounded, that still counts as right in conformance checks."""
    return 2.0


def replace(model: nn.Module, site: Site, options: Options, context: Context) -> Mapping[str, nn.Module]:
    """The quantized layer as `weight_only` gives it, at its path: where tuning starts."""
    return weight_only.replace(model, site, options.stored, context)


def settle(place: Place, found: Changes, sites: Mapping[str, Options]) -> Changes:
    """The new modules of a block, those at the sites tuned until the block gives what the original's gives.

    Raises what `finish` raises.
    """
    options = _one(sites)
    layers = {path: layer for path in sites if isinstance(layer := found[path], QuantizedLayer)}
    layers = {path: layer for path, layer in layers.items() if len(layer.sharing) == 1}
    if not layers or not options.block_passes:
        return found
    numbers = {path: Numbers(layer, _weight(place, path, layer)) for path, layer in layers.items()}

    def loss(block: nn.Module, index: int) -> torch.Tensor:
        gone = passing(block, place.arguments[index], place.current[index])
        return error_of_rows(place.wanted[index], gone)

    def block_of(tuned: Mapping[str, nn.Module]) -> nn.Module:
        return place.changed({**found, **tuned})

    with still(place.block):
        tuning = block_of({path: TunedLayer(layer, numbers[path]) for path, layer in layers.items()})
        taught, kept = parted(len(place.current))
        pace = _pace(options, options.block_passes, place.share * _part(options, "block"))
        _learn(list(numbers.values()), functools.partial(loss, tuning), taught, pace)
        new: Changes = {path: one.frozen() for path, one in numbers.items()}
        before, after = (mean(functools.partial(loss, block_of(some)), kept) for some in ({}, new))
    if after < before:
        return {**found, **new}
    place.say(f"{place.path} was not tuned: {_NO_BETTER}")
    return found


def finish(original: nn.Module, model: nn.Module, sites: Mapping[str, Options], context: Context) -> Changes:
    """The quantized layers at the sites of a changed model, and those tied with them, tuned: by path; none if none is better.

    No model is changed. Raises UsageError where sites ask for different tuning, and DataError where a model refuses an
    example with gradients.
    """
    options = _one(sites)
    layers = {path: layer for path in sites if isinstance(layer := model.get_submodule(path), QuantizedLayer)}
    if not layers or not options.passes:
        return {}
    numbers = {path: Numbers(layer) for path, layer in layers.items()}
    holders = {path: _holders(model, layer) for path, layer in layers.items()}
    teacher, known = view(original, {}).eval(), vocabularies_of(original)

    def loss(student: nn.Module, index: int) -> torch.Tensor:
        with torch.no_grad():
            wanted = answer(output_of(teacher, context.examples, index), known)
        return apart(wanted, answer(output_of(student, context.examples, index), known))

    with still(model), unfused():
        tuned = {own: TunedLayer(one, numbers[path]) for path in layers for own, one in holders[path].items()}
        taught, kept = parted(len(context.examples))
        pace = _pace(options, options.passes, _part(options, "model"))
        _learn(list(numbers.values()), functools.partial(loss, view(model, tuned)), taught, pace)
        new: Changes = {
            own: one for path in layers for own, one in _frozen(numbers[path], path, holders[path]).items()
        }
        before, after = (mean(functools.partial(loss, one), kept) for one in (model, view(model, new)))
    if after < before:
        return new
    context.say(f"the model was not tuned as a whole: {_NO_BETTER}")
    return {}


def _learn(
    numbers: Sequence[Numbers], loss: Callable[[int], torch.Tensor], taught: Sequence[int], pace: Pace
) -> None:
    """Move the numbers: levels by one size, all else by another."""
    levels = {id(owner.levels) for owner in numbers}
    moved = [one for owner in numbers for one in owner.moving()]

    def hold() -> None:
        for owner in numbers:
            owner.hold()

    learn([(one, _LEVELS if id(one) in levels else _OTHERS) for one in moved], loss, taught, pace, hold)


def _pace(options: Options, passes: float, part: float) -> Pace:
    """How long numbers are moved, in a part of the time that there is."""
    return Pace(passes, options.seed, math.inf if options.seconds is None else options.seconds * part)


def _one(sites: Mapping[str, Options]) -> Options:
    """The options of tuning, which all sites must share; raises UsageError."""
    asked = {tuple(getattr(one, name) for name in _OWN) for one in sites.values()}
    if len(asked) > 1:
        rule = f"the model is tuned as a whole, so that {', '.join(_OWN)} are the same at all sites"
        raise UsageError(rule, got=" and ".join(map(str, sorted(asked, key=str))), where=min(sites))
    return next(iter(sites.values()))


def _part(options: Options, name: str) -> float:
    """Which part of the time is for all blocks, or for the model as a whole."""
    blocks = 0.6 if options.passes and options.block_passes else 1.0 if options.block_passes else 0.0
    return blocks if name == "block" else 1 - blocks


def _weight(place: Place, path: str, layer: QuantizedLayer) -> torch.Tensor:
    """The weight (O, I) that was rounded."""
    weight = place.block.get_submodule(place.inner(path)).get_parameter("weight").detach()
    return weight.T if layer.transposed else weight.flatten(1)


def _frozen(
    numbers: Numbers, path: str, holders: Mapping[str, QuantizedLayer]
) -> Mapping[str, QuantizedLayer]:
    """The layers that hold the tuned weight, by path: the one at the site, and those tied with it."""
    new = numbers.frozen()
    twins = {own: new.beside(one.inner, rounding=False) for own, one in holders.items() if own != path}
    return {path: new, **twins}


def _holders(model: nn.Module, layer: QuantizedLayer) -> dict[str, QuantizedLayer]:
    """The layers that hold a layer's stored weight, itself among them, by path."""
    return {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedLayer) and any(module is one for one in layer.sharing)
    }
