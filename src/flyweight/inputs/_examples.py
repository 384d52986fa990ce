"""Checks the examples: what they are made of, that they are finite, and what about their values is worth saying."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flyweight.errors import DataError, foreign
from flyweight.records import Batch

_USUAL = 0.999
"""Share of an input's values that counts as usual."""
_FAR = 1000.0
"""An input that reaches this many times its usual values holds an outlier."""
_SAMPLE = 1 << 20


def check_examples(examples: Any) -> tuple[tuple[Batch, ...], list[str]]:
    """The examples as a tuple, and notes on them.

    Raises DataError when there are none, when they cannot be read, or when one is no batch or holds NaN or infinities.
    """
    if not isinstance(examples, Sequence) or isinstance(examples, str):
        raise DataError(
            "examples must be a sequence of batches",
            got=type(examples).__name__,
            where="Task.examples",
            way_out="a generator is used up after one pass: make it a list",
        )
    with foreign(DataError, "the examples must be readable", where="Task.examples"):
        found = tuple(examples)
    if not found:
        raise DataError(
            "calibration needs at least 1 batch",
            got="0",
            where="Task.examples",
            way_out="give a few typical inputs",
        )
    for index, batch in enumerate(found):
        _check_batch(batch, f"examples[{index}]")
    return found, _notes(found)


def shape(batch: Batch) -> str:
    """A batch's types and shapes in a few words, such as "float32 8x128"."""
    return ", ".join(
        f"{f'{name} ' if name else ''}{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}"
        for name, tensor in parts(batch).items()
    )


def parts(batch: Any) -> Mapping[str, Any]:
    """What a batch holds, by name; a tensor by itself has the name ""."""
    if isinstance(batch, dict):
        return batch
    return {str(index): part for index, part in enumerate(batch)} if isinstance(batch, tuple) else {"": batch}


def _check_batch(batch: Any, where: str) -> None:
    if not parts(batch):
        raise DataError(
            "a batch must hold a tensor", got="none", where=where, way_out="leave the empty batch out"
        )
    for name, tensor in parts(batch).items():
        place = f"{where}[{name}]" if name else where
        if not isinstance(tensor, torch.Tensor):
            way_out = (
                "dict(batch) makes a dict"
                if isinstance(tensor, Mapping)
                else "torch.as_tensor makes a tensor"
            )
            raise DataError(
                "a batch is a tensor, a tuple or a dict of tensors",
                got=type(tensor).__name__,
                where=place,
                way_out=way_out,
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            first = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            raise DataError(
                "examples must be finite",
                got="NaN or infinity",
                where=f"{place}, index {first}",
                way_out="leave that example out, or mend what prepares it",
            )


def _notes(examples: Sequence[Batch]) -> list[str]:
    """Inputs whose ranges say little about others: always one value, or one value far from all the rest."""
    found = []
    for name in parts(examples[0]):
        values = [parts(batch)[name] for batch in examples if name in parts(batch)]
        if all(tensor.is_floating_point() and tensor.numel() for tensor in values):
            found += _range_note(
                f"input {name}" if name else "the input", torch.cat([v.flatten().float() for v in values])
            )
    return found


def _range_note(name: str, values: torch.Tensor) -> list[str]:
    low, high = (float(v) for v in torch.aminmax(values))
    if low == high and len(values) > 1:
        return [
            f"{name} is {low:g} in all examples, a range of 0: what static int8 calibrates on them fits no other input"
        ]
    step = -(-len(values) // _SAMPLE)
    usual = float(torch.quantile(values[::step].abs(), _USUAL))
    largest = max(-low, high)
    if largest > _FAR * usual > 0:
        rule = "static int8 clips where the squared error is least (range mse)"
        return [
            f"{name} reaches {largest:.3g} where {_USUAL:.1%} of its values stay within {usual:.3g}; {rule}"
        ]
    return []
