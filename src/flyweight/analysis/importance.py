"""How much each unit of a group counts, so that those that count least can go: one number a unit, higher counts more.

magnitude: the squares of its weights (Li et al., arXiv 1608.08710, 2017). gradient: its share of all slopes. taylor, fisher:
the mean size, and the mean square, of slope times weight (Molchanov et al., arXiv 1906.10771, 2019). contribution: the mean
square of what it gives to the layers that read it. second_order: what is missed at those layers when it goes and the others
make up for it as well as they can, one after the other (Hassibi and Stork, "Optimal brain surgeon", 1993; Kurtic et al.,
arXiv 2302.04089, 2023). random: the control.

Slopes are those of the log-likelihood of drawn answers, as in `fisher`; no labels are needed. U counts units, K the indices
of each, O and I the outputs and inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from flyweight.analysis.answers import output_of, vocabularies_of
from flyweight.analysis.coupling import Group, Place
from flyweight.analysis.fisher import answer, differentiable
from flyweight.analysis.sites import kind_of
from flyweight.errors import DataError
from flyweight.records import Batch

Known: TypeAlias = Callable[[str], torch.Tensor | None]
LOCAL = ("magnitude", "contribution", "second_order", "random")
"""What the weights, and the inputs of layers, tell."""
SLOPES = ("gradient", "taylor", "fisher")
"""What a backward pass of each example tells."""
KINDS = (*LOCAL, *SLOPES)
DAMPING = 0.01
"""Of the mean square input, what is added to each input's, so that few examples do not tell too much."""
_ROUNDS = 64
"""Rounds in which units go, each after the others made up for those before."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that multiplies with what the units of a group give."""

    path: str
    weight: torch.Tensor
    """(O, I) float32, outputs first whatever the layer's own order is."""
    gram: torch.Tensor
    """(I, I): how its inputs go together."""
    columns: torch.Tensor
    """(U, K): which inputs belong to each unit."""


@dataclass(frozen=True, eq=False)
class Course:
    """How the units of a group go, each after the others made up for those before."""

    order: torch.Tensor
    """(U,) int64: which goes first, which next."""
    missed: torch.Tensor
    """(U,) float64: what is missed when a unit goes; summed over the first k, when these have gone."""


def readers(model: nn.Module, group: Group, gram: Known, rows: Known) -> Iterator[Reader]:
    """The linear layers and ungrouped convolutions that read a group and whose inputs are known.

    rows: what their outputs count, (O,); where known, weights are scaled by the root: squared errors are twice nats.
    """
    holders = dict(model.named_modules(remove_duplicate=False))
    for place in group.places:
        path, _, name = place.name.rpartition(".")
        layer = holders.get(path)
        if layer is None or name != "weight" or place.axis != input_axis(layer):
            continue
        weight, found = outputs_first(layer), gram(path)
        if found is not None and found.shape == (weight.shape[1],) * 2:
            counts = rows(path)
            scaled = weight if counts is None else weight * counts.to(weight).sqrt()[:, None]
            yield Reader(path, scaled, found, _columns(place, group, weight.shape[1] // place.size))


def input_axis(layer: nn.Module) -> int | None:
    """Which dimension of a layer's weight its inputs are; None for tables, and where weights are read by groups."""
    weight = layer._parameters.get("weight")
    if weight is None or weight.ndim < 2 or kind_of(layer) == "embedding":
        return None
    if kind_of(layer) == "conv":
        plain = isinstance(layer, nn.modules.conv._ConvNd) and not layer.transposed and layer.groups == 1
        return 1 if plain else None
    return 1 if isinstance(layer, nn.Linear) else 0


def outputs_first(layer: nn.Module) -> torch.Tensor:
    """A layer's weight as (O, I) float32, kernel elements among the inputs."""
    weight = layer.get_parameter("weight").detach().float()
    return weight.T if input_axis(layer) == 0 else weight.flatten(1)


def local(kind: str, model: nn.Module, group: Group, gram: Known, rows: Known, seed: int) -> torch.Tensor:
    """Importance (U,) float64 of one of LOCAL.

    Raises DataError where the examples tell nothing of a layer that reads the group.
    """
    if kind == "random":
        return torch.rand(group.units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "magnitude":
        return _magnitude(model, group)
    if kind == "second_order":
        gone = course(model, group, gram, rows)
        return torch.empty_like(gone.missed).index_copy_(0, gone.order, gone.missed.cummax(0).values)
    return torch.stack([_contribution(reader) for reader in _some(kind, model, group, gram, rows)]).sum(0)


def course(model: nn.Module, group: Group, gram: Known, rows: Known) -> Course:
    """In which order units go with the least missed at the layers that read them, in at most _ROUNDS rounds.

    With `rows` known everywhere, half of what is missed is the Kullback-Leibler divergence of a prediction to second order.
    Raises DataError where the examples tell nothing of a layer that reads the group.
    """
    found = _some("second_order", model, group, gram, rows)
    state = [(reader.weight.double().clone(), inverted(reader.gram), reader.columns) for reader in found]
    left, step = torch.arange(group.units), max(1, group.units // _ROUNDS)
    order, missed = [], []
    while len(left):
        errors = torch.stack([_missed(weight, inverse, at[left]) for weight, inverse, at in state]).sum(0)
        by_error = errors.argsort(stable=True)
        gone, left = left[by_error[:step]], left[by_error[step:]].sort().values
        together = sum(_without(weight, inverse, at[gone].flatten()) for weight, inverse, at in state)
        alone = errors[by_error[:step]].clamp(min=1e-300)
        order.append(gone)
        missed.append(alone * (together / float(alone.sum())))
    return Course(torch.cat(order), torch.cat(missed))


def _some(kind: str, model: nn.Module, group: Group, gram: Known, rows: Known) -> list[Reader]:
    """The readers of a group; raises DataError without any."""
    found = list(readers(model, group, gram, rows))
    if not found:
        rule = f"{kind} needs a layer that reads the group, and examples of what it reads"
        raise DataError(rule, where=group.name, way_out="take magnitude or taylor")
    return found


def by_slopes(
    kind: str, model: nn.Module, groups: Sequence[Group], examples: Sequence[Batch], *, seed: int
) -> list[torch.Tensor]:
    """Importance (U,) float64 of one of SLOPES for each group; one pass forward and one backward an example.

    Raises DataError without examples, or where the model refuses one.
    """
    if not len(examples):
        raise DataError("there must be examples to learn what a unit counts", got="none")
    held = dict(model.named_parameters(remove_duplicate=False))
    names = sorted({place.name for group in groups for place in group.places} & held.keys())
    random = torch.Generator().manual_seed(seed)
    sums = [torch.zeros(group.units, dtype=torch.float64) for group in groups]
    with differentiable(model, {id(held[name]): name for name in names}):
        for index in range(len(examples)):
            output = output_of(model, examples, index)
            asked, slopes, _ = answer(output, vocabularies_of(model), random)
            found = torch.autograd.grad(asked, [held[name] for name in names], slopes, allow_unused=True)
            known = {name: slope for name, slope in zip(names, found, strict=True) if slope is not None}
            for total, group in zip(sums, groups, strict=True):
                total += _sloped(kind, group, held, known)
    return [total / len(examples) for total in sums]


def _sloped(
    kind: str, group: Group, held: dict[str, nn.Parameter], slopes: dict[str, torch.Tensor]
) -> torch.Tensor:
    """What the slopes of one example tell of each unit."""
    found = torch.zeros(group.units, dtype=torch.float64)
    for place in group.places:
        if place.name in slopes and place.axis is not None:
            slope = slopes[place.name].detach().double()
            value = slope.abs() if kind == "gradient" else slope * held[place.name].detach().double()
            found += _summed(value, place, group)
    if kind == "gradient":
        return found / max(sum(float(slope.abs().sum()) for slope in slopes.values()), 1e-300)
    return found.abs() if kind == "taylor" else found.square()


def _magnitude(model: nn.Module, group: Group) -> torch.Tensor:
    held = dict(model.named_parameters(remove_duplicate=False))
    places = [place for place in group.places if place.name in held and place.axis is not None]
    return sum(
        (_summed(held[place.name].detach().double().square(), place, group) for place in places),
        torch.zeros(group.units, dtype=torch.float64),
    )


def _summed(values: torch.Tensor, place: Place, group: Group) -> torch.Tensor:
    """The sum (U,) of a tensor's values over all that belongs to each unit."""
    line = values.movedim(place.axis or 0, 0).reshape(place.size, -1).sum(1).cpu()
    return line[_columns(place, group, 1)].sum(1)


def _columns(place: Place, group: Group, kernel: int) -> torch.Tensor:
    """(U, K): the inputs that belong to each unit, where each index of the dimension has several."""
    each = np.stack([place.indices([unit]) for unit in range(group.units)])
    return torch.from_numpy((each[:, :, None] * kernel + np.arange(kernel)).reshape(group.units, -1))


def _contribution(reader: Reader) -> torch.Tensor:
    """The mean square of what each unit gives to the layer."""
    blocks = _blocks(reader.gram.double(), reader.columns)  # (U, K, K)
    parts = reader.weight.double()[:, reader.columns].movedim(1, 0)  # (U, O, K)
    return torch.einsum("uok,ukl,uol->u", parts, blocks, parts)


def inverted(gram: torch.Tensor) -> torch.Tensor:
    """The inverse (I, I) float64 of a damped matrix; inputs that are always zero count as if they were small."""
    damped = gram.double().clone()
    damped.diagonal().add_(DAMPING * float(damped.diagonal().mean()) or 1.0)
    inverse: torch.Tensor = torch.linalg.inv(damped)
    return inverse


def _missed(weight: torch.Tensor, inverse: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """What is missed when each unit goes by itself and the others make up for it: (U,)."""
    if columns.shape[1] == 1:
        single = columns.flatten()
        return weight[:, single].square().sum(0) / inverse.diagonal()[single]
    parts = weight[:, columns].movedim(1, 0)  # (U, O, K)
    solved: torch.Tensor = torch.linalg.solve(_blocks(inverse, columns), parts.mT)
    return (parts * solved.mT).sum((1, 2))


def _without(weight: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor) -> float:
    """Take inputs out of a weight and of an inverse matrix, in place; what is missed though the others make up for them."""
    parts = weight[:, gone]
    missed = float((parts * torch.linalg.solve(inverse[gone][:, gone], parts.T).T).sum())
    shares = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])  # (K, I)
    weight -= parts @ shares
    inverse -= inverse[:, gone] @ shares
    weight[:, gone] = 0
    inverse[gone], inverse[:, gone] = 0, 0
    return missed


def _blocks(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(U, K, K): of each unit the part of a matrix that is its own."""
    return matrix[columns[:, :, None], columns[:, None, :]]
