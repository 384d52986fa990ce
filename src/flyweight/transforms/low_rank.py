"""A layer as two thinner ones: the products that matter for the inputs seen, and nothing else.

Of all weights of one rank the nearest at the layer's output is U U^T W, U being the first eigenvectors of W G W^T, where G
is the mean outer product of its inputs: the truncated SVD of W G^(1/2), as in Wang et al., "SVD-LLM" (arXiv 2403.07378,
2024), and Yuan et al., "ASVD" (arXiv 2312.05821, 2023), without a root or an inverse of G, which may be singular. The layer
becomes `first`, U^T W, and `second`, U with the bias: two linear layers, or a convolution and one of single pixels (Zhang et
al., "Accelerating very deep convolutional networks", arXiv 1505.06798, 2015). Where there is a bias, it takes over what the
mean input loses, and G is taken around that mean. Both are sites, "layer.first" and "layer.second", for later stages.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from flyweight.analysis import gram as grams
from flyweight.analysis.bare import is_bare, layer_at
from flyweight.analysis.sites import analyse
from flyweight.codes._options import require
from flyweight.codes._search import TINY
from flyweight.errors import ModelError, foreign
from flyweight.records import Plan, Site, Step
from flyweight.transforms._contract import Context
from flyweight.transforms._copies import view
from flyweight.transforms._quantized import Decoded, QuantizedLayer, rows

INSIDE = ("first", "second")
"""The layers inside the new module, which are sites as well."""
_HALVINGS = 60
_PROBED = 4
"""Output channels that are compared with what two layers give."""
_CLOSE = 64.0
"""Roundings by which the largest of them may differ."""
_CHANNELS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How thin."""

    keep: float = 0.5
    """Share of the weight's entries that both layers together have at most, in (0, 1)."""
    rank: int | None = None
    """Channels between the two, at least 1; None: as many as `keep` allows."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(0 < self.keep < 1, "keep", "in (0, 1)", self.keep)
        require(self.rank is None or self.rank >= 1, "rank", "at least 1, or None", self.rank)

    def width(self, outputs: int, inputs: int) -> int:
        """Channels between the two layers of a weight of that shape."""
        return self.rank or max(1, int(self.keep * outputs * inputs / (outputs + inputs)))


class LowRank(nn.Module):
    """Two layers in the place of one."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the second layer makes of what the first makes of the one input, whatever it is called."""
        return self.second(self.first(*args, *kwargs.values()))

    @property
    def weight(self) -> torch.Tensor:
        """The product of the two weights, in the shape of the one that they replace, for code that asks for it."""
        first, second = (cast(torch.Tensor, layer.weight) for layer in (self.first, self.second))
        product = second.flatten(1) @ first.flatten(1)
        return product.view(len(second), *first.shape[1:]).as_subclass(Decoded)

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the second layer; None if it has none."""
        return getattr(self.second, "bias", None)


def levels(site: Site) -> Sequence[Options]:
    """The options worth trying at a site, from the gentlest on."""
    return (Options(keep=0.75), Options()) if site.kind in ("linear", "conv") else ()


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why the options do not fit the site, or None."""
    if isinstance(module, QuantizedLayer | LowRank):
        return "it is quantized or factorized already"
    if site.kind == "embedding" or is_bare(module):
        return "only layers that are called with what they multiply become two"
    if site.tied:
        return f"its weight must stay tied with {', '.join(site.tied)}"
    if getattr(module, "groups", 1) != 1:
        return "its output channels read different inputs"
    outputs, inputs = rows(module, site.kind).shape
    width = options.width(outputs, inputs)
    if width * (outputs + inputs) >= outputs * inputs:
        return f"two layers of rank {width} are not smaller than {outputs} x {inputs}"
    return None if is_plain(module, site.kind) else "it does more than a linear layer or a convolution does"


def closeness(options: Options) -> float:
    """Relative change of a model's output, all its sites factorized, that still counts as right in conformance checks."""
    return 2.0


def replace(model: nn.Module, site: Site, options: Options, context: Context) -> Mapping[str, nn.Module]:
    """The two layers at the site's path; the model is not changed.

    Without a Gram matrix, as when a stored artifact is rebuilt, all inputs count alike.
    """
    module = model.get_submodule(site.name)
    weight = rows(module, site.kind).double()
    mean, around = None, None
    if not context.rebuilding:
        mean, around = seen(site.name, module, context)
    _, vectors = _spectrum(weight, around)
    basis = vectors[:, : options.width(*weight.shape)]
    first = basis.T @ weight
    bias = getattr(module, "bias", None)
    if mean is not None and bias is not None:
        bias = bias.detach() + (weight - basis @ first) @ mean
    return {site.name: pair(module, site.kind, first, basis, bias)}


def together(
    model: nn.Module, steps: Mapping[str, Options], context: Context
) -> tuple[Mapping[str, nn.Module], Context]:
    """The two layers at each of several sites, and what is known of the model that has them; the given one is not changed."""
    changes: dict[str, nn.Module] = {}
    for path, options in steps.items():
        kind = "conv" if isinstance(model.get_submodule(path), _CHANNELS) else "linear"
        site = Site(name=path, kind=kind, parameters=0, bytes=0, macs=0)  # type: ignore[arg-type]
        changes |= replace(model, site, options, context)
    return changes, behind(model, changes, context)


def behind(model: nn.Module, changes: Mapping[str, nn.Module], context: Context) -> Context:
    """What is known of a model in which layers became two."""
    if context.rebuilding or not len(context.examples):
        return context
    new = view(model, changes).eval()
    found = analyse(new, context.examples)
    names = {f"{path}.second": path for path in changes}

    def counts(path: str) -> torch.Tensor | None:
        return context.rows(names.get(path, path))

    gram = grams.lazily(new, [site.name for site in found.sites], context.examples)
    return dataclasses.replace(context, statistics=found.statistics, gram=gram, rows=counts)


def plan(model: nn.Module, sites: Sequence[Site], context: Context, keep: float) -> Plan:
    """Steps whose layers together keep a share of their entries, in (0, 1), each its own rank: where it tells most.

    An eigenvalue is the mean square that an output direction adds, weighed by what outputs count where that is known,
    else as a share of the layer's; those stay that are largest by the entries they cost. Layers that stay whole get no step.
    """
    require(0 < keep < 1, "keep", "in (0, 1)", keep)
    layers = {}
    for site in sites:
        module = layer_at(model, site.name)
        if refuse(site, Options(rank=1), module) is None:
            layers[site.name] = _layer(site, module, context)
    budget, low, high = keep * sum(one.entries for one in layers.values()), 0.0, 1.0
    high += max((float(one.gains.max()) for one in layers.values()), default=0.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = sum(min(one.rank(middle) * one.each, one.entries) for one in layers.values()) <= budget
        low, high = (low, middle) if fits else (middle, high)
    ranks = {path: one.rank(high) for path, one in layers.items() if one.rank(high) * one.each < one.entries}
    return Plan(tuple(Step("low_rank", path, {"rank": rank}) for path, rank in ranks.items()))


@dataclass(frozen=True)
class _Layer:
    """What ranks of a layer cost and tell."""

    entries: int
    each: int
    """Entries of one rank."""
    gains: torch.Tensor  # (n,) float64, descending: what each further rank tells for each of its entries

    def rank(self, least: float) -> int:
        """How many ranks tell more than that for each entry; at least 1."""
        return max(1, int((self.gains > least).sum()))


def _layer(site: Site, module: nn.Module, context: Context) -> _Layer:
    weight = rows(module, site.kind).double()
    values, _ = _spectrum(weight, seen(site.name, module, context)[1])
    counts, each = context.rows(site.name), sum(weight.shape)
    unit = 1 / float(values.sum().clamp(min=TINY)) if counts is None else float(counts.double().mean())
    return _Layer(weight.numel(), each, values * unit / each)


def seen(path: str, module: nn.Module, context: Context) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mean (I,) of a layer's inputs where a bias can take over, and their Gram matrix (I, I) around it, where known."""
    gram, known = context.gram(path), context.statistics.get(path)
    if gram is None:
        return None, None
    gram = gram.double().reshape(gram.shape[-2:])
    if getattr(module, "bias", None) is None or known is None or known.mean is None:
        return None, gram
    mean = known.mean[0].double()
    return mean, gram - mean[:, None] * mean


def _spectrum(weight: torch.Tensor, gram: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (n,) and -vectors (O, n) of W G W^T, largest first, n being the smaller side of W (O, I)."""
    turn, small = torch.linalg.qr(weight) if len(weight) > weight.shape[1] else (None, weight)
    values, vectors = torch.linalg.eigh(small @ small.T if gram is None else small @ gram @ small.T)
    vectors = vectors if turn is None else turn @ vectors
    return values.flip(0).clamp(min=0), vectors.flip(1)


def is_plain(module: nn.Module, kind: str) -> bool:
    """Whether a layer does what two with its weight as their product would, told by numbers on a few output channels."""
    weight = rows(module, kind)[:_PROBED].detach()
    like, outputs = module.get_parameter("weight"), len(rows(module, kind))
    second = torch.eye(outputs, len(weight))
    two = pair(module, kind, weight, second, getattr(module, "bias", None))
    spread = [1 + (k - 1) * d for k, d in zip(like.shape[2:], getattr(module, "dilation", ()), strict=True)]
    shape = (
        (2, like.shape[1], *(size + 3 for size in spread))
        if kind == "conv"
        else (2, rows(module, kind).shape[1])
    )
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
    try:
        with foreign(ModelError, "a layer must take its input alone"), torch.no_grad():
            wanted, found = (
                one(x).transpose(0, -1 if kind == "linear" else 1)[:_PROBED] for one in (module, two)
            )
    except ModelError:
        return False
    bound = _CLOSE * float(wanted.abs().max()) * torch.finfo(like.dtype).eps
    return found.shape == wanted.shape and bool(((found - wanted).abs() <= bound).all())


def pair(
    module: nn.Module,
    kind: str,
    first: torch.Tensor,
    second: torch.Tensor,
    bias: torch.Tensor | None,
    groups: int = 1,
) -> LowRank:
    """Two layers with weights (r, I) and (O, r) that do with them what a layer does with their product.

    groups: of a convolution's input channels, each read by its own share of the first layer's; its weight is (r, I / groups).
    """
    like = module.get_parameter("weight")
    if kind == "conv":
        one = copy.deepcopy(module, {id(p): None for p in module.parameters(recurse=False)})
        one.out_channels, one.groups = len(first), groups  # type: ignore[assignment]
        spatial = like.ndim - 2
        two: nn.Module = _CHANNELS[spatial - 1](
            len(first), len(second), 1, bias=bias is not None, device="meta"
        )
        first = first.view(-1, like.shape[1] // groups, *like.shape[2:])
        second = second.view(*second.shape, *[1] * spatial)
    else:
        one = nn.Linear(first.shape[1], len(first), bias=False, device="meta")
        two = nn.Linear(len(first), len(second), bias=bias is not None, device="meta")
    for layer, name, value in ((one, "weight", first), (two, "weight", second), (two, "bias", bias)):
        if value is not None:
            own = nn.Parameter(value.to(like, copy=True), requires_grad=like.requires_grad)
            layer.register_parameter(name, own)
    return LowRank(one, two).train(module.training)
