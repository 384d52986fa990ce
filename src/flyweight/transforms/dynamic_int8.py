"""8-bit weights and 8-bit activations whose range is found anew for each input; the product is computed in integers.

Weights per output channel; activations per tensor, unsigned, as in Jacob et al., "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference" (arXiv 1712.05877, 2018).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from flyweight.records import Site
from flyweight.transforms._contract import Context
from flyweight.transforms._int8 import int8, misfit
from flyweight.transforms._quantized import QuantizedLayer


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the layer is rounded."""

    reduced: bool = True
    """Weights in [-64, 64]: the 16-bit sums of processors without VNNI cannot saturate then."""


def levels(site: Site) -> Sequence[Options]:
    """The options worth trying at a site."""
    return (Options(), Options(reduced=False)) if site.kind == "linear" else ()


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why the options do not fit the site, or None."""
    if isinstance(module, QuantizedLayer):
        return "it is quantized already"
    if site.kind != "linear":
        return "dynamic ranges are for linear layers; use static_int8"
    return misfit(module, site.kind)


def closeness(options: Options) -> float:
    """Relative change of a model's output, all its sites rounded, that still counts as right in conformance checks."""
    return 0.1


def replace(model: nn.Module, site: Site, options: Options, context: Context) -> Mapping[str, nn.Module]:
    """The quantized layer at its path; the model is not changed."""
    layer = int8(model.get_submodule(site.name), site.kind, reduced=options.reduced)
    return {site.name: layer.dynamic()}
