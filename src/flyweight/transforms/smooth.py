"""Scales moved from a layer's inputs into its weights, and out of what gives the inputs: free, and easier to round.

Inputs that are large or matter much get finer weights, as in Lin et al., "AWQ" (arXiv 2306.00978, 2024), target "weights"; or
outliers of 8-bit inputs become smaller at the cost of the weights, as in Xiao et al., "SmoothQuant" (arXiv 2211.10438, 2023),
target "activations". All layers that read the tensor are scaled together; `_neighbours` finds and proves them. Of each
family of scales the one with the least predicted error at the layers' outputs is taken; no scale at all is among them.

Without examples, as when a stored artifact is rebuilt, nothing is scaled: the structure stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from flyweight.analysis.calls import Call, Watch, unfused
from flyweight.analysis.gram import site_weights
from flyweight.codes import _weights, integer
from flyweight.codes._options import require, require_group, require_one_of
from flyweight.errors import UsageError
from flyweight.inputs.check import run_example
from flyweight.records import Batch, Site
from flyweight.transforms import _moved
from flyweight.transforms._contract import Context
from flyweight.transforms._copies import view
from flyweight.transforms._neighbours import Link, Neighbours, find, scaled
from flyweight.transforms._quantized import rows, unfit

_ROWS = 256
"""Output channels of a layer, evenly spread, on which scales are compared."""
_STEPS = 11
"""Exponents from 0 to 1 that are compared."""
_LIMIT = 12.0
"""Scales are held between 2 to this power and its inverse."""
_WIDE = (torch.float32, torch.float64)
"""Types that have room for scales; in all others they are powers of two, which change no digit."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the scales are for, and how the weights will be stored."""

    target: str = "weights"
    """What is to be rounded with less error: "weights" alone, or "activations" of 8 bits with weights of 8 bits."""
    alpha: float | None = None
    """Exponent of the inputs' size in [0, 1], in the paper's formula; None: whatever has the least predicted error."""
    bits: int = 4
    """Bits of the weights that the error is predicted for; with target "activations" they have 8."""
    group: int | None = 32
    """Inputs of those weights that share a scale; None: an output channel's."""
    symmetric: bool = False
    """Whether those weights have no zero point."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_one_of(self.target, "target", ("weights", "activations"))
        require(self.alpha is None or 0 <= self.alpha <= 1, "alpha", "in [0, 1], or null", self.alpha)
        require_one_of(self.bits, "bits", (8, 6, 5, 4, 3, 2))
        require_group(self.group)

    @property
    def coding(self) -> integer.Options:
        """The weights that the error is predicted for."""
        if self.target == "activations":
            return integer.Options(range="minmax")
        return integer.Options(bits=self.bits, group=self.group, symmetric=self.symmetric, range="minmax")


@dataclass(frozen=True, eq=False)
class _Reader:
    """A layer that reads what is scaled."""

    weight: torch.Tensor  # (O, I), some of its rows
    numbers: torch.Tensor  # (I,) the giver's channel of each input
    energy: torch.Tensor  # (I,) mean square of the inputs
    gram: torch.Tensor  # (I, I) mean outer product, or its diagonal (I,)
    peak: torch.Tensor | None  # (I,) largest magnitude


def levels(site: Site) -> Sequence[Options]:
    """The options worth trying at a site."""
    if site.kind != "linear":
        return ()
    return (Options(), Options(group=None), Options(target="activations"))


def places(model: nn.Module, examples: Sequence[Batch]) -> tuple[str, ...]:
    """Where steps fit a model: of each tensor whose channels can be scaled, the first layer that reads it."""
    return tuple(next(iter(link.readers)) for link in find(model, examples).links)


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why the options do not fit the site, or None; what only the running model tells is refused when it is applied."""
    if unfit(module):
        return unfit(module)
    if site.kind != "linear":
        return "only the inputs of linear layers are scaled"
    outputs, inputs = rows(module, site.kind).shape
    return _weights.misfit(outputs, inputs, options.coding.group)


def replace(model: nn.Module, site: Site, options: Options, context: Context) -> Mapping[str, nn.Module]:
    """The scaled layers by path: all that read the site's input, and what gives it; the model is not changed."""
    return together(model, {site.name: options}, context)[0]


def together(
    model: nn.Module, steps: Mapping[str, Options], context: Context
) -> tuple[Mapping[str, nn.Module], Context]:
    """The scaled layers for steps at several sites, and what is known of the scaled model; the given one is not changed.

    Raises UsageError at a site whose input nothing gives up to a scale of each channel, or which is scaled by another step.
    """
    if context.rebuilding or not len(context.examples):
        return {}, context
    known = find(model, context.examples)
    links = _links(known, steps)
    wanting = [r for path, o in steps.items() if o.target == "activations" for r in links[path].readers]
    peaks = _peaks(model, wanting, context.examples) if wanting else {}
    factors = []
    for path, link in links.items():
        readers = list(_readers(model, link, known.turned, peaks, context))
        exact = any(p.dtype not in _WIDE for p in model.get_submodule(link.giver).parameters())
        factors.append((link, _factor(readers, link.free, steps[path], exact)))
    changes = scaled(model, factors, known.turned)
    return changes, _moved.scaled(context, factors, view(model, changes))


def _links(known: Neighbours, steps: Mapping[str, Options]) -> dict[str, Link]:
    """The link that each step scales; raises UsageError where there is none, or two steps share one."""
    links: dict[str, Link] = {}
    for path in steps:
        link = known.before(path)
        if isinstance(link, str):
            raise UsageError(link, where=path)
        for other, taken in links.items():
            if taken is link:
                raise UsageError("what it reads is scaled once", got=f"a step at {other} too", where=path)
        links[path] = link
    return links


def _readers(
    model: nn.Module,
    link: Link,
    turned: Mapping[str, bool],
    peaks: Mapping[str, torch.Tensor],
    context: Context,
) -> Iterator[_Reader]:
    """The layers behind a link of whose inputs anything is known."""
    for path, numbers in link.readers.items():
        seen, peak = context.statistics.get(path), peaks.get(path)
        gram = context.gram(path) if peak is None else None
        energy = gram.diagonal() if gram is not None else None if seen is None else seen.energy
        if energy is not None:
            weight = model.get_submodule(path).get_parameter("weight").detach().float()
            weight = weight if turned[path] else weight.T
            some = weight[:: -(-len(weight) // _ROWS)]
            yield _Reader(some, numbers, energy, energy if gram is None else gram, peak)


def _factor(readers: Sequence[_Reader], free: torch.Tensor, options: Options, exact: bool) -> torch.Tensor:
    """Factors (C,) float64 of the giver's channels: 1 where they are not free or never used; exact: powers of two."""
    ones = torch.ones(len(free), dtype=torch.float64)
    coding = options.coding
    readers = [r for r in readers if integer.refuse(len(r.weight), r.weight.shape[1], coding) is None]
    if not readers:
        return ones
    size = _largest(free, ((one.numbers, _size(one, options)) for one in readers))
    weight = _largest(free, ((one.numbers, one.weight.abs().amax(0)) for one in readers))
    used = free & (size > 0) & (weight > 0)
    if not bool(used.any()):
        return ones
    family = [_level(one, used, exact) for one in _family(size, weight, options)]
    if options.alpha is not None:
        return family[0]
    errors = [
        sum(_error(reader, one[reader.numbers].float(), options.coding) for reader in readers)
        for one in (ones, *family)
    ]
    return (ones, *family)[errors.index(min(errors))]


def _size(reader: _Reader, options: Options) -> torch.Tensor:
    """How large each input is (I,): its peak for the paper's formula of a given exponent, else its root mean square.

    Factors searched among powers of peaks would fit the examples: every channel's peak becomes the common range, and other
    inputs go beyond it in many channels.
    """
    return reader.energy.sqrt() if options.alpha is None or reader.peak is None else reader.peak


def _family(size: torch.Tensor, weight: torch.Tensor, options: Options) -> list[torch.Tensor]:
    """Factors to choose from, for the size of inputs (C,) and weights (C,)."""
    if options.alpha is not None:
        alpha = options.alpha
        return [size**alpha / weight ** (1 - alpha) if options.target == "activations" else size**alpha]
    alphas: list[float] = torch.linspace(0, 1, _STEPS, dtype=torch.float64).tolist()
    return [f for a in alphas for f in (size**a / weight ** (1 - a), size**a)]


def _level(factor: torch.Tensor, used: torch.Tensor, exact: bool) -> torch.Tensor:
    """Factors whose geometric mean over the used channels is 1, within limits; 1 elsewhere."""
    logs = torch.where(used, factor, 1.0).log2()
    logs = torch.where(used, logs - logs[used].mean(), 0.0).clamp(-_LIMIT, _LIMIT)
    return torch.exp2(logs.round() if exact else logs)


def _largest(free: torch.Tensor, values: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Of each channel the largest of the values (I,) that belong to it, (C,) float64; 0 where there is none."""
    found = torch.zeros(len(free), dtype=torch.float64)
    for numbers, some in values:
        found.scatter_reduce_(0, numbers, some.double(), "amax")
    return found


def _error(reader: _Reader, factor: torch.Tensor, coding: integer.Options) -> float:
    """The predicted mean squared error of a reader's outputs, relative to their mean square.

    Its weight is multiplied by factors (I,) and rounded to nearest, its inputs are divided.
    """
    weight = reader.weight * factor
    grid = integer.fit(weight, coding, reader.energy / factor.square())
    change = grid.values(grid.nearest(weight)) / factor - reader.weight
    error = _square(change, reader.gram)
    if reader.peak is not None:
        step = 2 * float((reader.peak / factor).max()) / 255
        error += step**2 / 12 * float(weight.square().sum())  # rounding to a step has a variance of a twelfth
    return error / max(_square(reader.weight, reader.gram), torch.finfo(torch.float32).tiny)


def _square(weight: torch.Tensor, gram: torch.Tensor) -> float:
    """The sum over outputs of the mean square of weight (O, I) times the inputs."""
    return float(((weight @ gram if gram.ndim == 2 else weight * gram) * weight).sum())


def _peaks(model: nn.Module, paths: Sequence[str], examples: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """The largest magnitude of each input (I,) of some linear layers, from one pass over the examples."""
    found: dict[str, torch.Tensor] = {}
    model = view(model, {}).eval()

    def seen(path: str, call: Call) -> None:
        values = call.input.detach().float().reshape(-1, call.input.shape[-1])
        if len(values):
            peak = values.abs().amax(0)
            found[path] = torch.maximum(peak, found[path]) if path in found else peak

    with unfused(), Watch(site_weights(model, paths), seen, lambda path, function: None):
        for index in range(len(examples)):
            run_example(model, examples, index)
    return found
