"""The inputs of an operation as rows: what one output of a linear layer or convolution is computed from.

Shapes: P groups of a convolution (1 for linear layers), n rows, I inputs of one output channel, in the order of its weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from flyweight.analysis.calls import Call

_ROOM = 32 << 20
"""Bytes of patches that are laid out at once."""


def input_rows(call: Call, every: int = 1) -> Iterator[torch.Tensor]:
    """Chunks (P, n, I) float32 of a call's inputs: all of a linear layer's at once, patches some MB each.

    every: of so many neighbouring lines of a convolution's outputs one is taken.
    """
    if call.kind != "conv":
        yield call.input.detach().float().reshape(1, -1, call.input.shape[-1])
        return
    groups, dims = int(call.layout["groups"]), call.weight.ndim - 2
    patches = _patches(call.input.detach(), tuple(call.weight.shape[2:]), call)[:, every // 2 :: every]
    samples, height = patches.shape[:2]
    line = 4 * math.prod(patches.shape[2:])  # bytes of one line of outputs
    high = min(max(1, _ROOM // max(line, 1)), max(height, 1))
    many = max(1, _ROOM // max(line * height, 1))
    for first in range(0, samples, many):
        for top in range(0, height, high):
            part = patches[first : first + many, top : top + high].float()
            yield part.flatten(dims + 1).flatten(0, dims).unflatten(1, (groups, -1)).transpose(0, 1)


def input_sums(call: Call) -> torch.Tensor:
    """The sum (P, I) float64 of the rows that `input_rows` yields of a call, without laying them out."""
    if call.kind != "conv":
        return call.input.detach().float().reshape(-1, call.input.shape[-1]).sum(0).double()[None]
    dims = call.weight.ndim - 2
    whole = (
        call.input.detach().float().sum(0, keepdim=True).double()
    )  # the sum of patches is the patches of the sum
    patches = _patches(whole, tuple(call.weight.shape[2:]), call)
    return patches.sum(tuple(range(dims + 1))).reshape(int(call.layout["groups"]), -1)


def row_count(call: Call) -> int:
    """How many rows `input_rows` yields of a call."""
    if call.kind != "conv":
        return call.input.numel() // max(call.input.shape[-1], 1)
    return call.output.shape[0] * math.prod(call.output.shape[2:])


def reading(call: Call) -> tuple[Any, ...]:
    """What else than the input tells which rows a call reads: equal for calls that read equal rows of one tensor."""
    if call.kind != "conv":
        return ("linear",)
    return (tuple(call.weight.shape[2:]), *(str(call.layout[name]) for name in sorted(call.layout)))


def same_values(module_input: Any, operand: torch.Tensor) -> bool:
    """Whether two tensors hold the same values up to zero padding and reshaping; sums tell them apart well enough."""
    if module_input is operand:
        return True
    if not isinstance(module_input, torch.Tensor) or module_input.dtype != operand.dtype:
        return False
    if not operand.is_floating_point():
        return bool(
            module_input.numel() == operand.numel() and torch.equal(module_input.flatten(), operand.flatten())
        )
    first, second = (t.detach().double() for t in (module_input, operand))
    return torch.allclose(
        first.sum(), second.sum(), rtol=1e-9, atol=1e-9 * float(first.abs().sum()) + 1e-30
    ) and (torch.allclose(first.square().sum(), second.square().sum(), rtol=1e-9, atol=1e-30))


def _patches(x: torch.Tensor, kernel: tuple[int, ...], call: Call) -> torch.Tensor:
    """A view (N, outputs..., C, kernel...) of x (N, C, ...), padded with zeros."""
    dims = len(kernel)
    stride, dilation = (_each(call.layout[name], dims) for name in ("stride", "dilation"))
    spans = [step * (size - 1) + 1 for step, size in zip(dilation, kernel, strict=True)]
    x = F.pad(x, _padding(call.layout["padding"], spans))
    for at in range(dims):
        x = x.unfold(2 + at, spans[at], stride[at])[..., :: dilation[at]]
    return x.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))


def _padding(padding: Any, spans: list[int]) -> list[int]:
    """Zeros before and after each dimension, the last dimension first."""
    if padding == "same":
        both = [((span - 1) // 2, span - 1 - (span - 1) // 2) for span in spans]
    else:
        both = [(one, one) for one in _each(0 if padding == "valid" else padding, len(spans))]
    return [zeros for pair in reversed(both) for zeros in pair]


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """An option of a convolution for each of its dimensions."""
    several = tuple(value) if isinstance(value, list | tuple) else (value,)
    return tuple(int(one) for one in (several * dims if len(several) == 1 else several))
