"""A layer that has another's weight, times a factor for each output channel: stored once, whoever reads it.

Sharing across layers is that of Lan et al., "ALBERT" (arXiv 1909.11942, 2020), with small corrections for each use. With its
factors the layer comes nearest to what it gave, by least squares on its inputs where they are known. `likeness` says how near
that is; what is below the threshold is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flyweight.analysis.bare import is_bare
from flyweight.analysis.importance import input_axis, outputs_first
from flyweight.codes._options import require
from flyweight.errors import UsageError
from flyweight.records import Batch, Plan, Site, Step
from flyweight.transforms._contract import Context
from flyweight.transforms._copies import substitute

_NO_LAYER = "share takes linear layers and convolutions with weights of their own"
INNER = "inner"
"""The layer inside the new module, which holds the shared weight."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Whose weight."""

    of: str = ""
    """The path of the layer whose weight it is, of the same shape and earlier in the model; empty: the one most alike."""
    threshold: float = 0.9
    """The least likeness, in [-1, 1]: the cosine of what both give, over all output channels."""

    def __post_init__(self) -> None:
        """Check the range."""
        require(-1 <= self.threshold <= 1, "threshold", "in [-1, 1]", self.threshold)


class Scaled(nn.Module):
    """A layer without a bias, each of its output channels times a factor, and with a bias."""

    def __init__(
        self, inner: nn.Module, scale: torch.Tensor, bias: torch.Tensor | None, channels: int
    ) -> None:
        """scale, bias: (O,); channels: which dimension of the output they belong to."""
        super().__init__()
        self.inner, self.channels = inner, channels
        self.scale = nn.Parameter(scale)
        self.bias: nn.Parameter | None = None if bias is None else nn.Parameter(bias)

    @property
    def weight(self) -> torch.Tensor:
        """What the layer multiplies with, for code that reads it instead of calling the layer."""
        shared: torch.Tensor = self.inner.get_parameter("weight")
        return shared * self.scale.view(-1, *[1] * (shared.ndim - 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer would give with the weight scaled."""
        found: torch.Tensor = self.inner(x)
        shape = [-1] + [1] * (found.ndim - 1 - self.channels if self.channels > 0 else 0)
        found = found * self.scale.view(shape)
        return found if self.bias is None else found + self.bias.view(shape)


def levels(site: Site) -> Sequence[Options]:
    """None at a layer by itself: `proposals` says which are alike."""
    return ()


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why a layer cannot have another's weight, or None; whether there is such a one, the whole model tells."""
    called = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward)
    fits = not is_bare(module) and type(module).forward in called and not site.tied
    return None if fits else _NO_LAYER


def closeness(options: Options) -> float:
    """How far outputs may move: another layer's weight may change anything."""
    return math.inf


def likeness(model: nn.Module, path: str, of: str, context: Context) -> float:
    """The cosine of what two layers of one shape give, the second with the best factors; 1 where they are alike."""
    return _fitted(model, path, of, context)[1]


def proposals(model: nn.Module, examples: Sequence[Batch]) -> Iterator[Plan]:
    """A plan for each layer, with the earlier one of its shape that is most alike, whatever the threshold."""
    for path in _layers(model):
        if _earlier(model, path):
            yield Plan((Step("share", path, {"threshold": -1.0}),))


def complete(model: nn.Module, options: Mapping[str, Options], context: Context) -> Mapping[str, Options]:
    """The options by layer, with the layer whose weight each has.

    Raises UsageError for what is no layer of its own weight, and where no earlier one of its shape is alike enough.
    """
    return {path: _decided(model, path, chosen, options, context) for path, chosen in options.items()}


def cut(model: nn.Module, options: Mapping[str, Options], context: Context) -> nn.Module:
    """A new model in eval mode whose layers have the weights of others; raises as `complete` does."""
    changes: dict[str, nn.Module] = {}
    decided = complete(model, options, context)
    for path, chosen in decided.items():
        layer, seen = model.get_submodule(path), Context() if context.rebuilding else context
        scale = _fitted(model, path, chosen.of, seen)[0]
        kind, bias = layer.get_parameter("weight").dtype, layer._parameters.get("bias")
        inner = copy.deepcopy(layer, {id(bias): None, id(layer.weight): None})
        kept = None if bias is None else bias.detach().clone()
        channels = -1 if isinstance(layer, nn.Linear) else 1
        changes[path] = Scaled(inner, scale.to(kind), kept, channels).train(layer.training)
    small = substitute(model, changes).eval()
    for path, chosen in decided.items():
        small.get_submodule(f"{path}.{INNER}").register_parameter("weight", _weight(small, chosen.of))
    return small


def left(known: Mapping[str, Site], site: str, options: Options) -> Mapping[str, Site]:
    """The layers that are sites afterwards: the one whose weight it is, tied with the one that has it."""
    found = {name: one for name, one in known.items() if name != site}
    if options.of in found:
        tied = (*found[options.of].tied, f"{site}.{INNER}")
        found[options.of] = dataclasses.replace(found[options.of], tied=tied)
    return found


def _layers(model: nn.Module) -> list[str]:
    """Layers that can have another's weight, in the model's order."""
    holders = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    kind: Any = "linear"
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        site = Site(name=path, kind=kind, parameters=0, bytes=0, macs=0)
        fits = path and "weight" in module._parameters and refuse(site, Options(), module) is None
        if fits and holders.count(id(module.weight)) == 1:
            found.append(path)
    return found


def _earlier(model: nn.Module, path: str) -> list[str]:
    """The layers before one that have its form, whose weight it could have."""
    layers = _layers(model)
    own = _form(model.get_submodule(path))
    earlier = layers[: layers.index(path)] if path in layers else []
    return [other for other in earlier if _form(model.get_submodule(other)) == own]


def _form(layer: nn.Module) -> tuple[object, ...]:
    weight = layer.get_parameter("weight")
    return type(layer).forward, weight.shape, weight.dtype, getattr(layer, "groups", 1)


def _decided(
    model: nn.Module, path: str, chosen: Options, every: Mapping[str, Options], context: Context
) -> Options:
    """The options with the earlier layer that is most alike; one that was named must be one of them."""
    if path not in _layers(model):
        raise UsageError(_NO_LAYER, where=path)
    fit = [other for other in _earlier(model, path) if other not in every]
    if chosen.of and chosen.of not in fit:
        rule = "a shared weight is that of an earlier layer of the same kind and shape that keeps its own"
        raise UsageError(rule, got=repr(chosen.of), where=path)
    if chosen.of and (context.rebuilding or not len(context.examples)):
        return chosen
    alike = {other: likeness(model, path, other, context) for other in ([chosen.of] if chosen.of else fit)}
    best = max(alike, key=lambda other: alike[other], default="")
    if not best or alike[best] < chosen.threshold:
        got = f"{alike[best]:.3f} with {best}" if best else "no other of its shape before it"
        raise UsageError(f"an earlier layer must be as alike as {chosen.threshold}", got=got, where=path)
    return dataclasses.replace(chosen, of=best)


def _fitted(model: nn.Module, path: str, of: str, context: Context) -> tuple[torch.Tensor, float]:
    """The factors (O,) with which another layer gives most of what this one does, and the cosine of both then.

    By the Gram matrix of this layer's inputs where that is known; else all inputs count alike.
    """
    own, other = (outputs_first(model.get_submodule(name)).double() for name in (path, of))
    gram = context.gram(path) if input_axis(model.get_submodule(path)) is not None else None
    seen = other if gram is None else other @ gram.double().reshape(gram.shape[-2:])
    across, whole = (own * seen).sum(1), (other * seen).sum(1)
    energy = float((own * (own if gram is None else own @ gram.double().reshape(gram.shape[-2:]))).sum())
    scale = across / whole.clamp(min=1e-300)
    gained = float((scale * across).sum())
    return scale, math.sqrt(max(gained, 0.0) / energy) if energy > 0 else 0.0


def _weight(model: nn.Module, path: str) -> nn.Parameter:
    return model.get_submodule(path).get_parameter("weight")
