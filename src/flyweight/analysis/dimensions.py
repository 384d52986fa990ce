"""The algebra of coupled dimensions: what belongs together when an index is taken out of a tensor.

A dimension is a row of segments, one behind the other, and a segment is a product of atoms, the first the slowest:
channels behind a concatenation are two segments, 9 heads of 64 are one segment of two atoms, a list of neurons is one atom.
Atoms that an operation equates become one; an atom that is viewed as a product, or cut in pieces, is refined into what it
is seen to be made of. What cannot be told this way is frozen with the reason: it keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

Segment: TypeAlias = tuple[int, ...]
"""Atoms; none: an index alone."""
Dim: TypeAlias = tuple[Segment, ...]
Indices: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]
Span: TypeAlias = tuple[int, int, int, int]
"""Offset, outer, stride, inner: index u of an atom stands at offset + o * stride + u * inner + i, o < outer, i < inner."""


class Dimensions:
    """All atoms of a model, with what was learned of them; atoms are integers."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._parents: list[int] = []
        self._made_of: dict[int, Dim] = {}
        self._frozen: dict[int, str] = {}

    def new(self, size: int) -> Dim:
        """A dimension of so many indices of which nothing is known yet."""
        return ((() if size == 1 else (self._atom(size),)),)

    def size(self, dim: Dim) -> int:
        """Its number of indices."""
        return sum(self._width(segment) for segment in dim)

    def freeze(self, dim: Dim, reason: str) -> None:
        """Say that a dimension must keep its size; the first reason stays."""
        for atom in {atom for segment in dim for atom in segment}:
            self._freeze(self._root(atom), reason)

    def frozen(self, atom: int) -> str:
        """Why an atom must keep its size; empty where it need not."""
        return self._frozen.get(self._root(atom), "")

    def atoms(self, dim: Dim) -> Iterator[int]:
        """The atoms that a dimension is made of in the end, in order, each as often as it stands there."""
        for segment in dim:
            for atom in map(self._root, segment):
                if atom in self._made_of:
                    yield from self.atoms(self._made_of[atom])
                else:
                    yield atom

    def width(self, atom: int) -> int:
        """The number of an atom's indices."""
        return self._sizes[self._root(atom)]

    def spans(self, dim: Dim, atom: int) -> tuple[Span, ...]:
        """Where the indices of an atom stand in a dimension."""
        return tuple(self._spans(dim, self._root(atom)))

    def places(self, dim: Dim, atom: int, index: int) -> Indices:
        """The indices of a dimension that belong to one index of an atom: (K,) ascending."""
        found = [
            (offset + index * inner + np.arange(outer)[:, None] * stride + np.arange(inner)).ravel()
            for offset, outer, stride, inner in self.spans(dim, atom)
        ]
        return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *found]))

    def unify(self, one: Dim, two: Dim) -> None:
        """Equate two dimensions of one size, index by index."""
        if self.size(one) != self.size(two):
            raise ValueError(f"dimensions of {self.size(one)} and {self.size(two)} indices are not one")
        left, right = list(self._opened(one)), list(self._opened(two))
        while left and right and self.size(one):
            first, second = left.pop(0), right.pop(0)
            least = min(self._width(first), self._width(second))
            pair = [self._cut(segment, least) for segment in (first, second)]
            if pair[0] is None or pair[1] is None:
                reason = "it is taken apart in two ways that do not fit each other"
                self.freeze((first, *left), reason)
                self.freeze((second, *right), reason)
                return
            self._same(pair[0][0], pair[1][0])
            left[:0], right[:0] = pair[0][1:], pair[1][1:]

    def cut(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        """A dimension in consecutive pieces of the given sizes; what cannot be cut there is frozen and replaced."""
        left, pieces = list(self._opened(dim)), []
        for size in sizes:
            piece: list[Segment] = []
            while sum(map(self._width, piece)) < size:
                segment = left.pop(0)
                missing = size - sum(map(self._width, piece))
                parts = self._cut(segment, min(missing, self._width(segment)))
                if parts is None:
                    return self._replaced(dim, sizes)
                piece.append(parts[0])
                left[:0] = parts[1:]
            pieces.append(tuple(piece))
        return pieces

    def regroup(self, dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
        """Dimensions as a view of other sizes shows them, the last the fastest."""
        given, found = list(dims), []
        wanted = list(sizes)
        while wanted:
            some, these = [wanted.pop(0)], [given.pop(0)] if given else []
            while (here := math.prod(map(self.size, these))) != math.prod(some) or (given and not wanted):
                if here < math.prod(some) or (not wanted and given):
                    these.append(given.pop(0))
                else:
                    some.append(wanted.pop(0))
            found += self._viewed(these, some)
        return found

    def factors(self, dim: Dim) -> list[Dim]:
        """A dimension as the product that it is seen as, the last the fastest: itself where it is none."""
        opened = tuple(self._opened(dim))
        return [((atom,),) for atom in self._spread(opened[0])] if len(opened) == 1 else [dim]

    def _viewed(self, dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
        """Some dimensions whose product is that of the sizes, as those sizes."""
        large = [dim for dim in dims if self.size(dim) > 1]
        if [self.size(dim) for dim in large] == [size for size in sizes if size > 1]:
            rest = iter(large)
            return [next(rest) if size > 1 else self.new(1) for size in sizes]
        merged = self._product(large)
        found = [self.new(size) for size in sizes]
        self.unify(merged, self._product([dim for dim in found if self.size(dim) > 1]))
        return found

    def _product(self, dims: Sequence[Dim]) -> Dim:
        """The dimension whose indices run through all of some dimensions', the last the fastest."""
        if not dims:
            return ((),)
        first, *others = dims
        tail = tuple(atom for dim in others for atom in self._whole(dim))
        return tuple((*segment, *tail) for segment in first)

    def _whole(self, dim: Dim) -> Segment:
        """A dimension as one product: one of several segments gets an atom that stands for it."""
        if len(dim) == 1:
            return dim[0]
        atom = self._atom(self.size(dim))
        self._made_of[atom] = dim
        return (atom,)

    def _replaced(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        reason = "it is cut in pieces that its parts do not fit"
        self.freeze(dim, reason)
        pieces = [self.new(size) for size in sizes]
        for piece in pieces:
            self.freeze(piece, reason)
        return pieces

    def _opened(self, dim: Dim) -> Iterator[Segment]:
        """The segments with their first atoms replaced by what those are made of."""
        for segment in dim:
            atom = self._root(segment[0]) if segment else -1
            if atom in self._made_of:
                yield from self._opened(tuple((*part, *segment[1:]) for part in self._made_of[atom]))
            else:
                yield segment

    def _cut(self, segment: Segment, size: int) -> tuple[Segment, ...] | None:
        """A segment in two, the first of so many indices; whole if it has as many; None where it cannot be cut there."""
        if size == self._width(segment):
            return (segment,)
        inner = self._width(segment[1:])
        if size % inner:
            return None
        first = self._root(segment[0])
        parts = [self._atom(size // inner), self._atom(self._sizes[first] - size // inner)]
        self._refine(first, tuple((part,) for part in parts))
        return tuple((part, *segment[1:]) for part in parts)

    def _same(self, one: Segment, two: Segment) -> None:
        """Equate two products of one size, atom by atom."""
        left, right = [list(self._spread(segment)) for segment in (one, two)]
        while left and right:
            first, second = left.pop(0), right.pop(0)
            sizes = self._sizes[first], self._sizes[second]
            if sizes[0] == sizes[1]:
                self._join(first, second)
                continue
            small, large = sorted(sizes)
            if large % small:
                reason = "it is viewed as products that do not fit each other"
                self.freeze(((first, *left), (second, *right)), reason)
                return
            big, others = (first, left) if sizes[0] == large else (second, right)
            parts = (self._atom(small), self._atom(large // small))
            self._refine(big, (parts,))
            self._join(second if big == first else first, parts[0])
            others.insert(0, parts[1])

    def _spread(self, segment: Segment) -> Iterator[int]:
        """The atoms of a product, those that are products themselves by their own; one of one index is no factor."""
        for atom in map(self._root, segment):
            made = self._made_of.get(atom, ())
            if len(made) == 1:
                yield from self._spread(made[0])
            elif self._sizes[atom] != 1:
                yield atom

    def _join(self, one: int, two: int) -> None:
        """Equate two atoms."""
        one, two = self._root(one), self._root(two)
        if one == two:
            return
        made = [self._made_of.pop(atom, None) for atom in (one, two)]
        reason = self._frozen.pop(two, "") or self._frozen.get(one, "")
        self._parents[two] = one
        kept = made[0] or made[1]
        if kept:
            self._made_of[one] = kept
        if reason:
            self._freeze(one, reason)
        if made[0] and made[1]:
            self.unify(made[0], made[1])

    def _refine(self, atom: int, dim: Dim) -> None:
        """Say what an atom is made of."""
        atom = self._root(atom)
        if atom in self._made_of:
            self.unify(self._made_of[atom], dim)
        else:
            self._made_of[atom] = dim
        if atom in self._frozen:
            self.freeze(dim, self._frozen[atom])

    def _freeze(self, atom: int, reason: str) -> None:
        self._frozen.setdefault(atom, reason)
        if atom in self._made_of:
            self.freeze(self._made_of[atom], reason)

    def _spans(self, dim: Dim, atom: int) -> Iterator[Span]:
        start = 0
        for segment in dim:
            before, inner = 1, self._width(segment)
            for one in map(self._root, segment):
                size = self._sizes[one]
                inner //= size
                if one == atom:
                    yield start, before, size * inner, inner
                elif one in self._made_of:
                    for offset, outer, stride, within in list(self._spans(self._made_of[one], atom)):
                        for time in range(before):
                            first = start + time * size * inner + offset * inner
                            yield first, outer, stride * inner, within * inner
                before *= size
            start += self._width(segment)

    def _width(self, segment: Iterable[int]) -> int:
        return math.prod(self._sizes[self._root(atom)] for atom in segment)

    def _atom(self, size: int) -> int:
        self._sizes.append(size)
        self._parents.append(len(self._parents))
        return self._parents[-1]

    def _root(self, atom: int) -> int:
        while self._parents[atom] != atom:
            self._parents[atom] = self._parents[self._parents[atom]]
            atom = self._parents[atom]
        return atom
