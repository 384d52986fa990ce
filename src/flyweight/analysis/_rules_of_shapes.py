"""How operations that move, join, cut, pick and sum up carry dimensions on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch.fx import Node

from flyweight.analysis._attributes import marks
from flyweight.analysis._walk import Dims, Rule, Walk, argument, elementwise, sizes


def _same(walk: Walk, node: Node) -> Dims:
    """The first input's dimensions."""
    return walk.dims(node.args[0])


def _made(walk: Walk, node: Node) -> Any:
    """A new tensor of the sizes that the code says."""
    found = walk.fresh(node)
    if isinstance(found, list) and all(isinstance(dim, tuple) for dim in found):
        walk.sized(node, found)
    return found


def _view(walk: Walk, node: Node) -> Dims:
    found = walk.space.regroup(walk.dims(node.args[0]), sizes(node))
    walk.sized(node, found)
    return found


def _unflatten(walk: Walk, node: Node) -> Dims:
    dims = walk.dims(node.args[0])
    found, axis = walk.space.regroup(dims, sizes(node)), argument(node, 1, "dim") % len(dims)
    for place, terms in marks(node):
        if place:  # the first number is the axis
            walk.ruled(terms, found[axis + place - 1])
    return found


def _transpose(walk: Walk, node: Node) -> Dims:
    dims = walk.dims(node.args[0])
    one, two = argument(node, 1, "dim0"), argument(node, 2, "dim1")
    dims[one], dims[two] = dims[two], dims[one]
    return dims


def _turned(walk: Walk, node: Node) -> Dims:
    return walk.dims(node.args[0])[::-1]


def _permute(walk: Walk, node: Node) -> Dims:
    dims = walk.dims(node.args[0])
    return [dims[axis] for axis in node.args[1]]  # type: ignore[union-attr,index]


def _unsqueeze(walk: Walk, node: Node) -> Dims:
    dims, axis = walk.dims(node.args[0]), argument(node, 1, "dim")
    dims.insert(axis if axis >= 0 else axis + len(dims) + 1, walk.space.new(1))
    return dims


def _squeeze(walk: Walk, node: Node) -> Dims:
    dims, given = walk.dims(node.args[0]), argument(node, 1, "dim")
    gone = {axis for axis in _axes(given, len(dims)) if walk.size(dims[axis]) == 1}
    return [dim for axis, dim in enumerate(dims) if axis not in gone]


def _expand(walk: Walk, node: Node) -> Dims:
    dims, wanted = walk.dims(node.args[0]), sizes(node)
    padded = [*[walk.space.new(1)] * (len(wanted) - len(dims)), *dims]
    found = [
        walk.space.new(size) if walk.size(dim) == 1 and size > 1 else dim
        for dim, size in zip(padded, wanted, strict=True)
    ]
    walk.sized(node, found)
    return found


def _repeat(walk: Walk, node: Node) -> Dims:
    dims, times = walk.dims(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    padded = [*[walk.space.new(1)] * (len(times) - len(dims)), *dims]
    return [
        dim * count if walk.size(dim) > 1 else walk.space.new(count)
        for dim, count in zip(padded, times, strict=True)
    ]


def _cat(walk: Walk, node: Node) -> Dims:
    axis = argument(node, 1, "dim", 0)
    parts = [dims for dims in map(walk.dims, node.args[0]) if dims and walk.size(dims[axis])]  # type: ignore[arg-type]
    axis %= len(parts[0])
    joined = tuple(segment for dims in parts for segment in dims[axis])
    columns = enumerate(zip(*parts, strict=True))
    return [joined if place == axis else walk.one(column) for place, column in columns]


def _stack(walk: Walk, node: Node) -> Dims:
    axis, parts = argument(node, 1, "dim", 0), list(node.args[0])  # type: ignore[arg-type]
    found = walk.broadcast(*map(walk.dims, parts))
    made = walk.space.new(len(parts))
    walk.freeze([made], "it counts tensors that are stacked")
    found.insert(axis if axis >= 0 else axis + len(found) + 1, made)
    return found


def _split(walk: Walk, node: Node) -> list[Dims]:
    """Pieces; those that one number cuts off have one size for ever."""
    dims, axis = walk.dims(node.args[0]), argument(node, 2, "dim", 0)
    pieces = walk.space.cut(dims[axis], [int(value.shape[axis]) for value in node.meta["val"]])
    if isinstance(node.args[1], int):
        same = [piece for piece in pieces if walk.size(piece) == walk.size(pieces[0])]
        walk.sized(node, [walk.one(same)])
    else:
        walk.sized(node, pieces)
    found = [list(dims) for _ in pieces]
    for one, piece in zip(found, pieces, strict=True):
        one[axis] = piece
    return found


def _slice(walk: Walk, node: Node) -> Dims | None:
    dims, axis = walk.dims(node.args[0]), argument(node, 1, "dim", 0)
    bounds = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
    size = walk.size(dims[axis])
    if not all(isinstance(bound, int) or bound is None for bound in bounds):
        return None
    low, high, step = slice(*bounds).indices(size)
    if step != 1:
        reason = "every so many of it are taken"
        walk.freeze([dims[axis]], reason)
        dims[axis] = walk.fresh(node)[axis]
        walk.freeze([dims[axis]], reason)
        return dims
    if high <= low:
        dims[axis] = walk.space.new(0)
        return dims
    for _, terms in marks(node):  # a bound that attributes tell
        bound = sum(math.prod(number for _, number in factors) for factors in terms)
        if bound in (low, high):
            walk.ruled(terms, walk.space.cut(dims[axis], [bound, size - bound])[0])
    parts = [count for count in (low, high - low, size - high) if count]
    dims[axis] = walk.space.cut(dims[axis], parts)[1 if low else 0]
    return dims


def _select(walk: Walk, node: Node) -> Dims:
    dims, axis = walk.dims(node.args[0]), argument(node, 1, "dim")
    walk.freeze([dims[axis]], "one of it is taken by its number")
    del dims[axis]
    return dims


def _unbind(walk: Walk, node: Node) -> list[Dims]:
    dims, axis = walk.dims(node.args[0]), argument(node, 1, "dim", 0)
    walk.freeze([dims[axis]], "each of it is taken by its number")
    del dims[axis]
    return [list(dims) for _ in node.meta["val"]]


def _index(walk: Walk, node: Node) -> Dims:
    """Rows looked up in the leading dimensions by tensors of numbers."""
    dims, numbers = walk.dims(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    if None in numbers:
        found: Dims = walk.fresh(node)
        walk.freeze([*found, *dims], "an index picks some of it")
        return found
    walk.freeze(dims[: len(numbers)], "it is what an index looks up")
    return [*walk.broadcast(*map(walk.dims, numbers)), *dims[len(numbers) :]]


def _sum(walk: Walk, node: Node) -> Any:
    """Sums and norms over some dimensions: what is zero adds nothing."""
    return _reduced(walk, node, "")


def _mean(walk: Walk, node: Node) -> Any:
    """Means, extremes and the like, in which zeros count."""
    return _reduced(walk, node, "a mean or an extreme of it is taken")


def _reduced(walk: Walk, node: Node, reason: str) -> Any:
    dims, value = walk.dims(node.args[0]), node.meta["val"]
    place = 2 if "norm" in str(node.target) else 1
    given = argument(node, place, "dim")
    if isinstance(given, Node):  # the smaller of two tensors
        return elementwise(walk, node)
    gone = _axes(given, len(dims))
    if reason:
        walk.freeze([dims[axis] for axis in gone], reason)
    several = isinstance(value, tuple | list)
    if len((value[0] if several else value).shape) == len(dims):
        found = [walk.space.new(1) if axis in gone else dim for axis, dim in enumerate(dims)]
    else:
        found = [dim for axis, dim in enumerate(dims) if axis not in gone]
    return [found] * len(value) if several else found


def _axes(given: Any, rank: int) -> set[int]:
    """Which dimensions an argument names; all where it names none."""
    axes = range(rank) if given is None or given == [] else [given] if isinstance(given, int) else given
    return {axis % rank for axis in axes} if rank else set()


def _pool(walk: Walk, node: Node) -> Any:
    """Spatial dimensions come from the input's size, those before them stay."""
    dims, fresh = walk.dims(node.args[0]), walk.fresh(node)
    several = bool(fresh) and isinstance(fresh[0], list)
    spatial = next((n for n in (1, 2, 3) if f"{n}d" in str(node.target)), 2)
    places = (fresh[0] if several else fresh)[len(dims) - spatial :]
    walk.freeze(places, "it comes from the input's size")
    kept = [*dims[: len(dims) - spatial], *places]
    return [kept] * len(fresh) if several else kept


def _pad(walk: Walk, node: Node) -> Dims:
    dims, fresh = walk.dims(node.args[0]), walk.fresh(node)
    for axis in range(len(dims) - len(node.args[1]) // 2, len(dims)):  # type: ignore[arg-type]
        if walk.size(dims[axis]) != walk.size(fresh[axis]):
            walk.freeze([dims[axis], fresh[axis]], "it is padded")
            dims[axis] = fresh[axis]
    return dims


def _gather(walk: Walk, node: Node) -> Dims:
    """Entries picked along one dimension, by numbers that stand where the others are."""
    dims, numbers, axis = walk.dims(node.args[0]), walk.dims(node.args[2]), argument(node, 1, "dim")
    walk.freeze([dims[axis], numbers[axis]], "it is what an index looks up")
    dims[axis] = numbers[axis]
    return [walk.one(pair) for pair in zip(dims, numbers, strict=True)]


def _ordered(walk: Walk, node: Node) -> Dims:
    """The order of the places counts along every dimension."""
    dims = walk.dims(node.args[0])
    walk.freeze(dims, "the order of its places counts")
    return dims


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(
            ("where", "__and__", "__or__", "masked_fill", "masked_fill_", "gelu", "silu", "mish", "hardswish",
             "copy_"),
            elementwise,
        ),
        **dict.fromkeys(
            ("dropout", "dropout_", "feature_dropout", "alpha_dropout", "contiguous", "clone", "to", "detach",
             "detach_", "alias", "lift_fresh_copy", "_to_copy", "type_as", "relu_", "zeros_like", "ones_like",
             "full_like", "empty_like"),
            _same,
        ),
        **dict.fromkeys(("cumsum", "roll", "flip", "triu", "tril"), _ordered),
        **dict.fromkeys(
            ("new_ones", "new_zeros", "new_full", "new_empty", "arange", "zeros", "ones", "full", "empty", "scalar_tensor",
             "_assert_tensor_metadata", "sym_size", "_assert_scalar"),
            _made,
        ),
        **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten"), _view),
        "unflatten": _unflatten,
        **dict.fromkeys(("transpose", "swapaxes"), _transpose),
        "t": _turned,
        "permute": _permute,
        "unsqueeze": _unsqueeze,
        "squeeze": _squeeze,
        **dict.fromkeys(("expand", "expand_as"), _expand),
        "repeat": _repeat,
        **dict.fromkeys(("cat", "concat"), _cat),
        "stack": _stack,
        **dict.fromkeys(("split", "chunk", "split_with_sizes", "tensor_split"), _split),
        "slice": _slice,
        "select": _select,
        "unbind": _unbind,
        "index": _index,
        "gather": _gather,
        **dict.fromkeys(("sum", "norm", "linalg_vector_norm"), _sum),
        **dict.fromkeys(
            ("mean", "amax", "amin", "var", "std", "all", "any", "max", "min", "logsumexp"), _mean
        ),
        **dict.fromkeys(
            (f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)),
            _pool,
        ),
        **dict.fromkeys(
            (f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "linear1d", "bilinear2d", "bicubic2d")),
            _pool,
        ),
        **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    }
)  # fmt: skip
