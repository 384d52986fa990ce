"""Weights as 8- or 4-bit integers; activations stay as they are. Smaller files, the same arithmetic.

Per output channel, or per group of inputs with a scale each, as in Dettmers & Zettlemoyer, "The case for 4-bit precision"
(arXiv 2212.09720, 2023). NaN weights are refused before any method runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from flyweight.records import Site
from flyweight.transforms._contract import Context
from flyweight.transforms._grid import grid
from flyweight.transforms._options import require
from flyweight.transforms._quantized import QuantizedLayer, quantized, rows


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the weight is stored."""

    bits: int = 8
    """8 or 4 bits a weight."""
    group: int | None = None
    """Inputs that share a scale: 16, 32, 64, 128 or 256; None: one scale per output channel."""
    symmetric: bool = True
    """Zero in the middle of the grid; False stores a zero point per scale (4 bits only)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.bits in (8, 4), "bits", "8 or 4", self.bits)
        require(
            self.group in (None, 16, 32, 64, 128, 256), "group", "16, 32, 64, 128, 256 or None", self.group
        )
        require(self.symmetric or self.bits == 4, "symmetric", "true at 8 bits", self.symmetric)


def levels(site: Site) -> Sequence[Options]:
    """The options worth trying at a site, from the gentlest to the smallest."""
    if site.kind == "linear":
        return (Options(), Options(bits=4, group=32, symmetric=False))
    return (Options(),)


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why the options do not fit the site, or None."""
    if isinstance(module, QuantizedLayer):
        return "it is quantized already"
    if site.kind != "linear" and (options.bits == 4 or options.group is not None):
        return "4 bits and groups are for linear layers here; use 8 bits without groups"
    inputs = rows(module, site.kind).shape[1]
    if options.group is not None and inputs % options.group:
        return f"its {inputs} inputs do not divide into groups of {options.group}"
    return None


def closeness(options: Options) -> float:
    """Relative change of a model's output, all its sites rounded, that still counts as right in conformance checks."""
    return 0.3 if options.bits == 4 else 0.05


def replace(model: nn.Module, site: Site, options: Options, context: Context) -> Mapping[str, nn.Module]:
    """The quantized layer at its path; the model is not changed."""
    on = grid(options.bits, options.group, options.symmetric)
    energy = context.statistics[site.name].energy if site.name in context.statistics else None
    return {site.name: quantized(model.get_submodule(site.name), site.kind, on, energy)}
