"""8-bit weights and 8-bit activations with ranges fixed by calibration; the product is computed in integers.

Weights per output channel, signed; activations per tensor, unsigned, as in Jacob et al., "Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference" (arXiv 1712.05877, 2018).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from flyweight.analysis.bare import layer_at
from flyweight.codes._options import require
from flyweight.records import Site
from flyweight.transforms._contract import Context
from flyweight.transforms._int8 import activation_grid, cannot_add, corrected, int8, misfit, require_bias
from flyweight.transforms._quantized import unfit

RANGES = ("minmax", "percentile", "mse")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the layer is rounded."""

    reduced: bool = True
    """Weights in [-64, 64]: the 16-bit sums of processors without VNNI cannot saturate then."""
    range: str = "mse"
    """How the activations' range is chosen from the examples: minmax, percentile or mse."""
    bias: str = "correct"
    """What the mean output loses by rounding the weight: keep losing it, correct the bias where there is one, or add one."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.range in RANGES, "range", f"one of {', '.join(RANGES)}", self.range)
        require_bias(self.bias)


def levels(site: Site) -> Sequence[Options]:
    """The options worth trying at a site."""
    return (Options(), Options(reduced=False)) if site.kind in ("linear", "conv") else ()


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why the options do not fit the site, or None."""
    if unfit(module):
        return unfit(module)
    if site.kind == "embedding":
        return "embeddings have no input range; use weight_only"
    return misfit(module, site.kind) or cannot_add(module, options.bias)


def closeness(options: Options) -> float:
    """Relative change of a model's output, all its sites rounded, that still counts as right in conformance checks."""
    return 0.15


def replace(model: nn.Module, site: Site, options: Options, context: Context) -> Mapping[str, nn.Module]:
    """The quantized layer at its path; the model is not changed.

    Without statistics for the site, as when a stored artifact is rebuilt, the ranges are placeholders of 1.
    """
    seen = context.statistics.get(site.name)
    input_grid = (1.0, 0) if seen is None else activation_grid(seen.input, options.range)
    output_grid = (1.0, 0) if seen is None else activation_grid(seen.output, options.range)
    module = layer_at(model, site.name)
    layer = int8(module, site.kind, reduced=options.reduced, input_scale=input_grid[0])
    corrected(layer, module, site.kind, None if seen is None else seen.mean, options.bias)
    return {site.name: layer.static(input_grid, output_grid)}
