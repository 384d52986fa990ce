"""Weighted k-means of numbers: the k values that leave the least squared error.

Numbers in order make clusters intervals, so that dynamic programming finds the optimum (Wang & Song, "Ckmeans.1d.dp", R
Journal 2011). It runs over at most a few hundred bins, a bin per distinct number where they suffice, and then the exact
optimum is found; else Lloyd's iteration goes on from there over all numbers. Shapes: P problems of n numbers each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_BINS = 512
_WORK = 8e7
"""About how many steps dynamic programming may take in all."""
_SWEEPS = 200
_PIECE = 2**21
"""Entries of the costs that are held at a time."""


@dataclass(frozen=True, eq=False)
class _Ordered:
    """Numbers in ascending order, with running sums of what they count."""

    numbers: torch.Tensor  # (P, n) float32
    mass: torch.Tensor  # (P, n + 1) float64
    moment: torch.Tensor  # (P, n + 1) float64, of mass times number


def centres(numbers: torch.Tensor, counts: torch.Tensor | None, k: int) -> torch.Tensor:
    """The k ascending centres (P, k) float64 of each row of numbers (P, n) with |number| about 1, weighed by counts (P, n).

    Fewer distinct numbers than k are met exactly, the rest repeats one of them.
    """
    ordered = _ordered(numbers, counts)
    bins = min(_BINS, numbers.shape[1], math.isqrt(int(_WORK / (len(numbers) * k))))
    whole = k < numbers.shape[1] == bins  # a bin for each number
    if bins < 1.5 * k and not whole:  # joining few of them would leave cells of very different size
        bins = k
    label = _labels(ordered, bins)
    sums = torch.stack([_binned(part, label, bins) for part in _parts(ordered)])  # (3, P, bins)
    found = sums[:2] if bins == k else _joined(sums, k)
    return _lloyd(ordered, _means(found[0], found[1]))


def _ordered(numbers: torch.Tensor, counts: torch.Tensor | None) -> _Ordered:
    if counts is None:
        found, mass = numbers.sort(dim=1).values, torch.ones_like(numbers, dtype=torch.float64)
    else:  # equal numbers by what they count, so that the sums do not depend on the order that they came in
        counts, order = counts.double().sort(dim=1)
        found, again = numbers.gather(1, order).sort(dim=1, stable=True)
        mass = counts.gather(1, again)
    return _Ordered(found, _running(mass), _running(mass * found))


def _running(values: torch.Tensor) -> torch.Tensor:
    """Sums (P, n + 1) of the first 0, 1, ..., n values."""
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def _parts(ordered: _Ordered) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mass, mass times number, and mass times its square, of each number, (P, n)."""
    mass, moment = ordered.mass.diff(dim=1), ordered.moment.diff(dim=1)
    return mass, moment, mass * ordered.numbers.double().square()


def _labels(ordered: _Ordered, bins: int) -> torch.Tensor:
    """Which of the bins each number is in, (P, n) ascending: one per distinct number, or else by expected error.

    The best spacing of many centres in a density p goes with p^(1/3) (Panter & Dite, 1951), of which mass^(1/3) gap^(2/3)
    summed over the numbers is an estimate.
    """
    gaps = ordered.numbers.double().diff(dim=1)
    mass = ordered.mass.diff(dim=1)
    share = ((mass[:, 1:] + mass[:, :-1]) / 2).pow(1 / 3) * gaps.pow(2 / 3)
    place = _running(share)
    whole = place[:, -1:].clamp(min=1e-300)
    spaced = (place / whole * bins).long().clamp(max=bins - 1)
    rank = torch.nn.functional.pad((gaps > 0).cumsum(1), (1, 0))
    return torch.where(rank[:, -1:] < bins, rank, spaced)


def _binned(values: torch.Tensor, label: torch.Tensor, bins: int) -> torch.Tensor:
    return values.new_zeros(len(values), bins).scatter_add_(1, label, values)


def _joined(sums: torch.Tensor, k: int) -> torch.Tensor:
    """Sums (2, P, k) of mass and moment over the k intervals of bins with the least squared error.

    Sums (3, P, bins) of mass, moment and square.
    """
    size = max(1, _PIECE // (sums.shape[2] + 1) ** 2)
    return torch.cat([_best_cuts(part, k) for part in sums.split(size, dim=1)], dim=1)


def _best_cuts(sums: torch.Tensor, k: int) -> torch.Tensor:
    mass, moment, square = (_running(one) for one in sums)  # (P, bins + 1)
    cost = _costs(mass, moment, square)
    least, choices = cost[:, :, 0], []
    for _ in range(k - 1):
        least, choice = (cost + least[:, None, :]).min(-1)
        choices.append(choice)
    end = torch.full((len(mass), 1), mass.shape[1] - 1)
    cuts = [end]
    for choice in reversed(choices):
        end = choice.gather(1, end)
        cuts.append(end)
    places = torch.cat((torch.zeros_like(end), *reversed(cuts)), dim=1)  # (P, k + 1)
    return torch.stack((mass.gather(1, places).diff(dim=1), moment.gather(1, places).diff(dim=1)))


def _costs(mass: torch.Tensor, moment: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """Squared error (P, bins + 1, bins + 1) of one centre for the bins from the second index up to the first."""
    size, sum_, squares = (one[:, :, None] - one[:, None, :] for one in (mass, moment, square))
    cost = (squares - torch.where(size > 0, sum_.square() / size, 0.0)).clamp_(min=0)
    above = torch.ones(cost.shape[1:], dtype=torch.bool).triu(1)
    return cost.masked_fill_(above, math.inf)


def _means(mass: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Means (P, k) of intervals; one without mass takes its left neighbour's, or the first there is."""
    means = torch.where(mass > 0, moment / mass, -math.inf)
    filled = means.cummax(1).values
    first = torch.where(mass > 0, means, math.inf).amin(1, keepdim=True)
    return torch.where(filled.isinf(), first, filled)


def _lloyd(ordered: _Ordered, found: torch.Tensor) -> torch.Tensor:
    """Centres (P, k) moved to the means of the numbers nearest to them, until they stay or the sweeps are over."""
    cuts = None
    for _ in range(_SWEEPS):
        middles = ((found[:, 1:] + found[:, :-1]) / 2).float()
        inner = torch.searchsorted(ordered.numbers, middles.contiguous(), right=True)
        if cuts is not None and torch.equal(inner, cuts):
            break
        cuts = inner
        places = torch.nn.functional.pad(inner, (1, 0))
        places = torch.cat((places, torch.full_like(places[:, :1], ordered.numbers.shape[1])), dim=1)
        mass, moment = (one.gather(1, places).diff(dim=1) for one in (ordered.mass, ordered.moment))
        found = torch.where(mass > 0, moment / mass, found)
    return found
