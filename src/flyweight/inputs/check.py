"""Checks a task once at the border, so that everything behind it can rely on a sound model and sound examples."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flyweight.errors import DataError, ModelError, UsageError, foreign
from flyweight.inputs._examples import check_examples, parts, shape
from flyweight.records import Batch, Task

_LARGEST = 1e30


def check(task: Task) -> tuple[Task, tuple[str, ...]]:
    """The task with a copy of its model in eval mode on its device, and what is worth saying about it.

    Raises UsageError, ModelError or DataError that names what is wrong with the task, model or examples.
    """
    if not callable(task.score):
        raise UsageError(
            "score must be a function of predict",
            got=type(task.score).__name__,
            where="Task.score",
            way_out="define score(predict) that returns one number, or one per sample",
        )
    notes = check_model(task.model)
    examples, said = check_examples(task.examples)
    notes += said
    if any(module.training for module in task.model.modules()):
        notes.append("the model came in training mode; it is evaluated in eval mode, and left as it came")
    with foreign(
        ModelError, "the model must be copyable", way_out="keep files, locks and handles outside it"
    ):
        model = copy.deepcopy(task.model).eval()
    run_example(model, examples, 0)
    return dataclasses.replace(task, model=model, examples=examples), tuple(notes)


def check_model(model: Any) -> list[str]:
    """Notes on a model; raises ModelError when it is none, has no parameters, or holds NaN or infinite values."""
    if not isinstance(model, nn.Module):
        got = type(model).__name__ + (f" ({len(model)} tensors)" if isinstance(model, Mapping) else "")
        raise ModelError(
            "the model must be a torch.nn.Module",
            got=got,
            way_out="build the class and load the state into it",
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if not list(model.parameters()):
        raise ModelError("the model must have parameters", got="none", way_out="there is nothing to optimize")
    lazy = [name for name, p in tensors if isinstance(p, nn.UninitializedParameter) or p.is_meta]
    if lazy:
        raise ModelError(
            "parameters must be materialized", got=_first(lazy), way_out="load the weights first"
        )
    places: dict[str, list[str]] = {}
    for name, tensor in tensors:
        places.setdefault(str(tensor.device), []).append(name)
    if len(places) > 1:
        got = ", ".join(f"{device}: {_first(names)}" for device, names in places.items())
        raise ModelError(
            "all parameters must be on one device", got=got, way_out="move the model to one device"
        )
    notes = _apart(model)
    for name, tensor in tensors:
        notes += _finite(name, tensor, mask=not isinstance(tensor, nn.Parameter))
    return notes


def arguments(batch: Batch) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """How a model is called with a batch: what stands by place, and what by name."""
    if isinstance(batch, dict):
        return (), batch
    return ((batch,) if isinstance(batch, torch.Tensor) else tuple(batch)), {}


def call(model: Callable[..., Any], batch: Batch) -> Any:
    """What a model or function gives on a batch."""
    args, kwargs = arguments(batch)
    return model(*args, **kwargs)


def run(model: nn.Module, batch: Batch) -> Any:
    """The model's output on a batch, without gradients; the model's mode is not changed."""
    with torch.no_grad():
        return call(model, batch)


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in hex."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous()
        found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _apart(model: nn.Module) -> list[str]:
    """Notes on parameters that lie in one storage without being one: a copy of the model holds each by itself."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.numel():
            places.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
    way_out = "to tie them, give the modules one nn.Parameter"
    return [
        f"{_first(names)} share memory, but are parameters of their own and come apart; {way_out}"
        for names in places.values()
        if len(names) > 1
    ]


def _finite(name: str, tensor: torch.Tensor, mask: bool) -> list[str]:
    """Notes on one tensor; a buffer may be a mask, and masks hold infinities by design."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return []
    low, high = (float(v) for v in torch.aminmax(tensor.detach().float()))
    if math.isfinite(low) and math.isfinite(high):
        largest = max(abs(low), abs(high))
        return [f"{name} holds values up to {largest:.3g}"] if largest > _LARGEST else []
    bad = (~torch.isfinite(tensor)).nonzero()
    if mask and not bool(torch.isnan(tensor).any()):
        return []
    raise ModelError(
        "weights must be finite",
        got=f"{len(bad)} of {tensor.numel()} values NaN or infinite",
        where=f"{name}, first at {bad[0].tolist()}",
        way_out="repair or retrain the model",
    )


def run_example(model: nn.Module, examples: Sequence[Batch], index: int) -> Any:
    """The model's output on one example; raises DataError that names the example when the model refuses it."""
    batch = examples[index]
    usual = "a tensor is passed as model(x), a tuple as model(*xs), a dict as model(**xs)"
    with foreign(
        DataError,
        "the model must accept every example",
        where=f"examples[{index}], {shape(batch)}",
        way_out=lambda error: _cast(model, batch) or usual,
    ):
        return run(model, batch)


def _cast(model: nn.Module, batch: Batch) -> str:
    """What to cast when no tensor of the batch has the type that the model computes in."""
    wanted = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    given = [tensor.dtype for tensor in parts(batch).values()]
    if wanted is None or wanted in given:
        return ""
    return f"the model computes in {wanted}, the example is {given[0]}: cast one, as in x.to({wanted})"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
