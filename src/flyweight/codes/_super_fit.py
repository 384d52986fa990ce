"""Scales and offsets that are small multiples of two half floats of each super-block, with little squared error.

value = level * scale - floor; a scale is a super-scale times a multiple, a floor another super-scale times a lift. Shapes:
(A, G, n) groups of entries; (1, G, n) what each counts, or None; (A, G) scales and floors; (A, S) super-scales, each of
G / S groups in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from flyweight.codes._search import TINY, Level, Scaling, best, error, searched, usable
from flyweight.codes._stored import kept

BLOCK = 256
"""Inputs of a super-block."""
_ROUNDS = 3
"""Times that multiples and super-scales are fitted to each other."""
_FACTORS = tuple(sign * factor for factor in torch.linspace(1.3, 0.55, 13).tolist() for sign in (1.0, -1.0))
_PARTS = torch.linspace(1.0, 0.5, 6).tolist()
_ENDS = [(a, a) for a in _PARTS] + [pair for a in _PARTS[1:5] for pair in ((1.0, a), (a, 1.0))]
"""Shares of a group's range that are tried, below and above 0."""


@dataclass(frozen=True)
class Form:
    """What a super-block holds for its entries and groups."""

    low: int
    high: int
    group: int
    """Inputs that share a scale."""
    bits: int
    """Of a multiple."""
    lifted: bool = False
    """Whether multiples count from 0, and groups have floors; otherwise multiples have a sign."""

    @property
    def most(self) -> int:
        """The largest magnitude of a multiple; with a sign it is a negative one."""
        return (1 << self.bits) - 1 if self.lifted else 1 << self.bits - 1

    @property
    def groups(self) -> int:
        """Groups of a super-block."""
        return BLOCK // self.group


class _Pair(NamedTuple):
    """Super-scales and their multiples."""

    supers: torch.Tensor  # (A, S)
    multiples: torch.Tensor  # (A, S, G / S)

    @property
    def product(self) -> torch.Tensor:
        return (self.supers[..., None] * self.multiples).flatten(1)


class _Blocks(NamedTuple):
    scales: _Pair
    floors: _Pair | None

    @property
    def scaling(self) -> Scaling:
        scales = self.scales.product
        return Scaling(scales, None if self.floors is None else self.floors.product / scales)


class _Line(NamedTuple):
    """Scales and zeros: value = (level - zero) * scale."""

    scales: torch.Tensor  # (A, G)
    zeros: torch.Tensor  # (A, G)


class _Sums(NamedTuple):
    """Sums over the entries x of each group, weighed, for their levels q; each (A, G)."""

    n: torch.Tensor
    q: torch.Tensor
    qq: torch.Tensor
    x: torch.Tensor
    xq: torch.Tensor


def fitted(
    groups: torch.Tensor, counts: torch.Tensor | None, form: Form, level: Level
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and floors (A, G), as they will be stored; floors are None where the form has none."""
    empty = (groups == 0).all(-1)
    if bool(empty.all()):
        ones = torch.ones_like(empty, dtype=torch.float32)
        return ones, 0 * ones if form.lifted else None
    floors = None
    if form.lifted:
        line = _affine(groups, counts, form, level)
        scales = torch.where(empty, 0.0, line.scales)
        floors = _Pair(*factored(line.zeros * scales, form, zero=True)[:2])
    else:
        scales = torch.where(empty, 0.0, _plain(groups, counts, level))
    found = _Blocks(_Pair(*factored(scales, form)[:2]), floors)
    for _ in range(_ROUNDS):
        found = _released(groups, counts, _nearby(groups, counts, found, form, level), level)
    found = _nearby(groups, counts, found, form, level)
    return found.scales.product, None if found.floors is None else found.floors.product


def factored(
    values: torch.Tensor, form: Form, zero: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Super-scales (A, S) and multiples (A, S, G / S) of values (A, G), the nearest ones; and where they are exact, (A, S).

    zero: multiples may be 0, as those of floors; a scale may not.
    """
    blocks = values.unflatten(1, (-1, form.groups))
    peaks = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))[..., 0]
    supers, exact = torch.ones_like(peaks), torch.zeros_like(peaks, dtype=torch.bool)
    for most in range(form.most, 0, -1):  # the largest multiple may be any: some super-scale must give it
        top = float(most if form.lifted else -most)
        tried = kept(torch.where(peaks.abs() > TINY, peaks, top) / top, "float16")
        right = (_multiples(blocks, tried, form, zero) * tried[..., None] == blocks).all(2)
        supers = torch.where(~exact & (right | (most == form.most)), tried, supers)
        exact |= right
        if bool(exact.all()):
            break
    return supers, _multiples(blocks, supers, form, zero), exact


def _multiples(blocks: torch.Tensor, supers: torch.Tensor, form: Form, zero: bool) -> torch.Tensor:
    """The nearest multiples (A, S, G / S) of super-scales (A, S)."""
    found = (blocks / supers[..., None]).round_()
    return _allowed(found, form, zero)


def _allowed(multiples: torch.Tensor, form: Form, zero: bool) -> torch.Tensor:
    low, high = (0, form.most) if form.lifted else (-form.most, form.most - 1)
    found = multiples.clamp(low, high)
    return found if zero else torch.where(found == 0, 1.0, found)


def _plain(groups: torch.Tensor, counts: torch.Tensor | None, level: Level) -> torch.Tensor:
    """Scales of either sign for levels around 0, each group by itself."""
    lowest = float(level(torch.tensor(-1e9)))
    covering = usable(groups.abs().amax(-1) / -lowest)
    return best(groups, counts, searched(groups, counts, covering, _FACTORS, level), level).scales


def _affine(groups: torch.Tensor, counts: torch.Tensor | None, form: Form, level: Level) -> _Line:
    """Scales and zeros, each group by itself: the best of least squares from parts of its range."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1)
    high = torch.where(high - low > TINY, high, 0.0)
    tried = []
    for a, b in _ENDS:
        scales = usable((high * b - low * a) / form.high)
        one = _Line(scales, -low * a / scales)
        for _ in range(2):
            one = _line(groups, counts, one, level)
        tried.append(one)
    errors = [error(groups, counts, Scaling(*one), level) for one in tried]
    which = torch.stack(errors).argmin(0)[None]
    return _Line(*(torch.stack(parts).gather(0, which)[0] for parts in zip(*tried, strict=True)))


def _line(groups: torch.Tensor, counts: torch.Tensor | None, line: _Line, level: Level) -> _Line:
    """The scales and floors that are best for the levels that others give; floors are not below 0."""
    n, q, qq, x, xq = _sums(groups, counts, Scaling(*line), level)
    apart = n * qq - q.square()
    scales = (n * xq - q * x) / apart
    floors = (scales * q - x) / n
    scales, floors = torch.where(floors < 0, xq / qq, scales), floors.clamp(min=0)
    sound = (apart > 1e-6 * n * qq) & (scales > TINY) & floors.isfinite()
    return _Line(torch.where(sound, scales, line.scales), torch.where(sound, floors / scales, line.zeros))


def _sums(groups: torch.Tensor, counts: torch.Tensor | None, scaling: Scaling, level: Level) -> _Sums:
    """The sums for the levels, counted from the lowest, that a scaling gives."""
    numbers = groups / scaling.scales[..., None]
    levels = level(numbers if scaling.zeros is None else numbers.add_(scaling.zeros[..., None]))
    counts = groups.new_ones(1, 1, 1).expand_as(groups[:1]) if counts is None else counts
    weighed, counted = groups * counts, levels * counts
    n = counts.sum(-1).expand(groups.shape[:2])
    return _Sums(n, counted.sum(-1), (counted * levels).sum(-1), weighed.sum(-1), (weighed * levels).sum(-1))


def _nearby(
    groups: torch.Tensor, counts: torch.Tensor | None, found: _Blocks, form: Form, level: Level
) -> _Blocks:
    """The blocks with each group's best multiples among those that are there and their neighbours."""
    steps = (0.0, -1.0, 1.0)
    scales = [
        found.scales._replace(multiples=_allowed(found.scales.multiples + s, form, False)) for s in steps
    ]
    floors: list[_Pair | None] = [None]
    if found.floors is not None:
        own = found.floors
        floors = [own._replace(multiples=_allowed(own.multiples + s, form, True)) for s in steps]
    tried = [_Blocks(scale, floor) for floor in floors for scale in scales]
    errors = torch.stack([error(groups, counts, one.scaling, level) for one in tried])
    which = errors.argmin(0).view_as(found.scales.multiples)[None]

    def chosen(pairs: list[_Pair]) -> _Pair:
        return pairs[0]._replace(multiples=torch.stack([p.multiples for p in pairs]).gather(0, which)[0])

    floor = None if found.floors is None else chosen([one.floors for one in tried if one.floors is not None])
    return _Blocks(chosen([one.scales for one in tried]), floor)


def _released(groups: torch.Tensor, counts: torch.Tensor | None, found: _Blocks, level: Level) -> _Blocks:
    """The blocks with super-scales by least squares, multiples and levels kept, where that leaves less error."""
    m = found.scales.multiples.double()
    sums = _Sums(*(one.double().view_as(m) for one in _sums(groups, counts, found.scaling, level)))
    mm, xm = (m.square() * sums.qq).sum(2), (m * sums.xq).sum(2)
    floors = found.floors
    if floors is None:
        supers = xm / mm
    else:
        f = floors.multiples.double()
        mf, ff, xf = (m * f * sums.q).sum(2), (f.square() * sums.n).sum(2), (f * sums.x).sum(2)
        apart = mm * ff - mf.square()
        sound = apart > 1e-9 * mm * ff
        supers = torch.where(sound, (xm * ff - xf * mf) / apart, found.scales.supers)
        lifted = torch.where(sound, (mf * xm - mm * xf) / apart, floors.supers)
        floors = floors._replace(supers=_sound(lifted, floors.supers))
    after = _Blocks(found.scales._replace(supers=_sound(supers, found.scales.supers)), floors)
    errors = [error(groups, counts, one.scaling, level).view_as(m).sum(2) for one in (found, after)]
    better = errors[1] < errors[0]
    return _Blocks(_mixed(better, after.scales, found.scales), _mixed(better, after.floors, found.floors))


def _sound(supers: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Super-scales as they can be stored, those before where they are none or of another sign."""
    found = kept(supers.float(), "float16")
    return torch.where(found.isfinite() & (found * before > 0), found, before)


def _mixed(better: torch.Tensor, one: _Pair | None, other: _Pair | None) -> Any:
    if one is None or other is None:
        return None
    return one._replace(supers=torch.where(better, one.supers, other.supers))
