"""Weighted k-means of small vectors: Lloyd's iteration from a start as in Arthur & Vassilvitskii, "k-means++" (SODA 2007).

What a difference counts may vary from coordinate to coordinate. Shapes: n points of v coordinates, a table of k vectors.
"""

from __future__ import annotations

import torch

_PIECE = 2**20
"""Distances that are held at a time."""
_SWEEPS, _STILL = 25, 1e-3
"""Iterations at most, and the share of the error by which one must lower it for another to follow."""


def nearest(points: torch.Tensor, counts: torch.Tensor | None, table: torch.Tensor) -> torch.Tensor:
    """The rows (n,) of table (k, v) that are nearest to points (n, v), the first one of equals.

    counts (n, v), or one that expands to it, weighs squared differences; None, and a point's that are all 0, weigh evenly.
    """
    places = torch.cat((table, table.square()), 1).T
    step = max(1, _PIECE // len(table))
    weights = torch.ones_like(points[:1]) if counts is None else counts
    weights = torch.where((weights == 0).all(1, keepdim=True), 1.0, weights).expand_as(points)
    found = [
        (torch.cat((-2 * weight * part, weight), 1) @ places).argmin(1)
        for part, weight in zip(points.split(step), weights.split(step), strict=True)
    ]
    return torch.cat(found)


def centres(points: torch.Tensor, counts: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """A table (k, v) with little squared error to points (n, v), weighed by counts (n, v), all float32.

    Fewer distinct points than k are met exactly.
    """
    table, last = _start(points, counts, k, seed), float("inf")
    for _ in range(_SWEEPS):
        index = nearest(points, counts, table)
        error = float((counts * (points - table[index]).square()).sum(dtype=torch.float64))
        if not error < last * (1 - _STILL):
            break
        last, mass = error, torch.zeros(table.shape, dtype=torch.float64)
        moment = mass.clone().index_add_(0, index, (counts * points).double())
        mass.index_add_(0, index, counts.double())
        table = torch.where(mass > 0, moment / mass, table.double()).float()
    return table


def _start(points: torch.Tensor, counts: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """k of the points (k, v), each drawn in proportion to its squared distance from those before it."""
    chance = torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found, far = torch.empty(k, points.shape[1]), counts.sum(1)
    for number in range(k):
        running = far.cumsum(0, dtype=torch.float64)
        drawn = torch.searchsorted(running, chance[number] * running[-1], right=True)
        found[number] = points[drawn.clamp(max=len(points) - 1)]
        apart = (counts * (points - found[number]).square()).sum(1)
        far = apart if not number else torch.minimum(far, apart)
    return found
