"""One block of the chain: filled with its weights, changed as the in-memory run changes it, and gone again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from flyweight import discover
from flyweight.analysis.blocks import Arguments
from flyweight.analysis.sites import analyse
from flyweight.errors import DataError
from flyweight.records import Site
from flyweight.transforms import Context, QuantizedLayer, weight_only
from flyweight.transforms._sequential import Place, Work, behind, within

_ROOT = "block"
"""What the block is called while it is worked on."""


@dataclass(frozen=True, eq=False)
class States:
    """For each example the hidden state that enters a block: in the original, and in the model as changed so far."""

    original: Sequence[torch.Tensor]
    current: Sequence[torch.Tensor]


@dataclass(frozen=True, eq=False)
class Changed:
    """What became of a block; paths are those in the block."""

    layers: Mapping[str, QuantizedLayer]
    left: Mapping[str, str]
    """The linear layers that stay as they are, and why."""
    behind: States | None
    """What leaves the block; None: nobody asked."""


def changed(
    block: nn.Module,
    arguments: Sequence[Arguments],
    states: States,
    options: weight_only.Options,
    *,
    last: bool,
) -> Changed:
    """The block's linear layers in a code, each fitted to the inputs that it will really get.

    last: what leaves the block is of no use. Raises DataError where an activation is NaN or infinite, ModelError for weights
    that cannot be used.
    """
    place = Place(_ROOT, block, arguments, states.original, states.current)
    found = analyse(place.side("original", {}), place.examples())
    root = nn.ModuleDict({_ROOT: block})
    reasons = {site.name: _reason(site, options, root) for site in found.sites}
    sites = {site.name: site for site in found.sites if reasons[site.name] is None}

    def change(path: str, context: Context) -> Mapping[str, nn.Module]:
        return weight_only.replace(root, sites[path], options, context)

    learns = str(discover.method("roundings", options.rounding).NEEDS) == "gram"
    drifting = set(sites) if weight_only.learns(options) == "cross" else set()
    context = Context(statistics=found.statistics)
    work = Work(list(sites) if learns else [], [] if learns else list(sites), drifting, context, change)
    new = within(place, work)
    layers = {place.inner(path): layer for path, layer in new.items() if isinstance(layer, QuantizedLayer)}
    after = None if last else States(*behind(place, new, True))
    return Changed(layers, _left(block, layers, reasons), after)


@contextmanager
def named(path: str) -> Iterator[None]:
    """Let what is said of the data in a block be said of the layer in the model."""
    try:
        yield
    except DataError as error:
        texts = (text.replace(f"layer {_ROOT}", f"layer {path}") for text in (error.got, error.where))
        got, where = texts
        raise DataError(error.rule, got=got, where=where, way_out=error.way_out) from error


def _reason(site: Site, options: weight_only.Options, root: nn.Module) -> str | None:
    """Why a site stays as it is, or None: the format that is written knows linear layers alone."""
    module = root.get_submodule(site.name)
    if not isinstance(module, nn.Linear):
        return f"a {type(module).__name__} has no place in the format"
    if site.tied:
        return f"its weight is that of {', '.join(site.tied)} too"
    return weight_only.refuse(site, options, module)


def _left(
    block: nn.Module, layers: Mapping[str, QuantizedLayer], reasons: Mapping[str, str | None]
) -> dict[str, str]:
    return {
        path: reasons.get(f"{_ROOT}.{path}") or "no window ran it as a layer"
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear) and path not in layers
    }
