"""What teaching without labels needs: examples that teach and others that judge, and how far answers are apart."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from flyweight.analysis.answers import Answer, output_of
from flyweight.errors import DataError
from flyweight.inputs._examples import parts
from flyweight.records import Batch
from flyweight.transforms._copies import view

_APART = 8
"""One in so many examples judges what the others taught."""
_MEMORY = (0.9, 0.99)
"""Shares of the past in each entry's mean slope, and in the mean square that it is measured by."""
_PIECES = 64
"""Examples that batches are split into where they are fewer: many small steps teach more than a few large ones."""


def pieces(model: nn.Module, examples: Sequence[Batch]) -> Sequence[Batch]:
    """The examples, split along their first dimension where there are few of them and the model takes them so."""
    count = -(-_PIECES // len(examples))
    found = [piece for batch in examples for piece in _split(batch, count)]
    try:
        output_of(view(model, {}).eval(), found[:1], 0)
    except DataError:
        return examples
    return found


@dataclass(frozen=True)
class Pace:
    """How long is taught."""

    passes: float
    """How often each example teaches."""
    seed: int
    """Of the order of the examples."""
    seconds: float = math.inf


def learn(
    moved: Sequence[tuple[torch.Tensor, float]],
    loss: Callable[[int], torch.Tensor],
    taught: Sequence[int],
    pace: Pace,
    after: Callable[[], None],
) -> None:
    """Move tensors by one example after another, in an order that is drawn, less and less until the time is over.

    moved: with how far each one's first steps go; after: called behind each step. By Adam (Kingma and Ba, arXiv 1412.6980,
    2014): inputs differ in size by channel, and so do slopes; measured by one size for all, those of the largest channels
    alone would move. Slopes that are not finite move nothing.
    """
    steps, begin = max(1, round(pace.passes * len(taught))), time.monotonic()
    optimizer = torch.optim.Adam([{"params": [one]} for one, _ in moved], betas=_MEMORY)
    random = torch.Generator().manual_seed(pace.seed)
    for step in range(steps):
        if not step % len(taught):
            order = torch.randperm(len(taught), generator=random).tolist()
        done = max(step / steps, (time.monotonic() - begin) / pace.seconds)
        if done >= 1:
            return
        for group, (_, rate) in zip(optimizer.param_groups, moved, strict=True):
            group["lr"] = rate * (1 - done)
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(taught[order[step % len(taught)]]).backward()
        if all(one.grad is None or bool(one.grad.isfinite().all()) for one, _ in moved):
            optimizer.step()
        after()


def mean(loss: Callable[[int], torch.Tensor], kept: Sequence[int]) -> float:
    """The mean loss on some examples."""
    with torch.no_grad():
        return sum(float(loss(index)) for index in kept) / len(kept)


def apart(wanted: Answer, found: Answer) -> torch.Tensor:
    """() KL divergence of a prediction's labels, the mean over predictions; without logits the relative squared error."""
    if wanted.logits:
        first, second = (one.tensors[0].float().flatten(0, -2).log_softmax(-1) for one in (wanted, found))
        return nn.functional.kl_div(second, first, reduction="batchmean", log_target=True)
    return torch.stack([_error(*pair) for pair in zip(wanted.tensors, found.tensors, strict=True)]).sum()


def _error(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """() the relative squared error."""
    square: torch.Tensor = wanted.float().square().sum().clamp(min=1e-30)
    return (wanted.float() - found.float()).square().sum() / square


def error_of_rows(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """() the mean over the hidden states (..., F) of each one's relative squared error; of other tensors as a whole.

    What follows a block normalizes each hidden state by itself, and some, as that of the first token, are a hundred times as
    large as others: in a sum of squares they would count alone.
    """
    if wanted.ndim != 3:
        return _error(wanted, found)
    squares = wanted.float().square().sum(-1).clamp(min=1e-30)
    return ((wanted.float() - found.float()).square().sum(-1) / squares).mean()


def parted(count: int) -> tuple[list[int], list[int]]:
    """Which examples teach, and which judge: every eighth, at least one; where there are fewer than four all do both."""
    every = list(range(count))
    if count < 4:
        return every, every
    kept = every[:: -min(_APART, count)]
    return [index for index in every if index not in kept], kept


def _split(batch: Batch, count: int) -> list[Batch]:
    """A batch in up to `count` pieces along the first dimension, where all its tensors share that."""
    named = dict(parts(batch))
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in named.values()}
    if len(sizes) != 1 or min(sizes) < 2:
        return [batch]
    columns = [tensor.chunk(count) for tensor in named.values()]
    rows = list(zip(*columns, strict=True))
    if isinstance(batch, torch.Tensor):
        return [row[0] for row in rows]
    return [dict(zip(named, row, strict=True)) if isinstance(batch, dict) else row for row in rows]


@contextlib.contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """No slopes for the model's own parameters meanwhile."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
