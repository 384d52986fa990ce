"""Weights in a code of `flyweight.codes`, picked by a rounding of `flyweight.roundings`; activations stay as they are.

Smaller files, the same arithmetic, as in Dettmers & Zettlemoyer, "The case for 4-bit precision" (arXiv 2212.09720, 2023);
codes and roundings name their own papers. The options are the code's and the rounding's own, in one record: what is not
named has their defaults, 8-bit integers per channel rounded to nearest. NaN weights are refused before any method runs.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from flyweight import discover
from flyweight.analysis.bare import layer_at
from flyweight.codes import Grid, integer, low_float, palette, ternary
from flyweight.errors import UsageError
from flyweight.records import JSON, Site
from flyweight.roundings import Seen, nearest, pick_parts
from flyweight.transforms import _options
from flyweight.transforms._contract import Context
from flyweight.transforms._quantized import QuantizedLayer, is_transposed, rows

_CODE, _ROUNDING = "integer", "nearest"
_LEAST = 1.0
"""Shares of the mean importance added to each row that is looked up: of rare words the examples tell too little."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the weight is stored, and how its entries are picked."""

    code: str = _CODE
    """A file of `flyweight.codes`."""
    rounding: str = _ROUNDING
    """A file of `flyweight.roundings`."""
    coding: Any = field(default_factory=integer.Options)
    """The code's own options."""
    picking: Any = field(default_factory=nearest.Options)
    """The rounding's own options."""

    def plain(self) -> dict[str, JSON]:
        """What `read` reads: all that differs from the defaults."""
        named: dict[str, JSON] = {"code": self.code} if self.code != _CODE else {}
        named |= {"rounding": self.rounding} if self.rounding != _ROUNDING else {}
        return named | _options.plain(self.coding) | _options.plain(self.picking)


LEVELS: Mapping[str, Sequence[Options]] = {
    "linear": (
        Options(),
        Options(coding=integer.Options(bits=4, group=32, symmetric=False, scale="float16")),
        Options(coding=integer.Options(bits=3, group=32, symmetric=False, scale="float16")),
        Options(code="palette", coding=palette.Options(bits=4, scaled=True)),
        Options(code="low_float", coding=low_float.Options()),
        Options(code="ternary", coding=ternary.Options(group=32, scale="float16")),
    ),
    "conv": (Options(), Options(code="palette", coding=palette.Options(bits=6))),
    "embedding": (Options(), Options(code="palette", coding=palette.Options(bits=6, scaled=True))),
}


def read(options: Mapping[str, JSON], where: str) -> Options:
    """The Options of plain values: code and rounding by name, and what either takes; raises UsageError."""
    names = {key: options.get(key, default) for key, default in (("code", _CODE), ("rounding", _ROUNDING))}
    for key, name in names.items():
        if not isinstance(name, str):
            raise UsageError(f"{key} must be a name", got=repr(name), where=where)
    parts = [discover.method(f"{key}s", str(name)) for key, name in names.items()]
    taken = [{f.name for f in dataclasses.fields(part.Options)} for part in parts]
    for name in options:
        if name not in names and not any(name in known for known in taken):
            near = difflib.get_close_matches(name, [*names, *taken[0], *taken[1]], n=1)
            hint = (
                f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(taken[0] | taken[1]))}"
            )
            raise UsageError("unknown option", got=repr(name), where=where, way_out=hint)
    code, rounding = (
        _options.read(part, {k: v for k, v in options.items() if k in known}, where)
        for part, known in zip(parts, taken, strict=True)
    )
    return Options(code=str(names["code"]), rounding=str(names["rounding"]), coding=code, picking=rounding)


def levels(site: Site) -> Sequence[Options]:
    """The options worth trying at a site, from the gentlest to the smallest."""
    return LEVELS[site.kind]


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why the options do not fit the site, or None."""
    if isinstance(module, QuantizedLayer):
        return "it is quantized already"
    rounding = discover.method("roundings", options.rounding)
    if site.kind == "embedding" and _needs(options) != "nothing" and not hasattr(rounding, "TABLES"):
        return f"embeddings have no inputs that {options.rounding} could learn from; round to nearest"
    if getattr(rounding, "WHOLE", False) and getattr(module, "groups", 1) != 1:
        return f"{options.rounding} takes layers whose output channels all read the same inputs"
    reason: str | None = _code(options).refuse(*rows(module, site.kind).shape, options.coding)
    return reason


def nbytes(module: nn.Module, site: Site, options: Mapping[str, JSON]) -> int:
    """Bytes of the site's stored weight in memory."""
    chosen = read(options, site.name)
    size: int = _code(chosen).nbytes(*rows(module, site.kind).shape, chosen.coding)
    return size


def learns(options: Options) -> Literal["nothing", "gram", "cross"]:
    """Which matrices `replace` asks the context for, behind the changes before the site: "cross" is both.

    Without a correction of drift the matrices of the original do as well, at a fifth of the time.
    """
    if _needs(options) != "gram" or not getattr(options.picking, "drift", 0.0):
        return "nothing"
    return "cross"


def closeness(options: Options) -> float:
    """Relative change of a model's output, all its sites rounded, that still counts as right in conformance checks."""
    return 0.05 if options == Options() else 2.0 if options.code == "ternary" else 0.6


def replace(model: nn.Module, site: Site, options: Options, context: Context) -> Mapping[str, nn.Module]:
    """The quantized layer at its path; the model is not changed.

    Without any statistics, as when a stored artifact is rebuilt, the weight is a placeholder.
    """
    module = layer_at(model, site.name)
    weight = rows(module, site.kind).float()
    if context.rebuilding:
        weight = torch.zeros_like(weight)
        options = dataclasses.replace(options, rounding=_ROUNDING, picking=nearest.Options())
    seen = context.statistics.get(site.name)
    energy = None if seen is None or seen.energy is None else _spread(seen.energy, module, site.kind)
    grid = _code(options).fit(weight, options.coding, energy)
    encoded = _picked(weight, grid, _seen(site, context, energy, options), options)
    layer = QuantizedLayer(
        module, options.code, options.coding, encoded, transposed=is_transposed(module, site.kind)
    )
    return {site.name: layer}


def _picked(
    weight: torch.Tensor, grid: Grid, seen: Sequence[Seen], options: Options
) -> tuple[torch.Tensor, Grid]:
    """The integers that the rounding picks, on a grid that the code can store."""
    rounding, code = discover.method("roundings", options.rounding), _code(options)
    if len(seen) == 1:
        integers, found = rounding.pick(weight, grid, seen[0], options.picking)
    else:
        integers, found = pick_parts(rounding.pick, weight, grid, seen, options.picking)
    return integers, found if found is grid else code.storable(found, options.coding)


def _seen(site: Site, context: Context, energy: torch.Tensor | None, options: Options) -> Sequence[Seen]:
    """What was seen of the layer's inputs: once, or of each group of a grouped convolution."""
    if _needs(options) != "gram":
        return [Seen(energy=energy)]
    gram = context.gram(site.name)
    if gram is None:
        raise UsageError(
            f"{options.rounding} must know the layer's inputs", got="a layer that no example reached", where=site.name,
            way_out="round it to nearest",
        )  # fmt: skip
    cross = context.cross(site.name)
    grams = _parts(gram)
    crosses = [None] * len(grams) if cross is None else _parts(cross)
    rounding = discover.method("roundings", options.rounding)
    counts = _importance(site, context) if getattr(rounding, "ROWS", False) else None
    rows = [None] * len(grams) if counts is None else counts.chunk(len(grams))
    parts = zip(grams, crosses, rows, strict=True)
    return [Seen(energy=own.diagonal(), gram=own, cross=other, rows=count) for own, other, count in parts]


def _importance(site: Site, context: Context) -> torch.Tensor | None:
    """What each output channel counts, (O,), or None; rows that are looked up count at least as the mean row does.

    A table's are powers of 4, so that its rows have few different scales, which a Huffman coder makes next to nothing.
    """
    counts = context.rows(site.name)
    if counts is None or (not site.tied and site.kind != "embedding"):
        return counts
    counts = counts + _LEAST * counts.mean()
    if site.kind == "embedding" and bool(counts.any()):
        counts = 4.0 ** (counts.log2() / 2).round()
    return counts


def _parts(matrix: torch.Tensor) -> Sequence[torch.Tensor]:
    """The matrices (I, I) of each group of a convolution; one for all other layers."""
    return [matrix] if matrix.ndim == 2 else list(matrix)


def _spread(energy: torch.Tensor, module: nn.Module, kind: str) -> torch.Tensor | None:
    """Energy per input of one output channel; None where channels differ in what they see (grouped convolution)."""
    if not bool(energy.any()):
        return None
    if kind != "conv":
        return energy
    weight = module.get_parameter("weight")
    if energy.numel() != weight.shape[1]:
        return None
    return energy.repeat_interleave(weight[0, 0].numel())


def _code(options: Options) -> ModuleType:
    return discover.method("codes", options.code)


def _needs(options: Options) -> str:
    return str(discover.method("roundings", options.rounding).NEEDS)
