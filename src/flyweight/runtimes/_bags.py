"""Bags of an embedding as plain operations on the rows that were looked up, for runtimes that know no bags.

Shapes: B bags, L numbers in each, or N numbers of all bags behind one another; D the width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

_SIGNATURE = inspect.signature(functional.embedding_bag)


def bags(
    look_up: Callable[[torch.Tensor], torch.Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """What `functional.embedding_bag` gives for these arguments, (B, D), with rows (..., D) from look_up(numbers)."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    numbers, padding = given["input"], given["padding_idx"]
    rows, factors = look_up(numbers), given["per_sample_weights"]
    if padding is not None:
        padding %= given["weight"].shape[0]
    kept = torch.ones_like(numbers, dtype=torch.bool) if padding is None else numbers != padding
    if factors is not None:
        rows = rows * factors[..., None]
    if numbers.ndim == 2:
        return _even(rows, kept, given["mode"])
    offsets = given["offsets"][:-1] if given["include_last_offset"] else given["offsets"]
    return _by_offsets(rows, kept, offsets, given["mode"])


def _even(rows: torch.Tensor, kept: torch.Tensor, mode: str) -> torch.Tensor:
    """Bags (B, D) of rows (B, L, D); those not kept (B, L) do not count."""
    if mode == "max":
        lowest = rows.masked_fill(~kept[..., None], -torch.inf).amax(1)
        return lowest.masked_fill(~kept.any(1)[:, None], 0.0)
    total = (rows * kept[..., None]).sum(1)
    return total if mode == "sum" else total / kept.sum(1).clamp(min=1)[:, None]


def _by_offsets(rows: torch.Tensor, kept: torch.Tensor, offsets: torch.Tensor, mode: str) -> torch.Tensor:
    """Bags (B, D) of rows (N, D), each from its offset on; rows that are not kept (N,) do not count."""
    places = torch.arange(rows.shape[0], device=rows.device)
    bag = (places[:, None] >= offsets[None]).sum(1) - 1
    index, empty = bag[:, None].expand_as(rows), rows.new_zeros(offsets.shape[0], rows.shape[1])
    counts = rows.new_zeros(offsets.shape[0]).scatter_add(0, bag, kept.to(rows.dtype))
    if mode == "max":
        hidden = rows.masked_fill(~kept[:, None], -torch.inf)
        found = (empty - torch.inf).scatter_reduce(0, index, hidden, "amax")
        return torch.where(counts[:, None] > 0, found, empty)
    total = empty.scatter_add(0, index, rows * kept[:, None])
    return total if mode == "sum" else total / counts.clamp(min=1)[:, None]
