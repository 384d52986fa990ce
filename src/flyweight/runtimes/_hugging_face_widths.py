"""Finds the numbers of a config of transformers that say the widths which a model has after some of its units were taken out.

A config has one number for all layers, so only models whose layers are equally wide can be said so. Which number of which
name makes which dimension is not known here: it is tried, without values, and then the model that the config makes must
answer as the given one does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from flyweight.analysis.answers import floats_of
from flyweight.errors import FlyweightError, ModelError, foreign
from flyweight.inputs.check import call

Weights = Mapping[str, torch.Tensor]
_Wrong = Mapping[str, tuple[torch.Size, torch.Size]]
"""Tensors' names, with the shapes that the config gives and that there are."""


def fitted(model: nn.Module, weights: Weights) -> Any:
    """A config of which a model of this class has the shapes of these weights and gives this model's answers.

    weights: as floats, by the names that the model of transformers knows. The model's own config where that says the shapes.
    Raises ModelError where no change of its whole numbers does.
    """
    host: Any = model
    config = copy.deepcopy(host.config)
    wrong = _wrong(model, config, weights)
    if not wrong:
        return config
    for found in _solutions(model, config, wrong, weights):
        if _answers_alike(model, found, weights):
            return found
    name, (told, there) = next(iter(wrong.items()))
    raise ModelError(
        "a config of transformers must be able to say the widths of all layers",
        got=f"{tuple(there)} where it says {tuple(told)}",
        where=name,
        way_out="prune groups of one kind to one width in all layers, or choose another runtime",
    )


def _solutions(model: nn.Module, config: Any, wrong: _Wrong, weights: Weights) -> Iterator[Any]:
    """Configs that say all shapes, each change having set some right; those first that set most right with one change."""
    tried = [(other, _wrong(model, other, weights)) for other in _others(config, wrong)]
    for other, left in sorted(tried, key=lambda pair: len(pair[1])):
        if not left:
            yield other
        elif left.keys() < wrong.keys():
            yield from _solutions(model, other, left, weights)


def _others(config: Any, wrong: _Wrong) -> Iterator[Any]:
    """Configs with one whole number changed as some dimension is that it may be a factor of."""
    pairs = {pair for shapes in wrong.values() for pair in zip(*shapes, strict=False) if pair[0] != pair[1]}
    for name, value in vars(config).items():
        if type(value) is int and value > 1:
            news = {
                value * there // told
                for told, there in pairs
                if told % value == 0 and value * there % told == 0
            }
            for new in sorted(news):
                other = copy.deepcopy(config)
                setattr(other, name, new)
                yield other


def _wrong(model: nn.Module, config: Any, weights: Weights) -> _Wrong:
    """The tensors to which a config gives another shape; all of them where no model can be made from it."""
    try:
        with torch.device("meta"), foreign(ModelError, "a model must be made from the config"):
            made = type(model)(config).state_dict()
    except FlyweightError:
        return {name: (torch.Size(), tensor.shape) for name, tensor in weights.items()}
    told = {name: made[name].shape for name in weights if name in made}
    return {
        name: (shape, weights[name].shape) for name, shape in told.items() if shape != weights[name].shape
    }


def _answers_alike(model: nn.Module, config: Any, weights: Weights) -> bool:
    """Whether a model of the config gives the answers of this one, up to rounding."""
    host: Any = model
    made = type(model)(config).eval().to(host.dtype)
    made.load_state_dict(weights, strict=False)
    given = {name: value.to(host.device) for name, value in host.dummy_inputs.items()}
    with torch.no_grad(), foreign(ModelError, "a narrower model must run on transformers' own dummy inputs"):
        pairs = [floats_of(call(one, given)) for one in (made.to(host.device), model)]
    room = torch.finfo(host.dtype).eps ** 0.5
    return all(float((a - b).norm()) <= room * float(b.norm()) for a, b in zip(*pairs, strict=True))
