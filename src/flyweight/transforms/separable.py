"""A convolution as one that looks at each channel by itself, and one of single pixels that mixes what was seen.

As in Howard et al., "MobileNets" (arXiv 1704.04861, 2017), without training: a channel's kernels are the first right singular
vectors of all that read it (Guo et al., "Network decoupling", arXiv 1808.05517, 2018), and the mixture is that of least
squares on the inputs seen. Where there is a bias, it takes over what the mean input loses. Both are sites, "layer.first"
and "layer.second", for later stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from flyweight.analysis.importance import DAMPING
from flyweight.codes._options import require
from flyweight.records import Site
from flyweight.transforms import low_rank
from flyweight.transforms._contract import Context
from flyweight.transforms._quantized import QuantizedLayer, rows

INSIDE = low_rank.INSIDE
"""The layers inside the new module, which are sites as well."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is looked at."""

    kernels: int = 1
    """Kernels for each input channel, at least 1."""

    def __post_init__(self) -> None:
        """Check the range."""
        require(self.kernels >= 1, "kernels", "at least 1", self.kernels)


def levels(site: Site) -> Sequence[Options]:
    """The options worth trying at a site, from the gentlest on."""
    return (Options(kernels=3), Options(kernels=2), Options()) if site.kind == "conv" else ()


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why the options do not fit the site, or None."""
    if isinstance(module, QuantizedLayer | low_rank.LowRank):
        return "it is quantized or factorized already"
    if site.kind != "conv" or not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or module.groups != 1:
        return "only convolutions whose output channels all read all inputs become separable"
    if site.tied:
        return f"its weight must stay tied with {', '.join(site.tied)}"
    outputs, inputs, kernel = len(module.weight), module.weight.shape[1], module.weight[0, 0].numel()
    if options.kernels * inputs * (kernel + outputs) >= outputs * inputs * kernel:
        return (
            f"{options.kernels} kernels for each of {inputs} channels, mixed, are not smaller than the weight"
        )
    plain = low_rank.is_plain(module, site.kind)
    return None if plain else "it does more than a convolution does"


def closeness(options: Options) -> float:
    """Relative change of a model's output, all its sites separable, that still counts as right in conformance checks."""
    return 2.0


def replace(model: nn.Module, site: Site, options: Options, context: Context) -> Mapping[str, nn.Module]:
    """The two layers at the site's path; the model is not changed.

    Without a Gram matrix, as when a stored artifact is rebuilt, all inputs count alike.
    """
    module = model.get_submodule(site.name)
    weight = rows(module, site.kind).double()  # (O, I * K)
    like = module.get_parameter("weight")
    channels = like.shape[1]
    mean, gram = (None, None) if context.rebuilding else low_rank.seen(site.name, module, context)
    kernels = _kernels(weight.view(len(weight), channels, -1), options.kernels)  # (I, m, K)
    looking = _spread(kernels)
    mixing = _mixing(weight, looking, gram)
    bias = getattr(module, "bias", None)
    if mean is not None and bias is not None:
        bias = bias.detach() + (weight - mixing @ looking) @ mean
    first = kernels.flatten(0, 1)
    return {site.name: low_rank.pair(module, site.kind, first, mixing, bias, groups=channels)}


def together(
    model: nn.Module, steps: Mapping[str, Options], context: Context
) -> tuple[Mapping[str, nn.Module], Context]:
    """The two layers at each of several sites, and what is known of the model that has them; the given one is not changed."""
    changes: dict[str, nn.Module] = {}
    for path, options in steps.items():
        site = Site(name=path, kind="conv", parameters=0, bytes=0, macs=0)
        changes |= replace(model, site, options, context)
    return changes, low_rank.behind(model, changes, context)


def _kernels(weight: torch.Tensor, count: int) -> torch.Tensor:
    """For each input channel the directions (I, m, K) of most of what reads it (O, I, K); zeros where there are fewer."""
    found = torch.linalg.svd(weight.movedim(1, 0), full_matrices=False).Vh[:, :count]  # (I, at most m, K)
    return torch.cat([found, found.new_zeros(len(found), count - found.shape[1], found.shape[2])], 1)


def _spread(kernels: torch.Tensor) -> torch.Tensor:
    """Kernels (I, m, K) as a matrix (I * m, I * K) over all inputs."""
    found: torch.Tensor = torch.block_diag(*kernels)
    return found


def _mixing(weight: torch.Tensor, looking: torch.Tensor, gram: torch.Tensor | None) -> torch.Tensor:
    """The mixture (O, I * m) whose outputs are nearest to the weight's (O, I * K) on the inputs seen."""
    if gram is None:
        return weight @ looking.T
    inner = looking @ gram @ looking.T
    inner.diagonal().add_(DAMPING**2 * float(inner.diagonal().mean()) or 1.0)
    found: torch.Tensor = torch.linalg.solve(inner, looking @ gram @ weight.T)
    return found.T
