"""A quantized layer in tuning: its integers and scales move, while it computes with what will be stored.

Gradients pass the rounding of integers unchanged, as in Cheng et al., SignRound (arXiv 2309.05516, 2023), and reach scales
and the values of a palette through the integers as they are, as in Chen et al., EfficientQAT (arXiv 2407.11062, 2024).

Shapes: a weight is (O, I), output channels by inputs of one of them; G groups of n inputs share a scale; P tables.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call

from flyweight import discover
from flyweight.codes._stored import power_below
from flyweight.transforms._quantized import Decoded, QuantizedLayer

_EDGE = 0.499
"""How far beyond the lowest and the highest integer a level may be."""
_SIDE = 0.7
"""How far from its integer a level begins, as a share of where the weight lies: with all of it noise would turn many."""
_LEAST = 1e-30
"""The smallest unit that table values are told in."""


class Numbers:
    """The stored weight of a quantized layer as numbers that can be moved, one unit of each about as far as one of others.

    levels (O, I): integers, and how near each is to the next one; None where a table holds the values: its integers stay.
    sizes (O, G), or (1, 1) of a scale that all share: scales over those that it came with; None where a code has no scales.
    table (P, entries): values over `unit` (P, 1), about the root of their mean square; None without a table.
    """

    def __init__(self, layer: QuantizedLayer, weight: torch.Tensor | None = None) -> None:
        """layer: one in an evenly spaced code or a palette; it stays as it is.

        weight: (O, I) what was rounded: levels begin on its side of each integer.
        """
        self.layer = layer
        self.integers, self.grid = layer.encoded()
        scales, table = self.grid.scales, self.grid.table
        shared = getattr(layer.options, "group", None) == "tensor"
        scaled = table is None or bool((scales != 1).any())
        self.levels = self._begin(weight).requires_grad_() if table is None else None
        self.sizes = torch.ones_like(scales[:1] if shared else scales).requires_grad_() if scaled else None
        self.table, self.unit = table, torch.ones(1)
        if table is not None:
            self.unit = power_below(table.square().mean(1, keepdim=True).sqrt().clamp(min=_LEAST))
            self.table = (table / self.unit).requires_grad_()

    def _begin(self, weight: torch.Tensor | None) -> torch.Tensor:
        levels = self.integers.float()
        if weight is None:
            return levels
        wide = self.grid.scales.repeat_interleave(self.grid.group, 1)
        off = (weight.float() - self.grid.values(self.integers)) / wide
        return levels + _SIDE * off.clamp_(-0.5, 0.5)

    def moving(self) -> list[torch.Tensor]:
        """The tensors that can be moved: levels in units of a step of the grid, all others relative to where they began."""
        return [one for one in (self.levels, self.sizes, self.table) if one is not None]

    def hold(self) -> None:
        """Bring back what went where it says nothing: levels beyond the grid, scales that shrank to nothing or turned."""
        with torch.no_grad():
            if self.levels is not None:
                self.levels.clamp_(self.grid.low - _EDGE, self.grid.high + _EDGE)
            if self.sizes is not None:
                self.sizes.clamp_(min=0.1)

    def scales(self) -> torch.Tensor:
        """(O, G) the scales, through which gradients reach `sizes`."""
        return self.grid.scales if self.sizes is None else self.grid.scales * self.sizes

    def values(self) -> torch.Tensor:
        """(O, I) float32 the weight, through which gradients reach all that can be moved."""
        if self.table is not None:
            index = (self.integers.long() - self.grid.low).reshape(len(self.table), -1)
            found = (self.table * self.unit).gather(1, index).reshape(self.integers.shape)
            return found * self.scales().repeat_interleave(self.grid.group, 1)
        form = (self.grid.low, self.grid.high)
        found = _Rounded.apply(self.levels, self.scales(), self.grid.zeros, form)  # type: ignore[no-untyped-call]
        return cast(torch.Tensor, found)

    def frozen(self) -> QuantizedLayer:
        """The layer with these numbers stored."""
        with torch.no_grad():
            integers, table = self.integers, self.table
            if self.levels is not None:
                integers = self.levels.round().clamp(self.grid.low, self.grid.high).to(torch.int16)
            if table is not None:
                integers, table = _ascending(integers, table * self.unit, self.grid.low)
            grid = dataclasses.replace(self.grid, scales=self.scales(), table=table)
        code = discover.method("codes", self.layer.code)
        return self.layer.recoded(integers, code.storable(grid, self.layer.options))


class TunedLayer(nn.Module):
    """The layer `inner` with the weight that some numbers stand for, in its own layout and dtype."""

    def __init__(self, layer: QuantizedLayer, numbers: Numbers) -> None:
        """layer: one whose stored weight is that of the numbers."""
        super().__init__()
        self.inner, self.numbers = layer.inner, numbers
        self.shape, self.dtype, self.transposed = layer.shape, layer.dtype, layer.transposed

    @property
    def weight(self) -> torch.Tensor:
        """The weight as it is now; gradients reach the numbers through it."""
        return self._decoded().as_subclass(Decoded)

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's bias; None if it has none."""
        return getattr(self.inner, "bias", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the inner layer computes with the weight."""
        return functional_call(self.inner, {"weight": self._decoded()}, args, kwargs)

    def _decoded(self) -> torch.Tensor:
        found = self.numbers.values().to(self.dtype)
        return (found.T if self.transposed else found).reshape(self.shape)


class _Rounded(torch.autograd.Function):
    """The values of levels on a grid: rounded forward; backward as if they were not."""

    @staticmethod
    def forward(
        ctx: Any,
        levels: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        ends: tuple[int, int],
    ) -> torch.Tensor:
        units = levels.round().clamp_(*ends).unflatten(1, (scales.shape[1], -1))
        if zeros is not None:
            units.sub_(zeros[..., None])
        ctx.save_for_backward(units, scales)
        found: torch.Tensor = (units * scales[..., None]).flatten(1)
        return found

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> Any:
        units, scales = ctx.saved_tensors
        passed = given[0].reshape(units.shape)
        return (passed * scales[..., None]).flatten(1), (passed * units).sum(-1), None, None


def _ascending(integers: torch.Tensor, table: torch.Tensor, low: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same values with each table (P, entries) in ascending order, and the integers (O, I) that point into it."""
    found, order = table.sort(dim=1, stable=True)
    places = order.argsort(1)
    index = (integers.long() - low).reshape(len(table), -1)
    moved: torch.Tensor = places.gather(1, index) + low
    return moved.reshape(integers.shape).to(torch.int16), found
