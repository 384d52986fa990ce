"""The algebra of coupled dimensions, against tensors that carry the number of every index with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.analysis.dimensions import Dim, Dimensions


def factors(size: int) -> st.SearchStrategy[list[int]]:
    """Ordered factorizations of a size."""
    if size == 1:
        return st.just([])
    divisors = [d for d in range(2, size + 1) if size % d == 0]
    return st.sampled_from(divisors).flatmap(lambda d: factors(size // d).map(lambda rest: [d, *rest]))


def test_a_new_dimension_is_one_atom_and_one_index_is_none() -> None:
    space = Dimensions()
    assert [space.width(atom) for atom in space.atoms(space.new(6))] == [6]
    assert list(space.atoms(space.new(1))) == []
    assert space.size(space.new(1)) == 1


@given(first=factors(24), second=factors(24))
def test_units_of_two_views_are_the_same_elements(first: list[int], second: list[int]) -> None:
    """Whatever two products a dimension is seen as: each unit takes whole slices of both views, or it is frozen."""
    space = Dimensions()
    flat = space.new(24)
    views = [space.regroup([flat], sizes) for sizes in (first, second)]
    for atom in set(space.atoms(flat)):
        if space.frozen(atom):
            continue
        for unit in range(space.width(atom)):
            gone = np.zeros(24, dtype=bool)
            gone[space.places(flat, atom, unit)] = True
            for sizes, dims in zip((first, second), views, strict=True):
                assert np.array_equal(gone, sliced(space, dims, sizes, atom, unit).ravel())


def sliced(space: Dimensions, dims: list[Dim], sizes: list[int], atom: int, unit: int) -> np.ndarray:
    """Which elements of a tensor go when the indices of a unit are taken out of each of its dimensions."""
    gone = np.zeros(sizes, dtype=bool)
    for axis, dim in enumerate(dims):
        for index in space.places(dim, atom, unit):
            gone[(slice(None),) * axis + (index,)] = True
    return gone


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), again=st.randoms(use_true_random=False))
def test_pieces_keep_their_units_behind_a_concatenation(sizes: list[int], again) -> None:
    space = Dimensions()
    whole = space.new(sum(sizes))
    pieces = space.cut(whole, sizes)
    order = list(range(len(sizes)))
    again.shuffle(order)
    joined = tuple(segment for place in order for segment in pieces[place])
    labels = np.concatenate(
        [np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])[place] for place in order]
    )
    for atom in set(space.atoms(whole)):
        for unit in range(space.width(atom)):
            assert set(labels[space.places(joined, atom, unit)]) == set(space.places(whole, atom, unit))


def test_shared_heads_go_with_their_group() -> None:
    """9 heads of 64 that read 3 groups of keys: a group takes 192 rows of the queries and 64 of the keys."""
    space = Dimensions()
    queries, keys = space.new(576), space.new(192)
    heads, inner = space.regroup([queries], [9, 64])
    groups, size = space.regroup([keys], [3, 64])
    shared, width = space.regroup([groups, space.new(3), size], [9, 64])
    space.unify(heads, shared)
    space.unify(inner, width)
    first = next(space.atoms(keys))
    assert space.width(first) == 3
    assert list(space.places(queries, first, 1)) == list(range(192, 384))
    assert list(space.places(keys, first, 1)) == list(range(64, 128))


def test_what_is_shuffled_between_halves_stays_together() -> None:
    space = Dimensions()
    channels = space.new(8)
    groups, rest = space.regroup([channels], [2, 4])
    (mixed,) = space.regroup([rest, groups], [8])
    first, second = space.cut(mixed, [4, 4])
    labels = np.arange(8).reshape(2, 4).T.ravel()
    for half, dim in ((labels[:4], first), (labels[4:], second)):
        for atom in set(space.atoms(dim)):
            for unit in range(space.width(atom)):
                inside = set(half[space.places(dim, atom, unit)])
                assert inside <= set(space.places(channels, atom, unit))


def test_views_that_do_not_fit_are_frozen_with_the_reason() -> None:
    space = Dimensions()
    flat = space.new(6)
    space.regroup([flat], [2, 3])
    space.regroup([flat], [3, 2])
    assert all("do not fit" in space.frozen(atom) for atom in space.atoms(flat))


def test_a_cut_inside_a_product_is_frozen() -> None:
    space = Dimensions()
    flat = space.new(12)
    space.regroup([flat], [3, 4])
    pieces = space.cut(flat, [6, 6])
    assert [space.size(piece) for piece in pieces] == [6, 6]
    assert all(space.frozen(atom) for piece in pieces for atom in space.atoms(piece))


def test_frozen_parts_and_wholes() -> None:
    """What is frozen stays so when it is joined with others or taken apart."""
    space = Dimensions()
    one, two = space.new(12), space.new(12)
    space.freeze(one, "it is an input")
    space.unify(one, two)
    parts = space.regroup([two], [3, 4])
    assert {space.frozen(atom) for part in parts for atom in space.atoms(part)} == {"it is an input"}


def test_sizes_that_differ_are_refused() -> None:
    space = Dimensions()
    with pytest.raises(ValueError, match="4 and 5"):
        space.unify(space.new(4), space.new(5))


@settings(max_examples=200)
@given(data=st.data())
def test_a_chain_of_views_and_swaps_keeps_whole_slices(data: st.DataObject) -> None:
    """Two dimensions, viewed, swapped and viewed again: what is not frozen takes whole slices of every view."""
    space = Dimensions()
    sizes = [data.draw(st.sampled_from([2, 4, 6, 12])) for _ in range(2)]
    dims = [space.new(size) for size in sizes]
    labels = np.arange(math.prod(sizes)).reshape(sizes)
    seen = [(dims, labels)]
    for _ in range(3):
        if data.draw(st.booleans()):
            shape = data.draw(factors(math.prod(sizes)))
            dims, labels = space.regroup(dims, shape), labels.reshape(shape)
        elif len(dims) > 1:
            dims, labels = [dims[-1], *dims[:-1]], np.moveaxis(labels, -1, 0)
        seen.append((dims, labels))
    free = {atom for dim in seen[0][0] for atom in space.atoms(dim) if not space.frozen(atom)}
    for atom in free:
        for unit in range(space.width(atom)):
            gone = [
                set(numbers[sliced(space, ds, list(numbers.shape), atom, unit)].ravel())
                for ds, numbers in seen
            ]
            assert all(here == gone[0] for here in gone)
