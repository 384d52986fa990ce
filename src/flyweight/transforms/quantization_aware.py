"""Layers that learn to be stored in few bits: trained with the values that an evenly spaced code would give, then frozen.

Learned steps as in Esser et al., "Learned step size quantization" (arXiv 1902.08153, 2020), or straight-through gradients
on a fixed grid, Bengio et al. (arXiv 1308.3432, 2013). With `Context.training` a layer keeps what it needs to be trained;
`transforms.frozen(model)` then makes it what is stored, with the same output to the bit. Without it the step gives the
frozen layer at once: rounded to nearest, not trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from flyweight import discover
from flyweight.analysis.bare import is_bare, layer_at
from flyweight.codes import integer
from flyweight.codes._options import require, require_one_of
from flyweight.errors import UsageError
from flyweight.records import JSON, Site
from flyweight.transforms import weight_only
from flyweight.transforms._contract import Context
from flyweight.transforms._int8 import activation_grid
from flyweight.transforms._learned import LearningLayer
from flyweight.transforms._quantized import is_transposed, rows, unfit

CODES = ("integer", "ternary")
"""Codes whose values are evenly spaced, so that one step tells them all."""
_OWN = ("gradient", "activations")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the layer is trained for, and how gradients pass its rounding."""

    stored: weight_only.Options = field(default_factory=weight_only.Options)
    """How the weight is stored: options of `weight_only`, named beside the others, with an evenly spaced code."""
    gradient: str = "lsq"
    """"lsq": steps and zero points are learned; "ste": they stay, and gradients pass as if nothing were rounded."""
    activations: int | None = None
    """Round inputs to 8 or 4 bits on a grid per tensor, which is learned with "lsq"; None: inputs stay floats."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_one_of(self.stored.code, "code", CODES)
        require(
            self.stored.rounding == "nearest",
            "rounding",
            "nearest, where training starts",
            self.stored.rounding,
        )
        require_one_of(self.gradient, "gradient", ("lsq", "ste"))
        known = self.activations is None or (type(self.activations) is int and self.activations in (8, 4))
        require(known, "activations", "8, 4 or None", self.activations)

    @property
    def top(self) -> int:
        """The highest integer of a rounded input."""
        return (1 << (self.activations or 8)) - 1

    def plain(self) -> dict[str, JSON]:
        """What `read` reads: all that differs from the defaults."""
        own: dict[str, JSON] = {} if self.gradient == "lsq" else {"gradient": self.gradient}
        own |= {} if self.activations is None else {"activations": self.activations}
        return self.stored.plain() | own


def read(options: Mapping[str, JSON], where: str) -> Options:
    """The Options of plain values: its own, and those of `weight_only`; raises UsageError."""
    stored = weight_only.read({name: value for name, value in options.items() if name not in _OWN}, where)
    own = {name: options[name] for name in _OWN if name in options}
    try:
        return Options(stored=stored, **own)  # type: ignore[arg-type]  # checked by Options
    except UsageError as error:
        raise error.at(f"{where}.{error.where}") from None


def _level(activations: int | None = None, **coding: object) -> Options:
    stored = weight_only.Options(coding=integer.Options(**coding))  # type: ignore[arg-type]  # below, by name
    return Options(stored=stored, activations=activations)


_LEVELS = (_level(8, reduced=True, range="minmax"), _level(bits=4, symmetric=False), _level(bits=2))


def levels(site: Site) -> Sequence[Options]:
    """The options worth training for, from the gentlest to the smallest."""
    return _LEVELS[1:] if site.kind == "embedding" else _LEVELS


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why the options do not fit the site, or None."""
    if isinstance(module, LearningLayer):
        return "it is in training already; freeze it first"
    if is_bare(module):
        return unfit(module)
    if site.kind == "embedding" and options.activations is not None:
        return "embeddings have no inputs to round"
    return weight_only.refuse(site, options.stored, module)


def closeness(options: Options) -> float:
    """Relative change of a model's output, all its sites rounded and none trained, that still counts as right."""
    few = options.stored.code == "ternary" or options.stored.coding.bits == 2
    rounded = 2.0 if few else weight_only.closeness(options.stored)
    return rounded + {None: 0.0, 8: 0.15, 4: 0.5}[options.activations]


def replace(model: nn.Module, site: Site, options: Options, context: Context) -> Mapping[str, nn.Module]:
    """The layer in training, or frozen unless the context says that the model will be trained; the model is not changed.

    Without statistics for the site, as when a stored artifact is rebuilt, ranges of inputs are placeholders of 1.
    """
    module, stored = layer_at(model, site.name), options.stored
    weight = rows(module, site.kind).float()
    if context.rebuilding:
        weight = torch.zeros_like(weight)
    grid = discover.method("codes", stored.code).fit(weight, stored.coding)
    layer = LearningLayer(
        module, stored.code, stored.coding, grid,
        transposed=is_transposed(module, site.kind), learns=options.gradient == "lsq",
    )  # fmt: skip
    if options.activations is not None:
        _watch_inputs(layer, site, options, context)
    return {site.name: layer if context.training else layer.frozen()}


def _watch_inputs(layer: LearningLayer, site: Site, options: Options, context: Context) -> None:
    """Let the layer round its inputs, starting from what was seen."""
    seen = context.statistics.get(site.name)
    if seen is None:
        layer.static((1.0, 0), (0.0, 1.0), options.top)
        return
    step, zero = activation_grid(seen.output, "mse")
    layer.static(
        activation_grid(seen.input, "mse", options.top), (-zero * step, (255 - zero) * step), options.top
    )
