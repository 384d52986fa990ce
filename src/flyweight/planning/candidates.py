"""The candidates worth measuring: uniform ones of each family first, then mixtures that spare the sensitive sites."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from flyweight import discover
from flyweight.analysis.bare import layer_at
from flyweight.analysis.machine import instructions
from flyweight.planning import own_types
from flyweight.planning.allocate import Level, allocate
from flyweight.planning.damage import predicted
from flyweight.planning.family import WIDE, Candidate, Family, fed, steps_of, weighed
from flyweight.planning.own_types import LOSS
from flyweight.records import JSON, Goal, Site, Step
from flyweight.transforms import Context, distilled, smooth
from flyweight.transforms.weight_only import nbytes

LOW_BITS = (4, 3)
"""Widths below 8 bits that are tried; fewer break any sensible contract without training."""
LINEAR = 0.1
"""Share of the arithmetic in linear layers above which their inputs are also rounded row by row."""
FEW_ROWS = 16
"""Inputs that a weight meets in one prediction up to which reading it takes longer than multiplying with it."""
TUNED: Mapping[str, float] = {"block_passes": 1.0, "passes": 0.25}
"""How often each example tunes a block, and the model as a whole."""
TUNING, SPEED = 0.15, 1e10
"""Share of the run's time that tuning may take, at so many multiplications a second; backward passes are twice as dear."""
_ORIGINAL = "float32"
BASELINE = "torch"
"""The runtime of the original, with which every candidate is compared."""


def families(
    model: nn.Module,
    sites: Sequence[Site],
    goal: Goal,
    context: Context | None = None,
    runtimes: Sequence[str] = (),
) -> list[Family]:
    """The ways to treat a model worth trying for a goal; the first leaves it alone, unless the goal is size: it saves none.

    With what is known of the sites also one whose bits differ from layer to layer. A runtime whose file has types of its own
    for weights gets families of these.
    """
    own = {name: types for name in runtimes if (types := own_types.types(model, name))}
    found = [] if goal.minimize == "size" else [Family(_ORIGINAL)]
    if not own or len(own) < len(runtimes):
        found += _general(model, sites, goal, context)
    for name, types in own.items():
        found += own_types.families(name, model, sites, types, goal, context)
    return [weighed(family, model, sites) for family in found if family.steps or family.name == _ORIGINAL]


def _general(model: nn.Module, sites: Sequence[Site], goal: Goal, context: Context | None) -> list[Family]:
    """The families for any runtime."""
    stored = steps_of(model, sites, "weight_only", {})
    found = []
    if goal.minimize == "size":
        known = [s for s in sites if s.kind != "embedding" or _seen(context, s)]
        found += _entropy(model, (sites, known), stored, goal.max_drop or LOSS)
    found.append(Family("int8 weights", stored))
    if goal.minimize != "latency":
        low = [_tunable(model, sites, family, goal, context) for family in _low_bit(model, sites, stored)]
        found += low
        found += _mixed(model, sites, low[0], context) if low and context is not None else []
    found += _blocks(model, sites, stored)
    return found + _int8(model, sites, stored, _scaled(model, sites, context))


def _low_bit(model: nn.Module, sites: Sequence[Site], stored: Mapping[str, Step]) -> list[Family]:
    """Fewer bits a weight, rounded by error feedback where inputs are known; a spared site has the next more bits."""
    found, gentler = [], stored
    for bits in LOW_BITS:
        grouped: dict[str, JSON] = {"bits": bits, "group": 32, "symmetric": False, "scale": "float16"}
        whole: dict[str, JSON] = {"bits": bits, "symmetric": False}
        steps = dict(stored)
        for given in (whole, grouped):  # a later one takes the place of an earlier one where it fits
            steps |= fed(model, sites, given)
        if steps != stored:
            found.append(Family(f"int{bits} weights", steps, gentler))
            gentler = steps
    return found


def _tunable(
    model: nn.Module, sites: Sequence[Site], family: Family, goal: Goal, context: Context | None
) -> Family:
    """The family, with itself tuned without labels as a variant, where that takes no more than a share of the time."""
    passed = sum(site.macs for site in sites) * len(context.examples if context else ())
    if not passed or 3 * sum(TUNED.values()) * passed > TUNING * goal.within * SPEED:
        return family

    def variants() -> list[Family]:
        steps: dict[str, Step] = {}
        for site in sites:
            step = family.steps.get(site.name)
            if step is not None and step.options.get("bits", WIDE) != WIDE:
                options: dict[str, JSON] = {**step.options, **TUNED}
                layer = layer_at(model, site.name)
                if distilled.refuse(site, distilled.read(options, site.name), layer) is None:
                    steps[site.name] = Step("distilled", site.name, options)
        tuned = dataclasses.replace(family, name=f"{family.name}, tuned", steps={**family.steps, **steps})
        return [tuned] if steps else []

    return dataclasses.replace(family, variants=variants)


def _mixed(model: nn.Module, sites: Sequence[Site], low: Family, context: Context) -> list[Family]:
    """A family's bits where they do least harm, and the gentler ones elsewhere: half way between the two in bytes.

    Harm is predicted for rounding to nearest, since only its order from layer to layer counts here.
    """
    levels: dict[str, list[Level]] = {}
    for site in sites:
        for step in (low.steps.get(site.name), low.gentler.get(site.name)):
            if step is None:
                continue
            plain = {k: v for k, v in step.options.items() if k != "rounding"}
            damage = predicted(model, site, Step(step.method, step.site, plain), context)
            if damage is not None:
                size = nbytes(layer_at(model, site.name), site, step.options)
                levels.setdefault(site.name, []).append(Level(step, size, damage))
    levels = {name: some for name, some in levels.items() if len({level.bytes for level in some}) > 1}
    chosen = allocate(levels, sum(level.bytes for some in levels.values() for level in some) / 2)
    if not chosen or len({level.step.method + str(level.step.options) for level in chosen.values()}) < 2:
        return []
    steps = {**low.steps, **{name: level.step for name, level in chosen.items()}}
    return [Family(f"{low.name.removesuffix(' weights')} and int8 weights", steps, low.gentler)]


def _blocks(model: nn.Module, sites: Sequence[Site], stored: Mapping[str, Step]) -> list[Family]:
    """4-bit weights multiplied as they are, where a prediction is short: then the time goes into reading weights."""
    linear = [site for site in sites if site.kind == "linear" and site.macs]
    if sum(s.macs for s in linear) > FEW_ROWS * sum(s.parameters for s in linear):
        return []
    steps: dict[str, Step] = {}
    for rounding in ({}, {"rounding": "error_feedback"}):
        steps |= steps_of(model, sites, "block_int8", rounding)
    return [Family("int4 blocks, int8 inputs", {**stored, **steps}, stored)] if steps else []


def _entropy(
    model: nn.Module,
    given: tuple[Sequence[Site], Sequence[Site]],
    stored: Mapping[str, Step],
    loss: float,
) -> list[Family]:
    """Integers that a Huffman coder packs, all layers on one water level, which the search then fits to the bound.

    given: all sites, and those of which it is known what their entries count. It begins with a loss as large as the drop
    that is allowed: where the score is a likelihood, that is the drop.
    """
    sites, known = given
    weights = sum(layer_at(model, s.name).get_parameter("weight").numel() for s in known) or 1
    level = float(f"{math.sqrt(24 * loss / weights):.3g}")  # an entry adds about level^2 / 24
    steps = dict(stored) | steps_of(model, sites, "weight_only", {"code": "entropy", "step": 0.25})
    fed: dict[str, JSON] = {"code": "entropy", "rounding": "waterfilling", "level": level}
    steps |= steps_of(model, known, "weight_only", fed)
    if steps == stored:
        return []
    at = functools.partial(_entropy, model, given, stored)
    name = f"Huffman-coded weights, loss {loss:.2g}"
    return [Family(name, steps, stored, loss=loss, at=lambda other: at(other)[0])]


def _seen(context: Context | None, site: Site) -> bool:
    """Whether it is known what a table's entries count."""
    return context is not None and context.gram(site.name) is not None and context.rows(site.name) is not None


def _scaled(
    model: nn.Module, sites: Sequence[Site], context: Context | None
) -> Callable[[str], tuple[Step, ...]]:
    """The steps of `smooth` that fit a model, for its target; they are looked for when they are first asked for."""

    @functools.cache
    def places() -> tuple[str, ...]:
        known = {site.name for site in sites}
        if context is None or not context.examples or not _mostly_linear(sites):
            return ()
        return tuple(path for path in smooth.places(model, context.examples[:1]) if path in known)

    return lambda target: tuple(Step("smooth", path, {"target": target}) for path in places())


def _int8(
    model: nn.Module,
    sites: Sequence[Site],
    stored: Mapping[str, Step],
    scaled: Callable[[str], tuple[Step, ...]],
) -> list[Family]:
    """Integer arithmetic: with the full range of weights where its sums cannot saturate, else with the reduced range.

    Variants have outliers of the inputs moved into the weights where that can be done, and the other range, since it
    sometimes rounds better all the same.
    """
    full = bool({"avx512_vnni", "avx_vnni", "asimd"} & set(instructions()))
    first, second = (_ranged(model, sites, stored, reduced=reduced) for reduced in (not full, full))

    def variants(family: Family, other: Family) -> list[Family]:
        before = scaled("activations")
        if not before:
            return [other]
        return [dataclasses.replace(f, name=f"{f.name}, smoothed", before=before) for f in (family, other)]

    pairs = zip(first, second, strict=True)
    return [
        dataclasses.replace(family, variants=functools.partial(variants, family, other))
        for family, other in pairs
    ]


def _ranged(
    model: nn.Module, sites: Sequence[Site], stored: Mapping[str, Step], *, reduced: bool
) -> list[Family]:
    options: dict[str, JSON] = {} if reduced else {"reduced": False}
    ending = "" if reduced else ", full range"
    static = steps_of(model, sites, "static_int8", options)
    convolutions = {s.name: static[s.name] for s in sites if s.kind == "conv" and s.name in static}
    # ONNX Runtime decodes stored weights only once where no activation has a fixed range.
    gentler = {} if convolutions else stored
    found = []
    for rows in (False, True) if _mostly_linear(sites) else (False,):
        dynamic = steps_of(model, sites, "dynamic_int8", {**options, "per_row": rows})
        if dynamic:
            name = ("static and dynamic int8" if convolutions else "dynamic int8") + " per row" * rows
            found.append(Family(name + ending, {**stored, **convolutions, **dynamic}, gentler))
    if static:
        found.append(Family("static int8" + ending, {**stored, **static}))
    return found


def _mostly_linear(sites: Sequence[Site]) -> bool:
    """Whether linear layers do enough of the arithmetic for a second way to round their inputs to matter."""
    linear = sum(site.macs for site in sites if site.kind == "linear")
    return linear > LINEAR * sum(site.macs for site in sites)


def uniform(found: Sequence[Family], runtimes: Sequence[str]) -> tuple[list[Candidate], list[str]]:
    """Every family on every runtime that it pays on, and the reasons why others are left out; the original is none."""
    candidates, reasons = [], []
    for family in found:
        for runtime in runtimes:
            if (not family.steps and runtime == BASELINE) or family.only not in ("", runtime):
                continue
            reason = discover.method("runtimes", runtime).refuse(family.steps.values())
            if reason:
                reasons.append(f"{runtime} runs some families only: {reason}")
            else:
                candidates.append(Candidate(family, runtime))
    return candidates, list(dict.fromkeys(reasons))


def sensitivity(family: Family, sites: Sequence[Site], damages: Mapping[str, float]) -> list[str]:
    """The family's sites, the one to spare first in front: most damage for what its treatment gains.

    The gain of a site is its share of the arithmetic, or of the bytes for sites without any.
    """
    macs, size = sum(s.macs for s in sites) or 1, sum(s.bytes for s in sites) or 1
    gain = {s.name: max(s.macs / macs, 0.1 * s.bytes / size, 1e-6) for s in sites}
    able = [
        name for name in family.steps if name in damages and family.gentler.get(name) != family.steps[name]
    ]
    return sorted(able, key=lambda name: damages[name] / gain[name] ** 0.5, reverse=True)
