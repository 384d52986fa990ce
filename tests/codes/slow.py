"""Codes once more, one entry at a time, in Python's own numbers: what the fast ones are compared with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch


def bits_of(row: Sequence[int], bits: int) -> bytes:
    """Integers of a row as a string of bits, the lowest first, in bytes."""
    text = "".join(str((value >> place) & 1) for value in row for place in range(bits))
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8][::-1], 2) for at in range(0, len(text), 8))


def trits_of(row: Sequence[int]) -> bytes:
    """Ternary digits of a row, five a byte."""
    parts = [row[at : at + 5] for at in range(0, len(row), 5)]
    return bytes(sum((value + 1) * 3**place for place, value in enumerate(part)) for part in parts)


def error(group: Sequence[float], counts: Sequence[float], levels: Sequence[float]) -> float:
    """Weighted squared error of the values nearest to the entries."""
    return math.fsum(c * min((x - v) ** 2 for v in levels) for x, c in zip(group, counts, strict=True))


def best_ternary(group: Sequence[float], counts: Sequence[float]) -> float:
    """The least error of (-s, 0, s), by trying each set of entries that may be not zero."""
    least = math.fsum(c * x * x for x, c in zip(group, counts, strict=True))
    for chosen in itertools.product((False, True), repeat=len(group)):
        mass = math.fsum(c for c, one in zip(counts, chosen, strict=True) if one)
        if mass > 0:
            along = math.fsum(c * abs(x) for x, c, one in zip(group, counts, chosen, strict=True) if one)
            scale = along / mass
            least = min(least, error(group, counts, (-scale, 0.0, scale)))
    return least


def best_clusters(numbers: Sequence[float], counts: Sequence[float], k: int) -> float:
    """The least error of k centres, by trying every way to cut the ordered numbers."""
    pairs = sorted(zip(numbers, counts, strict=True))
    least = math.inf
    for cuts in itertools.combinations(range(1, len(pairs)), min(k, len(pairs)) - 1):
        ends = (0, *cuts, len(pairs))
        least = min(least, math.fsum(_spread(pairs[a:b]) for a, b in itertools.pairwise(ends)))
    return least


def _spread(pairs: Sequence[tuple[float, float]]) -> float:
    mass = math.fsum(c for _, c in pairs)
    if mass == 0:
        return 0.0
    mean = math.fsum(c * x for x, c in pairs) / mass
    return math.fsum(c * (x - mean) ** 2 for x, c in pairs)


def groups(
    weight: torch.Tensor, energy: torch.Tensor | None, group: int | str | None
) -> list[tuple[list[float], list[float]]]:
    """The entries of each group, row after row, and what each counts."""
    rows, columns = weight.shape
    counts = [1.0] * columns if energy is None else (energy.double() / energy.double().mean()).tolist()
    if group == "tensor":
        return [(weight.double().flatten().tolist(), counts * rows)]
    length = group or columns
    assert isinstance(length, int)
    places = [slice(at, at + length) for at in range(0, columns, length)]
    return [(row[place], counts[place]) for row in weight.double().tolist() for place in places]


def values(
    integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group: int
) -> torch.Tensor:
    """(integer - zero) * scale, an entry at a time, in float64."""
    found = torch.zeros(integers.shape, dtype=torch.float64)
    for row, column in itertools.product(range(integers.shape[0]), range(integers.shape[1])):
        zero = 0.0 if zeros is None else float(zeros[row, column // group])
        found[row, column] = (int(integers[row, column]) - zero) * float(scales[row, column // group])
    return found
