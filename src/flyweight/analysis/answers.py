"""What a model answers: its output with gradients, which tensors of it count, and whether they are logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flyweight.analysis.calls import tensors_in
from flyweight.errors import DataError, foreign
from flyweight.inputs._examples import shape
from flyweight.inputs.check import call
from flyweight.records import Batch


@dataclass(frozen=True, eq=False)
class Answer:
    """The floating tensors of an output that count."""

    tensors: Sequence[torch.Tensor]
    logits: bool
    """Whether there is one tensor, (..., C), whose last dimension holds the logits of C labels."""


def vocabularies_of(model: nn.Module) -> set[int]:
    """How many rows the model's embeddings have."""
    return {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}


def output_of(model: nn.Module, examples: Sequence[Batch], index: int) -> Any:
    """The model's output on one example, with gradients; raises DataError where the model refuses it."""
    where = f"examples[{index}], {shape(examples[index])}"
    with foreign(DataError, "the model must accept every example, with gradients", where=where):
        return call(model, examples[index])


def answer(output: Any, known: Collection[int]) -> Answer:
    """What of an output counts: the logits where there are any, else all floating tensors of at least one dimension.

    A tensor holds logits when it is called so, or when its last dimension is one of the known vocabularies' sizes.
    """
    parts, floats = _parts(output), floats_of(output)
    named = parts.get("logits") if isinstance(parts, Mapping) else None
    if named is None and floats and floats[0].ndim > 1 and floats[0].shape[-1] in known:
        named = floats[0]
    return Answer(floats if named is None else [named], named is not None)


def floats_of(output: Any) -> list[torch.Tensor]:
    """All floating tensors of at least one dimension in an output; caches, which are objects, are left out."""
    return [one for one in tensors_in([_parts(output)]) if one.is_floating_point() and one.ndim]


def _parts(output: Any) -> Any:
    """An output, a record's fields by their names."""
    record = dataclasses.is_dataclass(output) and not isinstance(output, Mapping)
    return vars(output) if record else output
