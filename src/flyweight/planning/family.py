"""What a candidate is: a family of steps, one way to treat every site, on a runtime; and the steps that a method gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from flyweight import discover
from flyweight.analysis.bare import layer_at
from flyweight.records import JSON, Plan, Site, Step
from flyweight.transforms import _options
from flyweight.transforms.weight_only import nbytes

WIDE = 8
"""Bits from which on rounding to nearest is as good as any."""


@dataclass(frozen=True, eq=False)
class Family:
    """One way to treat every site, and the gentler way to treat those that it would hurt."""

    name: str
    steps: Mapping[str, Step] = field(default_factory=dict)
    gentler: Mapping[str, Step] = field(default_factory=dict)
    """For a spared site; a site without an entry is left as it is."""
    before: tuple[Step, ...] = ()
    """Steps that keep what the model computes and make it easier to round."""
    cuts: tuple[Step, ...] = ()
    """Steps that take units out before all others."""
    variants: Callable[[], Sequence[Family]] = tuple
    """As fast and as large, but rounded otherwise; tried in turn when this family breaks the contract."""
    loss: float = 0.0
    """What its weights add to the model's loss, in nats, by prediction; 0: not told."""
    at: Callable[[float], Family | None] | None = None
    """The same with another loss, if there is one."""
    only: str = ""
    """The one runtime that it is made for; empty: it is tried on all."""
    saves: int | None = None
    """Bytes that its codes take from the file, as far as they are known before it is built; None: they are not."""

    @property
    def methods(self) -> frozenset[str]:
        """The methods it uses."""
        return frozenset(step.method for step in self.steps.values())

    def plan(self, folds: Sequence[Step], spared: Iterable[str] = ()) -> Plan:
        """The family's plan, with some sites spared. Norms are folded though nothing else is done: all share one export."""
        chosen = {**self.steps}
        for name in spared:
            del chosen[name]
            if name in self.gentler:
                chosen[name] = self.gentler[name]
        return Plan(
            (*self.cuts, *folds, *self.before, *(chosen[name] for name in self.steps if name in chosen))
        )


@dataclass(frozen=True)
class Candidate:
    """A family on a runtime, with some sites spared."""

    family: Family
    runtime: str
    spared: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        return f"{self.family.name}, {len(self.spared)} layers spared" if self.spared else self.family.name

    def sparing(self, sites: Iterable[str]) -> Candidate:
        """The same with other sites spared."""
        return dataclasses.replace(self, spared=tuple(sites))


def weighed(family: Family, model: nn.Module, sites: Sequence[Site]) -> Family:
    """The family with what it saves. How small a coder packs weights only a file tells."""
    saves = 0
    for site in sites:
        step = family.steps.get(site.name)
        if step is None:
            continue
        if step.options.get("code") == "entropy":
            return family
        layer = layer_at(model, site.name)
        weight = layer.get_parameter("weight")
        saves += weight.numel() * weight.element_size() - _stored(layer, site, step)
    return dataclasses.replace(family, saves=saves)


def _stored(layer: nn.Module, site: Site, step: Step) -> int:
    """Bytes of a site's weight as a step stores it; of integers that are multiplied, those without their scales."""
    if step.method == "weight_only":
        return nbytes(layer, site, step.options)
    return layer.get_parameter("weight").numel() // (2 if step.method == "block_int8" else 1)


def fed(model: nn.Module, sites: Sequence[Site], options: Mapping[str, JSON]) -> dict[str, Step]:
    """Weights stored by options, rounded by error feedback where inputs are known and bits are fewer than 8."""
    found = steps_of(model, sites, "weight_only", options)
    if options.get("bits") != WIDE:
        found |= steps_of(model, sites, "weight_only", {**options, "rounding": "error_feedback"})
    return found


def steps_of(
    model: nn.Module, sites: Sequence[Site], method: str, options: Mapping[str, JSON]
) -> dict[str, Step]:
    """The method's step at every site that takes it; options it refuses at a site leave that site out."""
    module = discover.method("transforms", method)
    read = _options.read(module, options, method)
    return {
        site.name: Step(method, site.name, _options.plain(read))
        for site in sites
        if module.levels(site) and module.refuse(site, read, layer_at(model, site.name)) is None
    }
