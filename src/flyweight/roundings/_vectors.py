"""Error feedback and sweeps where neighbouring inputs share an integer, as in van Baalen et al., GPTVQ (arXiv 2402.15319).

Within a vector the errors are weighed as the whole Gram matrix says: each coordinate's by what it leaves to make up for, the
error of those before it carried into those that follow.
"""

from __future__ import annotations

from typing import cast

import torch

from flyweight.codes._grid import Grid
from flyweight.codes._vectors import nearest
from flyweight.roundings._factor import Factor, carried

_BLOCK = 128
"""Columns between two large matrix products."""
_DAMPING = 1e-5
"""Added to the diagonal of a vector's own matrix, as a share of its mean."""
_CLEAR = 1 - 1e-5
"""A vector moves only when that lowers its error by more than float32 can mistake."""


def fed(target: torch.Tensor, grid: Grid, factor: Factor) -> torch.Tensor:
    """The int16 integers (O, I / v): each vector is the target plus its share of all errors before it, rounded.

    The factor's order keeps the inputs of a vector together.
    """
    wide, order, shares = grid.width, factor.order, carried(factor).to(target)
    table = cast(torch.Tensor, grid.table)[0]
    counts = factor.root.diagonal().flip(0).square().to(target)
    scales = grid.scales.repeat_interleave(grid.group, 1).T[order[::wide]]  # (I / v, O)
    aims = target.T[order].contiguous()  # (I, O): a column of the weight lies together in memory
    errors = torch.empty_like(aims)
    integers = torch.empty(len(target), len(scales), dtype=torch.int16)
    for start in range(0, len(aims), _BLOCK):
        end = min(start + _BLOCK, len(aims))
        wishes = aims[start:end] + shares[start:end, :start] @ errors[:start]
        for k in range(start, end, wide):
            at, scale = slice(k, k + wide), scales[k // wide]
            wish = wishes[k - start : k - start + wide] + shares[at, start:k] @ errors[start:k]
            lift = shares[at, at] + torch.eye(
                wide
            )  # what a vector's values stand for, with errors carried inside it
            wish = (wish + shares[at, at] @ aims[at]) / scale
            found = nearest(wish.T, counts[at][None], table @ lift.T)
            integers[:, int(order[k]) // wide] = (found + grid.low).to(torch.int16)
            errors[at] = aims[at] - table[found].T * scale
    return integers


def swept(integers: torch.Tensor, target: torch.Tensor, grid: Grid, gram: torch.Tensor) -> torch.Tensor:
    """The int16 integers (O, I / v) after each vector, first to last, was set to its best given all others."""
    wide, table = grid.width, cast(torch.Tensor, grid.table)[0]
    found, errors = integers.clone(), (grid.values(integers) - target).T.contiguous()  # (I, O)
    for k in range(0, len(gram), wide):
        at = slice(k, k + wide)
        metric, scale = gram[at, at].clone(), grid.scales[:, k // grid.group]
        if not bool(metric.any()):
            continue
        metric.diagonal().add_(_DAMPING * metric.diagonal().mean())
        root, failed = torch.linalg.cholesky_ex(metric)
        if int(failed):
            continue
        wish = target[:, at].T + errors[at] - torch.cholesky_solve(gram[at] @ errors, root)
        new = nearest((wish / scale).T @ root, None, table @ root)
        values = table[torch.stack((found[:, k // wide].long() - grid.low, new))].mT * scale  # (2, v, O)
        costs = ((values - wish).mT @ root).square().sum(2)
        better = costs[1] < costs[0] * _CLEAR
        found[:, k // wide] = torch.where(better, new + grid.low, found[:, k // wide]).to(torch.int16)
        errors[at] += torch.where(better, values[1] - values[0], 0.0)
    return found
