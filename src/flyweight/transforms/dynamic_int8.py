"""8-bit weights and 8-bit activations whose range is found anew for each input; the product is computed in integers.

Weights per output channel; activations per tensor or per row, unsigned, as in Jacob et al., "Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference" (arXiv 1712.05877, 2018).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from flyweight.analysis.bare import layer_at
from flyweight.records import Site
from flyweight.transforms._contract import Context
from flyweight.transforms._int8 import cannot_add, corrected, int8, misfit, require_bias
from flyweight.transforms._quantized import unfit


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the layer is rounded."""

    reduced: bool = True
    """Weights in [-64, 64]: the 16-bit sums of processors without VNNI cannot saturate then."""
    per_row: bool = False
    """Each row of the input (a token, a sample) has a range of its own, not the whole input one: closer, and slower."""
    bias: str = "correct"
    """What the mean output loses by rounding the weight: keep losing it, correct the bias where there is one, or add one."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_bias(self.bias)


def levels(site: Site) -> Sequence[Options]:
    """The options worth trying at a site."""
    return (Options(), Options(reduced=False), Options(per_row=True)) if site.kind == "linear" else ()


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why the options do not fit the site, or None."""
    if unfit(module):
        return unfit(module)
    if site.kind != "linear":
        return "dynamic ranges are for linear layers; use static_int8"
    return misfit(module, site.kind) or cannot_add(module, options.bias)


def closeness(options: Options) -> float:
    """Relative change of a model's output, all its sites rounded, that still counts as right in conformance checks."""
    return 0.1


def replace(model: nn.Module, site: Site, options: Options, context: Context) -> Mapping[str, nn.Module]:
    """The quantized layer at its path; the model is not changed."""
    module, seen = layer_at(model, site.name), context.statistics.get(site.name)
    layer = int8(module, site.kind, reduced=options.reduced)
    corrected(layer, module, site.kind, None if seen is None else seen.mean, options.bias)
    return {site.name: layer.dynamic(rows=options.per_row)}
