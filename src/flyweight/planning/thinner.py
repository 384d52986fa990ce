"""How many units of each group of coupled dimensions go, so that a loss buys as much as it can: one budget over all groups.

Each group has a level for every few of its units, those that count least going first. What it saves is arithmetic, or
bytes; what it costs is the loss that `analysis.importance.course` predicts, in nats for channels, heads and neurons alike.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from flyweight.analysis import importance
from flyweight.analysis.coupling import Group
from flyweight.errors import DataError
from flyweight.planning.allocate import Level, allocate, smallest
from flyweight.planning.family import Family
from flyweight.records import Site, Step
from flyweight.transforms import Context, prune

FIRST = 0.2
"""Share of the arithmetic, or of the bytes, that goes in the first attempt."""
LEAST = 0.02
"""Share that is worth a measurement."""
MULTIPLES = ((32, 128), (16, 64), (8, 16))
"""Numbers of channels and neurons that runtimes like to have a multiple of, each with how many units there must be for it."""


@dataclass(frozen=True)
class Thinner:
    """What can go of a model."""

    sites: Mapping[str, Site]
    groups: Mapping[str, Group]
    levels: Mapping[str, Sequence[Level]]
    """By group, the one that keeps all last; bytes are the multiplications, or bytes, of what the group stands in."""
    costs: Callable[[Site], int]

    def cut(self, loss: float | None = None) -> tuple[tuple[Step, ...], float]:
        """Steps that add about so many nats to the loss, by prediction, and what they do; None: FIRST goes, or half."""
        if loss is None:
            most, least = (sum(some[end].bytes for some in self.levels.values()) for end in (-1, 0))
            first = FIRST * sum(map(self.costs, self.sites.values()))
            found = allocate(self.levels, most - min(first, (most - least) / 2))
        else:
            found = smallest(self.levels, loss)
        chosen = [level for level in (found or {}).values() if level.step.options]
        return tuple(level.step for level in chosen), math.fsum(level.damage for level in chosen)

    def left(self, steps: Sequence[Step]) -> float:
        """The share of the arithmetic, or of the bytes, that steps leave."""
        shares: dict[str, float] = {}
        for step in steps:
            stay = len(prune.units_of(str(step.options["kept"]), step.site)) / self.groups[step.site].units
            for name, share in _shares(self.groups[step.site], self.sites):
                shares[name] = shares.get(name, 1.0) * (1 - share * (1 - stay))
        total = sum(map(self.costs, self.sites.values()))
        return sum(self.costs(site) * shares.get(name, 1.0) for name, site in self.sites.items()) / max(
            total, 1
        )

    def thinned(self, family: Family, loss: float | None = None) -> Family | None:
        """A family with fewer units, whose loss can be chosen; None where hardly anything can go."""
        steps, costs = self.cut(loss)
        gone = 1 - self.left(steps)
        if gone < LEAST:
            return None
        name = f"{family.name}, {gone:.0%} cut away"
        at = functools.partial(self.thinned, family)
        return dataclasses.replace(family, name=name, cuts=steps, loss=costs, at=at)


def thinner(
    model: nn.Module, folded: nn.Module, sites: Sequence[Site], context: Context, *, size: bool
) -> Thinner:
    """What can go of a model; folded: the same with batch norms folded, to which sites and context belong.

    size: bytes are saved, and not arithmetic. A group of which the examples do not tell what it counts keeps its units.
    """
    costs = _bytes if size else _macs
    known = {site.name: site for site in sites}
    found = {}
    for group in prune.groups(model, context.examples[0]).groups if len(context.examples) else ():
        levels = _levels(folded, group, known, context, costs)
        if len(levels) > 1:
            found[group.name] = (group, levels)
    groups = {name: group for name, (group, _) in found.items()}
    return Thinner(known, groups, {name: levels for name, (_, levels) in found.items()}, costs)


def _levels(
    model: nn.Module, group: Group, sites: Mapping[str, Site], context: Context, costs: Callable[[Site], int]
) -> list[Level]:
    """A group's levels, the one that keeps all last; none where nothing is saved or too little is known."""
    whole = sum(costs(sites[name]) * share for name, share in _shares(group, sites))
    readers = list(importance.readers(model, group, context.gram, context.rows))
    if not whole or any(context.rows(reader.path) is None for reader in readers):
        return []
    try:
        course = importance.course(model, group, context.gram, context.rows)
    except DataError:
        return []
    losses = np.concatenate([[0.0], course.missed.cumsum(0).numpy() / 2])
    order = course.order.tolist()
    found, many = [], _multiple(group)
    for stay in range(many, group.units, many):
        kept = prune.text_of(sorted(order[group.units - stay :]))
        options = prune.Options(ratio=1 - stay / group.units, kept=kept, group=group)
        step = Step("prune", group.name, options.plain())
        found.append(Level(step, int(whole * stay / group.units), float(losses[group.units - stay])))
    return [*found, Level(Step("prune", group.name, {}), int(whole), 0.0)]


def _multiple(group: Group) -> int:
    """The number of units that go together."""
    if group.kind == "heads":
        return 1
    return next((many for many, least in MULTIPLES if group.units >= least), 1)


def _shares(group: Group, sites: Mapping[str, Site]) -> Iterator[tuple[str, float]]:
    """For each dimension of a site's weight in which a group stands, the site and the share of it that is the group's."""
    for place in group.places:
        path, _, name = place.name.rpartition(".")
        if name == "weight" and place.axis is not None and path in sites:
            yield path, len(place.indices(range(group.units))) / place.size


def _macs(site: Site) -> int:
    return site.macs


def _bytes(site: Site) -> int:
    return site.bytes
