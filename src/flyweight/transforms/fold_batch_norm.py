"""Folds a batch norm into the convolution before it: one layer less, and what is rounded later is what will run.

Exact up to rounding: Jacob et al. (arXiv 1712.05877, 2018), section 3.2.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from flyweight.codes._options import require
from flyweight.records import Site
from flyweight.transforms._contract import Context
from flyweight.transforms._quantized import QuantizedLayer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which norm is folded."""

    norm: str = ""
    """Path of the batch norm that alone consumes the convolution's output."""

    def __post_init__(self) -> None:
        """Check that a norm is named."""
        require(bool(self.norm), "norm", "the path of a batch norm", self.norm)


def levels(site: Site) -> Sequence[Options]:
    """None by itself: the traced graph says which norm follows which convolution."""
    return ()


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why the options do not fit the site, or None."""
    if isinstance(module, QuantizedLayer):
        return "it is quantized already"
    return None if site.kind == "conv" else "only convolutions take in a batch norm"


def replace(model: nn.Module, site: Site, options: Options, context: Context) -> Mapping[str, nn.Module]:
    """The convolution with the norm folded in, and an identity in the norm's place; the model is not changed."""
    conv = copy.deepcopy(model.get_submodule(site.name))
    norm = cast(nn.BatchNorm2d, dict(model.named_modules()).get(options.norm))
    fits = isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
    rule = f"a batch norm with running statistics of {len(cast(nn.Parameter, conv.weight))} channels"
    require(fits and norm.num_features == len(cast(nn.Parameter, conv.weight)), "norm", rule, options.norm)
    mean, variance = cast(torch.Tensor, norm.running_mean), cast(torch.Tensor, norm.running_var)
    weight, bias = cast(nn.Parameter, conv.weight), cast("nn.Parameter | None", conv.bias)
    folded = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, norm.weight, norm.bias)
    conv.weight, conv.bias = (nn.Parameter(p.detach(), requires_grad=weight.requires_grad) for p in folded)
    return {site.name: conv, options.norm: nn.Identity()}
