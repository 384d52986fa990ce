"""Units of coupled groups taken out for good: channels, heads, neurons, recurrent units, with all that belongs to them.

A step's site is a group of `analysis.coupling`, such as "layers.0.mlp.up_proj:neurons". Which units go is told by importance;
layers that read the group make up for them by least squares (Kurtic et al., arXiv 2302.04089, 2023). What was decided is
written into the step's options, as numbers and names alone, so that the step can be applied again without looking at data,
and a stored artifact be rebuilt.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flyweight.analysis import importance
from flyweight.analysis.coupling import Coupling, Group, couple, group_from_json
from flyweight.codes._options import require, require_one_of
from flyweight.errors import UsageError
from flyweight.records import JSON, Batch, Plan, Site, Step, plain
from flyweight.transforms import _options, _removal
from flyweight.transforms._compensation import compensated
from flyweight.transforms._contract import Context

_NO_LAYER = "a group of coupled dimensions is pruned, not a layer"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How many units go, and which."""

    ratio: float = 0.25
    """Share of the units that go, in [0, 1); at least one stays."""
    importance: str = "second_order"
    """What tells which go: one of `analysis.importance.KINDS`."""
    compensate: bool = True
    """Whether layers that read the group make up for what is gone."""
    multiple: int = 1
    """The number that stays is rounded up to a multiple of this; at least 1."""
    seed: int = 0
    """Of random importance, and of the answers that slopes are taken of; at least 0."""
    kept: str = ""
    """The units that stay, as "0-5,7"; empty: whatever ratio and importance say."""
    group: Group | None = None
    """What belongs to the units, as it was found when the units were chosen; comes with kept."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(0 <= self.ratio < 1, "ratio", "in [0, 1)", self.ratio)
        require_one_of(self.importance, "importance", importance.KINDS)
        require(self.multiple >= 1, "multiple", "at least 1", self.multiple)
        require(self.seed >= 0, "seed", "at least 0", self.seed)
        require(bool(self.kept) == (self.group is not None), "kept", "told with its group", self.kept)

    def plain(self) -> dict[str, JSON]:
        """The options that differ from their defaults, as plain JSON values."""
        fields = [(item.name, item.default) for item in dataclasses.fields(self)]
        return {name: plain(getattr(self, name)) for name, usual in fields if getattr(self, name) != usual}


def read(options: Mapping[str, JSON], where: str) -> Options:
    """The options of plain values; raises UsageError that names the option and the place."""
    given: dict[str, Any] = dict(options)
    if given.get("group") is not None:
        given["group"] = group_from_json(given["group"], f"{where}.group")
    found: Options = _options.flat(Options, given, where)
    return found


def levels(site: Site) -> Sequence[Options]:
    """None at a layer: the traced graph says which groups there are."""
    return ()


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why no layer can be a site of this method."""
    return _NO_LAYER


def closeness(options: Options) -> float:
    """How far outputs may move: removing units may change anything."""
    return math.inf


def groups(model: nn.Module, batch: Batch) -> Coupling:
    """The groups of a model whose removal was proven on a batch, and why other dimensions keep their size."""
    return _removal.proven(model, couple(model, batch), batch)


def proposals(model: nn.Module, examples: Sequence[Batch]) -> Iterator[Plan]:
    """One plan: a quarter of each group that can be removed, told by magnitude, if there is any."""
    steps = [
        Step("prune", one.name, {"importance": "magnitude"}) for one in groups(model, examples[0]).groups
    ]
    yield from [Plan(tuple(steps))] if steps else []


def complete(model: nn.Module, options: Mapping[str, Options], context: Context) -> Mapping[str, Options]:
    """The options by group, with the units that stay written down where they were not.

    Raises UsageError for a group that the model does not have or that was not proven, or without examples.
    """
    open_ones = {name: chosen for name, chosen in options.items() if not chosen.kept}
    if not open_ones:
        return options
    if not len(context.examples):
        raise UsageError("units are chosen by examples", got="none", where=next(iter(open_ones)))
    coupling = groups(model, context.examples[0])
    known = {group.name: group for group in coupling.groups}
    for name in open_ones:
        if name not in known:
            raise _unknown(name, coupling)
    scores = _scores(model, {name: (known[name], chosen) for name, chosen in open_ones.items()}, context)
    done = {name: _decided(known[name], chosen, scores[name]) for name, chosen in open_ones.items()}
    return {**options, **done}


def cut(model: nn.Module, options: Mapping[str, Options], context: Context) -> nn.Module:
    """A new model in eval mode without the units; raises as `complete` does, and where a group is not the model's."""
    decided = complete(model, options, context)
    found = {name: chosen.group for name, chosen in decided.items() if chosen.group is not None}
    for name, group in found.items():
        if group.name != name:
            raise UsageError(_NO_LAYER, got=f"the group {group.name}", where=name)
    kept = {name: units_of(chosen.kept, name) for name, chosen in decided.items()}
    _removal.check(model, list(found.values()))
    some, values = list(found.values()), dict[str, torch.Tensor]()
    making_up = {name: kept[name] for name, chosen in decided.items() if chosen.compensate}
    if making_up and not context.rebuilding and len(context.examples):
        silent = _removal.silenced(model, some, kept).eval()
        stay, fitted = (_removal.indices(some, each) for each in (kept, making_up))
        values = compensated(model, silent, stay, fitted, context)
    return _removal.removed(model, some, kept, values).eval()


def units_of(text: str, where: str) -> list[int]:
    """The numbers of "0-5,7"; raises UsageError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or len(part) > 20:
            raise UsageError('units are written as "0-5,7"', got=repr(text[:40]), where=where)
        low, high = int(first), int(last or first)
        if not (found[-1] if found else -1) < low <= high < 2**20:
            raise UsageError("units are written in ascending order", got=repr(part), where=where)
        found += range(low, high + 1)
    return found


def text_of(units: Sequence[int]) -> str:
    """Numbers in ascending order as "0-5,7"."""
    runs: list[list[int]] = []
    for unit in units:
        if runs and unit == runs[-1][1] + 1:
            runs[-1][1] = unit
        else:
            runs.append([unit, unit])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _scores(
    model: nn.Module, chosen: Mapping[str, tuple[Group, Options]], context: Context
) -> Mapping[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for kind, seed in sorted({(options.importance, options.seed) for _, options in chosen.values()}):
        some = [group for group, own in chosen.values() if (own.importance, own.seed) == (kind, seed)]
        if kind in importance.SLOPES:
            each = importance.by_slopes(kind, model, some, context.examples, seed=seed)
        else:
            each = [importance.local(kind, model, group, context.gram, context.rows, seed) for group in some]
        found |= {group.name: score for group, score in zip(some, each, strict=True)}
    return found


def _decided(group: Group, options: Options, scores: torch.Tensor) -> Options:
    """The options with the units that count most."""
    many = group.units - math.floor(group.units * options.ratio)
    many = min(group.units, math.ceil(many / options.multiple) * options.multiple)
    kept = sorted(scores.argsort(descending=True, stable=True)[:many].tolist())
    return dataclasses.replace(options, kept=text_of(kept), group=group)


def _unknown(name: str, coupling: Coupling) -> UsageError:
    known = [group.name for group in coupling.groups]
    reason = coupling.reason or coupling.fixed.get(name, "")
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the model has {len(known)} groups"
    return UsageError(
        "prune takes groups that can be removed", got=reason or repr(name), where=name, way_out=hint
    )
