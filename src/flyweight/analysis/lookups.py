"""How much the rows of a table count for the model's own answer: how often each is looked up, and what its errors do there.

If a row changes by e, the Kullback-Leibler divergence of a prediction grows by half of e^T G e times how often the row is
looked up for it, where G is the mean outer product of the log-likelihood's slopes behind a lookup (see fisher.py). So a table
is a layer whose inputs have the Gram matrix G, and whose output channels, the rows, count as often as they are looked up.

Shapes: V rows of D entries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from flyweight.analysis import fisher
from flyweight.analysis.calls import Call
from flyweight.analysis.gram import site_weights
from flyweight.records import Batch


@dataclass
class Table:
    """What is known of a table."""

    counts: torch.Tensor
    """Lookups of each row for one prediction, (V,) float32."""
    gram: torch.Tensor
    """Mean outer product of the slopes behind a lookup, (D, D) float32."""
    slopes: int = 0


def tables(
    model: nn.Module, sites: Collection[str], examples: Sequence[Batch], *, seed: int
) -> Mapping[str, Table]:
    """What is known of each site that is an embedding; tables whose slopes the model's output does not give are left out.

    It ends with the example that makes fisher.ENOUGH predictions, and raises what `fisher.fisher` does.
    """
    random = torch.Generator().manual_seed(seed)
    weights, vocabularies = site_weights(model, sites), fisher.vocabularies_of(model)
    found: dict[str, Table] = {}
    predictions = 0
    with fisher.differentiable(model, weights):
        for index in range(len(examples)):
            seen: list[tuple[str, GradientEdge, Call]] = []
            output = fisher.forward(model, weights, examples, index, functools.partial(_note, seen))
            asked, slopes, count = fisher.answer(output, vocabularies, random)
            predictions += count
            if seen and asked:
                edges = [edge for _, edge, _ in seen]
                given = torch.autograd.grad(asked, edges, slopes, allow_unused=True)
                for (path, _, call), slope in zip(seen, given, strict=True):
                    if slope is not None:
                        _add(found, path, call, slope, getattr(model.get_submodule(path), "mode", "sum"))
            if predictions >= fisher.ENOUGH:
                break
    return {
        path: Table(table.counts / max(predictions, 1), table.gram / max(table.slopes, 1), table.slopes)
        for path, table in found.items()
        if bool(torch.isfinite(table.gram).all()) and bool(table.gram.any())
    }


def lazily(
    model: nn.Module, sites: Collection[str], examples: Sequence[Batch], *, seed: int
) -> Callable[[str], Table | None]:
    """A function from a site to what `tables` says, or None; all are collected when the first is asked for."""

    @functools.cache
    def collected() -> Mapping[str, Table]:
        return tables(model, sites, examples, seed=seed)

    return lambda site: collected().get(site) if site in sites else None


def _note(seen: list[tuple[str, GradientEdge, Call]], path: str, call: Call) -> None:
    if call.kind == "embedding" and call.output.requires_grad:
        seen.append((path, get_gradient_edge(call.output), call))


def _add(found: dict[str, Table], path: str, call: Call, slope: torch.Tensor, mode: str) -> None:
    """Add the lookups of one call; the bags of a table share their slopes among their rows, or hand it to each."""
    rows, width = call.weight.shape
    behind = slope.reshape(-1, width).float()
    if mode == "mean":
        behind = behind * len(behind) / max(call.input.numel(), 1)
    if path not in found:
        found[path] = Table(behind.new_zeros(rows), behind.new_zeros(width, width))
    table = found[path]
    table.counts += torch.bincount(call.input.reshape(-1), minlength=rows)
    table.gram += behind.T @ behind
    table.slopes += len(behind)
