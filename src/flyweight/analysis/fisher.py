"""How much each output channel of a layer counts for the model's own answer: the diagonal of the Fisher information.

The mean square of the slope of the log-likelihood, where the answer is drawn from what the model itself says (Amari, "Natural
gradient works efficiently in learning", Neural Computation 1998): if a channel changes by e for some input, the
Kullback-Leibler divergence from the original's answers grows by half of e^2 times that. Logits are the parameters of a
categorical distribution; any other output is taken as the mean of a normal one with variance 1, whose slopes are those of
random projections of the output. One pass forward and one backward an example; slopes of parameters are never formed.

Shapes: O output channels of a site. Padding tokens are outputs like any other.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from flyweight.analysis import answers
from flyweight.analysis.answers import output_of
from flyweight.analysis.answers import vocabularies_of as vocabularies_of
from flyweight.analysis.calls import Call, Watch, unfused
from flyweight.analysis.gram import site_weights
from flyweight.errors import DataError
from flyweight.records import Batch

ENOUGH = 4096
"""Predictions after which further examples change little."""


def fisher(
    model: nn.Module, sites: Collection[str], examples: Sequence[Batch], *, seed: int
) -> Mapping[str, torch.Tensor]:
    """The mean squared slope (O,) float32 of the log-likelihood of one prediction by each output channel of each site.

    A prediction is one row of the output: a token, or a sample. Squares are summed over all rows of a site that serve a
    prediction, so that layers of any kind compare: half of the sum over O of importance times error^2 is the
    Kullback-Leibler divergence of a prediction when every row of a linear layer has that error, one row a prediction.
    Embeddings have none, nor have sites that no example reaches or whose output the model's own does not follow
    smoothly. It ends with the example that makes ENOUGH predictions. The model is as before in the end. Raises DataError
    without examples, where a slope is NaN or infinite, or where the model refuses an example, and what `grams` raises for
    sites.
    """
    if not len(examples):
        raise DataError("there must be examples to learn what a layer's outputs count", got="none")
    random = torch.Generator().manual_seed(seed)
    weights, vocabularies = site_weights(model, sites), vocabularies_of(model)
    sums: dict[str, torch.Tensor] = {}
    predictions = 0
    with differentiable(model, weights):
        for index in range(len(examples)):
            edges: list[_Edge] = []
            output = forward(model, weights, examples, index, functools.partial(_note, edges))
            asked, slopes, count = answer(output, vocabularies, random)
            predictions += count
            for path, square in _squares(edges, asked, slopes).items():
                sums[path] = sums[path] + square if path in sums else square
            if predictions >= ENOUGH:
                break
    return {path: _checked(path, total / max(predictions, 1)) for path, total in sums.items()}


def lazily(
    model: nn.Module, sites: Collection[str], examples: Sequence[Batch], *, seed: int
) -> Callable[[str], torch.Tensor | None]:
    """A function from a site to its importance of `fisher`, or None; all are collected when the first is asked for."""
    collected = functools.cache(lambda: fisher(model, sites, examples, seed=seed))
    return lambda site: collected().get(site)


@contextlib.contextmanager
def differentiable(model: nn.Module, weights: Mapping[int, str]) -> Iterator[None]:
    """The model in eval mode, with slopes through the sites alone; modes, flags and PyTorch's own state come back."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            # autograd has to pass by the outputs of the sites, and so by something that wants a slope
            parameter.requires_grad_(id(parameter) in weights and parameter.is_floating_point())
        with torch.enable_grad(), unfused():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


_Edge = tuple[str, GradientEdge, int, tuple[int, int]]
"""A site, where the slope of an output of it arrives, which dimension of that output is O, and how many of O are not in it:
before and behind."""


def _note(edges: list[_Edge], path: str, call: Call) -> None:
    """Keep the output of a product, as a place in the graph: the model may change the tensor in place afterwards."""
    if call.kind != "embedding" and call.output.requires_grad:
        channels = call.output.ndim - call.weight.ndim + 1 if call.kind == "conv" else call.output.ndim - 1
        every = call.weight.shape[1 if call.kind == "addmm" else 0]
        missing = (call.first, every - call.first - call.output.shape[channels])
        edges.append((path, get_gradient_edge(call.output), channels, missing))


def forward(
    model: nn.Module,
    weights: Mapping[int, str],
    examples: Sequence[Batch],
    index: int,
    note: Callable[[str, Call], None],
) -> Any:
    """The model's output on one example, with gradients; each use of a weight is told to `note` with its path.

    Raises DataError when the model refuses the example.
    """
    with Watch(weights, note, lambda path, function: None):
        return output_of(model, examples, index)


def answer(
    output: Any, vocabularies: Collection[int], random: torch.Generator
) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """Outputs, the slope of a drawn answer's log-likelihood by each, and the number of predictions."""
    said = answers.answer(output, vocabularies)
    asked = said.tensors
    slopes = [_categorical(one, random) if said.logits else _normal(one, random) for one in asked]
    count = asked[0].numel() // max(asked[0].shape[-1], 1) if asked else 0
    follows = [one.requires_grad for one in asked]
    return (
        [one for one, does in zip(asked, follows, strict=True) if does],
        [one for one, does in zip(slopes, follows, strict=True) if does],
        count,
    )


def _categorical(logits: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """The slope by logits (..., C) of the log-likelihood of labels drawn from them: 1 at the label, less the shares."""
    shares = torch.softmax(logits.detach().float(), -1)
    drawn = torch.multinomial(shares.reshape(-1, shares.shape[-1]).cpu(), 1, generator=random)
    labels = drawn.to(shares.device).view(*shares.shape[:-1], 1)
    return shares.neg().scatter_add_(-1, labels, torch.ones_like(labels, dtype=shares.dtype)).to(logits.dtype)


def _normal(output: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """The slope by an output of the log-likelihood of an answer drawn around it: a standard normal number each."""
    return torch.randn(output.shape, generator=random).to(output)


def _squares(
    edges: Sequence[_Edge], asked: Sequence[torch.Tensor], slopes: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The sum of squared slopes (O,) float64 of each site."""
    if not edges or not asked:
        return {}
    found = torch.autograd.grad(asked, [edge for _, edge, *_ in edges], slopes, allow_unused=True)
    sums: dict[str, torch.Tensor] = {}
    for (path, _, channels, missing), slope in zip(edges, found, strict=True):
        if slope is not None:
            square = slope.movedim(channels, 0).flatten(1).float().square().sum(1).double()
            square = F.pad(square, missing)
            sums[path] = sums[path] + square if path in sums else square
    return sums


def _checked(path: str, found: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(found).all()):
        raise DataError(
            "slopes must be finite",
            got="NaN, infinite or overflowing values",
            where=f"layer {path}",
            way_out="check the examples and the model's weights",
        )
    return found.float()
