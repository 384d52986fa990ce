"""Weights of 4 or 8 bits in groups, and inputs rounded to 8-bit integers in the same groups: multiplied without decoding.

Every group of inputs gets the scale of its largest entry, anew for each input. A runtime multiplies integers by integers and
scales each group's sum once, as in Jacob et al., "Quantization and training of neural networks" (arXiv 1712.05877, 2018), by
groups as in Dettmers et al., "8-bit optimizers via block-wise quantization" (arXiv 2110.02861, 2021). It reads few bytes a
weight, so it pays where few rows are multiplied, and in memory. The options are those of `weight_only` with code `integer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from torch import nn

from flyweight.codes import integer
from flyweight.codes._options import require, require_one_of
from flyweight.errors import UsageError
from flyweight.records import JSON, Site
from flyweight.transforms import weight_only
from flyweight.transforms._contract import Context
from flyweight.transforms._quantized import QuantizedLayer, unfit

BITS = (4, 8)
GROUPS = (16, 32, 64, 128, 256)
"""Lengths of groups that are multiplied as they are."""
_PRESET: Mapping[str, JSON] = MappingProxyType(
    {"bits": 4, "group": 32, "symmetric": False, "scale": "float16"}
)
_CODING = integer.Options(bits=4, group=32, symmetric=False, scale="float16")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the weight is rounded; inputs have no options."""

    weights: weight_only.Options = field(default_factory=lambda: weight_only.Options(coding=_CODING))
    """Code `integer`, 4 or 8 bits, in groups of 16, 32, 64, 128 or 256; any rounding."""

    def __post_init__(self) -> None:
        """Check that the weights can be multiplied as they are."""
        require(self.weights.code == "integer", "code", "integer", self.weights.code)
        require_one_of(self.weights.coding.bits, "bits", BITS)
        require_one_of(self.weights.coding.group, "group", GROUPS)

    def plain(self) -> dict[str, JSON]:
        """What `read` reads: all that differs from the defaults."""
        coding = self.weights.coding
        pairs = ((f.name, getattr(coding, f.name)) for f in dataclasses.fields(coding))
        told = {name: value for name, value in pairs if value != getattr(_CODING, name)}
        names = {f.name for f in dataclasses.fields(coding)}
        return told | {name: value for name, value in self.weights.plain().items() if name not in names}


def read(options: Mapping[str, JSON], where: str) -> Options:
    """The Options of plain values, as `weight_only` reads them; 4 bits in groups of 32 by default; raises UsageError."""
    if options.get("code", "integer") != "integer":
        way_out = "use weight_only"
        raise UsageError(
            "only evenly spaced integers are multiplied",
            got=repr(options["code"]),
            where=where,
            way_out=way_out,
        )
    weights = weight_only.read({**_PRESET, **options}, where)
    try:
        return Options(weights=weights)
    except UsageError as error:
        raise error.at(f"{where}.{error.where}") from None


def levels(site: Site) -> Sequence[Options]:
    """The options worth trying at a site, from the gentlest to the smallest."""
    eight = integer.Options(bits=8, group=32, scale="float16")
    return (Options(weights=weight_only.Options(coding=eight)), Options()) if site.kind == "linear" else ()


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why the options do not fit the site, or None."""
    if unfit(module):
        return unfit(module)
    if site.kind != "linear":
        return "blocks of integers are multiplied in linear layers only; use weight_only"
    if getattr(site, "tied", ()):
        return f"its weight is also that of {site.tied[0]}, which does not round its inputs; use weight_only"
    return weight_only.refuse(site, options.weights, module)


def learns(options: Options) -> Literal["nothing", "gram", "cross"]:
    """Which matrices `replace` asks the context for."""
    return weight_only.learns(options.weights)


def closeness(options: Options) -> float:
    """Relative change of a model's output, all its sites rounded, that still counts as right in conformance checks."""
    return 0.1 if options.weights.coding.bits == max(BITS) else 0.5


def replace(model: nn.Module, site: Site, options: Options, context: Context) -> Mapping[str, nn.Module]:
    """The quantized layer at its path; the model is not changed."""
    found = weight_only.replace(model, site, options.weights, context)
    return {path: layer.blocks() for path, layer in found.items() if isinstance(layer, QuantizedLayer)}
