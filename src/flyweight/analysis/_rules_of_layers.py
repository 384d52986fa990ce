"""How operations with weights, norms and attention join the dimensions of what they get."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch.fx import Node

from flyweight.analysis._attributes import marks
from flyweight.analysis._walk import Dims, Rule, Walk, argument
from flyweight.analysis.dimensions import Dim

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _linear(walk: Walk, node: Node) -> Dims:
    x, weight, bias = walk.dims(node.args[0]), walk.dims(node.args[1]), argument(node, 2, "bias")
    walk.unify(x[-1], weight[1])
    _join(walk, weight[:1], bias)
    walk.call(weight[0], "neurons")
    return [*x[:-1], weight[0]]


def _matmul(walk: Walk, node: Node) -> Dims:
    return _product(walk, walk.dims(node.args[0]), walk.dims(node.args[1]))


def _addmm(walk: Walk, node: Node) -> Dims:
    found = _product(walk, walk.dims(node.args[1]), walk.dims(node.args[2]))
    walk.call(found[-1], "neurons")
    return walk.broadcast(walk.dims(node.args[0]), found)


def _product(walk: Walk, one: Dims, two: Dims) -> Dims:
    walk.unify(one[-1], two[-2] if len(two) > 1 else two[0])
    rows, columns = one[-2:-1], two[-1:] if len(two) > 1 else []
    return [*walk.broadcast(one[:-2], two[:-2]), *rows, *columns]


def _convolution(walk: Walk, node: Node) -> Dims:
    x, weight, groups = walk.dims(node.args[0]), walk.dims(node.args[1]), argument(node, 6, "groups", 1)
    axis = len(x) - len(weight) + 1
    if groups == 1:
        walk.unify(x[axis], weight[1])
    else:
        ins = _grouped(walk, node, x[axis], groups)
        outs = walk.space.regroup([weight[0]], [groups, walk.size(weight[0]) // groups])
        walk.unify(ins[0], outs[0])
        walk.unify(ins[1], weight[1])
    return _spread(walk, node, weight, x[:axis], weight[0])


def _transposed(walk: Walk, node: Node) -> Dims:
    """A transposed convolution: weights are (inputs, outputs of a group, ...)."""
    x, weight, groups = walk.dims(node.args[0]), walk.dims(node.args[1]), argument(node, 6, "groups", 1)
    axis = len(x) - len(weight) + 1
    walk.unify(x[axis], weight[0])
    out = weight[1]
    if groups > 1:
        ins = _grouped(walk, node, weight[0], groups)
        out = walk.space.regroup([ins[0], weight[1]], [groups * walk.size(weight[1])])[0]
    return _spread(walk, node, weight, x[:axis], out)


def _grouped(walk: Walk, node: Node, channels: Dim, groups: int) -> list[Dim]:
    """Channels as groups and what is in each; the number of groups may be an attribute."""
    parts = walk.space.regroup([channels], [groups, walk.size(channels) // groups])
    for _, terms in marks(node):
        walk.ruled(terms, parts[0])
    return parts


def _spread(walk: Walk, node: Node, weight: Dims, before: Dims, out: Dim) -> Dims:
    """What a convolution gives: its places come from the input's size, and its kernel keeps its own."""
    _join(walk, [out], argument(node, 2, "bias"))
    walk.call(out, "channels")
    walk.freeze(weight[2:], "it is the extent of a kernel")
    places: Dims = walk.fresh(node)[len(before) + 1 :]
    walk.freeze(places, "it comes from the input's size")
    return [*before, out, *places]


def _recurrent(walk: Walk, node: Node) -> Any:
    """Stacked recurrent layers: gates share their hidden units, and so do the states of all steps."""
    gates = _GATES[node.target.overloadpacket.__name__]  # type: ignore[union-attr]
    x, states, weights, biases, layers = (node.args[place] for place in range(5))
    feature, both = walk.dims(x)[-1], 1 + bool(node.args[7])
    given = [walk.dims(state) for state in (states if isinstance(states, list | tuple) else [states])]
    held = [walk.dims(weight) for weight in weights]  # type: ignore[union-attr]
    width = 2 + 2 * bool(biases)
    if len(held) != width * layers * both:  # type: ignore[operator]
        return None  # with a projection
    for layer in range(layers):  # type: ignore[arg-type]
        outs = [
            _cell(walk, gates, feature, held[start : start + width], given)
            for start in range(layer * both * width, (layer + 1) * both * width, width)
        ]
        feature = tuple(segment for out in outs for segment in out)
    return [[*walk.dims(x)[:-1], feature], *given]


def _cell(walk: Walk, gates: int, feature: Dim, weights: list[Dims], states: list[Dims]) -> Dim:
    """One recurrent layer in one direction: its hidden units."""
    inner, outer, *biases = weights
    walk.unify(feature, inner[1])
    hidden = outer[1]
    for dim in (inner[0], outer[0], *(bias[0] for bias in biases)):
        parts = walk.space.regroup([dim], [gates, walk.size(hidden)])
        walk.freeze(parts[:-1], "it counts gates")
        walk.unify(parts[-1], hidden)
    for state in states:
        walk.unify(state[-1], hidden)
    walk.call(hidden, "recurrent units")
    return hidden


def _embedding(walk: Walk, node: Node) -> Dims:
    weight = walk.dims(node.args[0])
    walk.freeze(weight[:1], "it is what an index looks up")
    return [*walk.dims(node.args[1]), weight[1]]


def _layer_norm(walk: Walk, node: Node) -> Dims:
    x, extent = walk.dims(node.args[0]), len(node.args[1])  # type: ignore[arg-type]
    for place, name in ((2, "weight"), (3, "bias")):
        _join(walk, x[-extent:], argument(node, place, name))
    walk.freeze(x[-extent:], "a norm's statistics run over it")
    return x


def _batch_norm(walk: Walk, node: Node) -> Dims:
    x = walk.dims(node.args[0])
    for given in node.args[1:5]:
        _join(walk, x[1:2], given)
    return x


def _group_norm(walk: Walk, node: Node) -> Dims:
    x, groups = walk.dims(node.args[0]), node.args[1]
    inside = _grouped(walk, node, x[1], groups)[1:]  # type: ignore[arg-type]
    walk.freeze(inside, "a norm's statistics run over it")
    for place, name in ((2, "weight"), (3, "bias")):
        _join(walk, x[1:2], argument(node, place, name))
    return x


def _join(walk: Walk, dims: Dims, given: Any) -> None:
    """Equate dimensions with those of a tensor that may be missing."""
    if isinstance(given, Node):
        for one, two in zip(dims, walk.dims(given), strict=True):
            walk.unify(one, two)


def _softmax(walk: Walk, node: Node) -> Dims:
    x = walk.dims(node.args[0])
    walk.freeze([x[node.args[1]]], "a softmax runs over it")  # type: ignore[index]
    if len(x) == 4:
        walk.call(x[1], "heads")
    return x


def _attention(walk: Walk, node: Node) -> Dims:
    q, k, v = (walk.dims(arg) for arg in node.args[:3])
    if argument(node, 6, "scale") is None:
        walk.freeze(q[-1:], "attention is scaled by its size")
    walk.unify(q[-1], k[-1])
    walk.unify(k[-2], v[-2])
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, Node):
        walk.broadcast(walk.dims(mask), [*q[:-1], k[-2]])
    heads = _heads(walk, q, k, v) if len(q) > 2 else []
    walk.call(q[-1], "channels of a head")
    walk.call(v[-1], "channels of a head")
    return [*walk.broadcast(q[:-3], k[:-3], v[:-3]), *heads, q[-2], v[-1]]


def _heads(walk: Walk, q: Dims, k: Dims, v: Dims) -> Dims:
    """The heads of the queries; several of them may read one head of keys and values."""
    walk.unify(k[-3], v[-3])
    many, few = walk.size(q[-3]), walk.size(k[-3])
    shared = walk.space.regroup([q[-3]], [few, many // few])[0] if 1 < few < many else q[-3]
    walk.call(q[-3], "heads")
    if few > 1:
        walk.unify(shared, k[-3])
    return [q[-3]]


def _baddbmm(walk: Walk, node: Node) -> Dims:
    found = _product(walk, walk.dims(node.args[1]), walk.dims(node.args[2]))
    return walk.broadcast(walk.dims(node.args[0]), found)


def _experts(walk: Walk, node: Node) -> Dims:
    """Rows (S, I) that are sorted by expert, times weights (E, I, O)."""
    rows, weights = walk.dims(node.args[0]), walk.dims(node.args[1])
    walk.unify(rows[1], weights[1])
    walk.freeze([rows[0], weights[0]], "it is what an index looks up")
    walk.call(weights[2], "neurons")
    return [rows[0], weights[2]]


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "linear": _linear,
        **dict.fromkeys(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"), _experts),
        **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
        "addmm": _addmm,
        "baddbmm": _baddbmm,
        **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
        **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
        **dict.fromkeys(_GATES, _recurrent),
        "embedding": _embedding,
        **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
        "batch_norm": _batch_norm,
        "group_norm": _group_norm,
        **dict.fromkeys(("softmax", "log_softmax", "_softmax"), _softmax),
        "scaled_dot_product_attention": _attention,
    }
)
