"""Families of the types that a runtime's own file has for weights, as llama.cpp's: the same bits everywhere, or mixed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from torch import nn

from flyweight import discover
from flyweight.analysis.bare import layer_at
from flyweight.planning.allocate import Level, smallest
from flyweight.planning.damage import scaled
from flyweight.planning.family import Family, fed
from flyweight.records import JSON, Goal, Site, Step
from flyweight.transforms import Context
from flyweight.transforms.weight_only import nbytes

WIDE_TYPES, LOW_TYPES = (8, 4), (3, 2)
"""Bits that are tried in all layers: always, and only where none are mixed."""
LOSS = 0.01
"""What weights may add to the loss at first where no drop is allowed."""
Types: TypeAlias = Mapping[int, Sequence[Mapping[str, JSON]]]
"""By bits, options of `weight_only`."""


def types(model: nn.Module, runtime: str) -> Types:
    """The types that a runtime's file has for a model's weights beside plain integers; most runtimes have none."""
    known = discover.method("runtimes", runtime)
    return known.weights(model) if hasattr(known, "weights") else {}


def families(
    runtime: str,
    model: nn.Module,
    sites: Sequence[Site],
    given: Types,
    goal: Goal,
    context: Context | None,
) -> list[Family]:
    """The families of a runtime's types."""
    return _typed(runtime, _ladder(model, sites, given), goal, _priced(model, sites, given, context))


def _ladder(model: nn.Module, sites: Sequence[Site], given: Types) -> dict[int, dict[str, Step]]:
    """Steps by bits, most first; a site that no type of so many bits fits keeps the next more."""
    found: dict[int, dict[str, Step]] = {}
    steps: dict[str, Step] = {}
    for bits in sorted(given, reverse=True):
        steps = dict(steps)
        for options in given[bits]:
            steps |= fed(model, sites, options)
        found[bits] = steps
    return found


def _priced(
    model: nn.Module, sites: Sequence[Site], given: Types, context: Context | None
) -> Callable[[], dict[str, list[Level]]]:
    """Every type that fits a site, with its bytes and its predicted damage; found when first asked for."""

    @functools.cache
    def levels() -> dict[str, list[Level]]:
        found: dict[str, list[Level]] = {}
        if context is None:
            return found
        fitting = [fed(model, sites, options) for some in given.values() for options in some]
        for site in sites:
            steps = [each[site.name] for each in fitting if site.name in each]
            plain = [{k: v for k, v in step.options.items() if k != "rounding"} for step in steps]
            damages = scaled(model, site, plain, context) if steps else None
            if damages is not None:
                layer = layer_at(model, site.name)
                sizes = [nbytes(layer, site, options) for options in plain]
                found[site.name] = [Level(*each) for each in zip(steps, sizes, damages, strict=True)]
        return found

    return levels


def _typed(
    runtime: str,
    ladder: Mapping[int, Mapping[str, Step]],
    goal: Goal,
    priced: Callable[[], Mapping[str, Sequence[Level]]],
) -> list[Family]:
    """A runtime's own types: the same bits everywhere and, where bytes count, mixed for the least bytes within a loss.

    A mixture has the low bits where they do least harm, so the lowest are tried by themselves only without one. It begins
    with the loss predicted for 4 bits everywhere, and so no larger than these.
    """
    most = next(iter(ladder.values()), {})

    def mixed(loss: float) -> Family:
        steps = {name: level.step for name, level in smallest(priced(), loss).items()}
        name = f"mixed types, predicted loss {loss:.2g}"
        return Family(name, {**most, **steps}, loss=loss, at=mixed, only=runtime)

    uniform, gentler = [], most
    for bits, steps in ladder.items():
        if steps != gentler or steps is most:
            uniform.append((bits, Family(f"{bits}-bit types", steps, gentler, only=runtime)))
        gentler = dict(steps)
    fitted = []
    if goal.minimize != "latency" and priced():
        fitted = [mixed(max(goal.max_drop or LOSS, _damage_of(ladder[WIDE_TYPES[-1]], priced())))]
    tried = WIDE_TYPES if fitted or goal.minimize == "latency" else WIDE_TYPES + LOW_TYPES
    return fitted + [family for bits, family in uniform if bits in tried]


def _damage_of(steps: Mapping[str, Step], levels: Mapping[str, Sequence[Level]]) -> float:
    """The predicted damage of steps; 0 where it is infinite: nothing can then be said by it."""
    found = sum(one.damage for name, some in levels.items() for one in some if one.step == steps[name])
    return found if math.isfinite(found) else 0.0
