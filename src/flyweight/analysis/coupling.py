"""Follows every dimension of every tensor through a model's operations, and tells which indices must go together.

The model is traced by torch.export with made-up values: operations say which dimensions are one, which are joined, cut, or seen
as products. What comes in and what goes out keeps its size; so does what an operation without a rule touches. What is left
free is a `Group`: its unit k is all the indices, in all parameters, that go when index k goes.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from flyweight.analysis.dimensions import Dim, Dimensions, Indices
from flyweight.errors import first_line
from flyweight.records import Batch

Dims = list[Dim]


@dataclass(frozen=True)
class Place:
    """A dimension of a parameter or buffer."""

    name: str
    axis: int


@dataclass(frozen=True, eq=False)
class Group:
    """Indices that can be taken out of a model, each with all that belongs to it."""

    atom: int
    units: int
    places: tuple[Place, ...]
    """Where it stands in parameters and buffers."""
    views: tuple[str, ...]
    """Paths of the modules whose code writes its size into a view."""


@dataclass(eq=False)
class Coupling:
    """What a trace told."""

    dimensions: Dimensions = field(default_factory=Dimensions)
    tensors: dict[str, Dims] = field(default_factory=dict)
    """Of each parameter and buffer."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Operations without a rule, and where the first stands."""
    sized: dict[int, set[str]] = field(default_factory=dict)
    reason: str = ""
    """Why there is no graph."""

    def groups(self) -> Iterator[Group]:
        """The free groups, in the order of the parameters."""
        found: dict[int, list[Place]] = {}
        for name, dims in self.tensors.items():
            for axis, dim in enumerate(dims):
                for atom in dict.fromkeys(self.dimensions.atoms(dim)):
                    found.setdefault(atom, []).append(Place(name, axis))
        for atom, places in found.items():
            if not self.dimensions.frozen(atom) and self.dimensions.width(atom) > 1:
                yield Group(atom, self.dimensions.width(atom), tuple(places), ())

    def indices(self, place: Place, group: Group, unit: int) -> Indices:
        """The indices of a parameter's dimension that go with a unit."""
        return self.dimensions.places(self.tensors[place.name][place.axis], group.atom, unit)


def couple(model: nn.Module, batch: Batch) -> Coupling:
    """Trace a model in eval mode on one batch; a model that cannot be traced gives a coupling with the reason alone."""
    args, kwargs = (
        ((), batch)
        if isinstance(batch, dict)
        else ((batch,) if isinstance(batch, torch.Tensor) else tuple(batch), {})
    )
    found = Coupling()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:  # the tracer raises whatever the user's own forward provokes
        found.reason = f"the model cannot be traced: {first_line(error)}"
        return found
    _Walk(found, program).run()
    return found


class _Walk:
    """One pass over a graph: the dimensions of each node's tensors."""

    def __init__(self, found: Coupling, program: torch.export.ExportedProgram) -> None:
        self.found, self.program, self.d = found, program, found.dimensions
        self.known: dict[Node, Any] = {}

    def run(self) -> None:
        signature = self.program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        aliases: dict[int, str] = {}
        state = {**self.program.state_dict, **self.program.constants}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                dims = self._fresh(node)
                name = names.get(node.name)
                if name is None:
                    self._freeze(dims, "it is an input or a constant of the model")
                else:
                    tensor = state[name]
                    first = aliases.setdefault(
                        (tensor.data_ptr(), tensor.shape) if tensor.numel() else id(tensor), name
                    )
                    if first != name:
                        dims = self.found.tensors[first]
                    self.found.tensors[name] = dims
                self.known[node] = dims
            elif node.op == "call_function":
                self.known[node] = self._called(node)
            elif node.op == "output":
                for used in node.all_input_nodes:
                    self._freeze_node(used, "it is an output of the model")

    def _called(self, node: Node) -> Any:
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", str(node.target))
        value = node.meta.get("val")
        if node.target is operator.getitem:
            return self.known[node.args[0]][node.args[1]]
        rule = RULES.get(name)
        if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            rule = _pointwise
        if rule is not None:
            found = rule(self, node)
            if found is not None:
                self._check(node, found, value)
                return found
        if node.all_input_nodes and value is not None:
            self.found.unknown.setdefault(name, _where(node))
        for used in node.all_input_nodes:
            self._freeze_node(used, f"{name} has no rule")
        found = self._fresh(node)
        self._freeze(found, f"{name} has no rule")
        return found

    def _check(self, node: Node, found: Any, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sizes = [self.d.size(dim) for dim in found]
            if sizes != list(value.shape):
                raise AssertionError(f"{node.target}: {sizes} for {list(value.shape)}")

    def dims(self, node: Any) -> Dims:
        """The dimensions of a tensor; none of a number."""
        found = self.known.get(node, []) if isinstance(node, Node) else []
        return found if isinstance(found, list) else []

    def one(self, dims: Sequence[Dim]) -> Dim:
        """Dimensions that are added up or compared, those of one index aside, as one."""
        large = [dim for dim in dims if self.d.size(dim) > 1]
        for other in large[1:]:
            self.d.unify(large[0], other)
        return large[0] if large else self.d.new(1)

    def broadcast(self, *tensors: Dims) -> Dims:
        """The dimensions of an element-wise result."""
        rank = max(map(len, tensors), default=0)
        rows = [[*[self.d.new(1)] * (rank - len(dims)), *dims] for dims in tensors if dims]
        return [self.one(column) for column in zip(*rows, strict=True)]

    def _fresh(self, node: Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            return [
                [self.d.new(size) for size in v.shape] if isinstance(v, torch.Tensor) else [] for v in value
            ]
        return [self.d.new(int(size)) for size in value.shape] if isinstance(value, torch.Tensor) else []

    def _freeze(self, dims: Any, reason: str) -> None:
        for dim in dims:
            if isinstance(dim, list):
                self._freeze(dim, reason)
            else:
                self.d.freeze(dim, reason)

    def _freeze_node(self, node: Node, reason: str) -> None:
        self._freeze(self.known.get(node, []), reason)


Rule = Callable[[_Walk, Node], Any]


def _arg(node: Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _pointwise(walk: _Walk, node: Node) -> Dims:
    """Element by element, with broadcasting."""
    return walk.broadcast(*(walk.dims(used) for used in _tensors(node)))


def _tensors(node: Node) -> Iterator[Node]:
    for arg in (*node.args, *node.kwargs.values()):
        for one in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(one, Node):
                yield one


def _same(walk: _Walk, node: Node) -> Dims:
    """The first input's dimensions."""
    return list(walk.dims(node.args[0]))


def _nothing(walk: _Walk, node: Node) -> Any:
    return walk._fresh(node)


def _linear(walk: _Walk, node: Node) -> Dims:
    x, weight = walk.dims(node.args[0]), walk.dims(node.args[1])
    bias = _arg(node, 2, "bias")
    walk.d.unify(x[-1], weight[1])
    if bias is not None:
        walk.d.unify(weight[0], walk.dims(bias)[0])
    return [*x[:-1], weight[0]]


def _matmul(walk: _Walk, node: Node) -> Dims:
    return _product(walk, walk.dims(node.args[0]), walk.dims(node.args[1]))


def _product(walk: _Walk, one: Dims, two: Dims) -> Dims:
    walk.d.unify(one[-1], two[-2] if len(two) > 1 else two[0])
    rows, columns = one[-2:-1], two[-1:] if len(two) > 1 else []
    return [*walk.broadcast(one[:-2], two[:-2]), *rows, *columns]


def _addmm(walk: _Walk, node: Node) -> Dims:
    found = _product(walk, walk.dims(node.args[1]), walk.dims(node.args[2]))
    return walk.broadcast(walk.dims(node.args[0]), found)


def _convolution(walk: _Walk, node: Node) -> Dims | None:
    x, weight, bias = walk.dims(node.args[0]), walk.dims(node.args[1]), _arg(node, 2, "bias")
    groups = (
        next((a for a in reversed(node.args) if isinstance(a, int)), 1)
        if len(node.args) > 6
        else node.kwargs.get("groups", 1)
    )
    axis = len(x) - (len(weight) - 2) - 1
    given, out = x[axis], weight[0]
    if groups == 1:
        walk.d.unify(given, weight[1])
    else:
        size, made = walk.d.size(given), walk.d.size(out)
        ins = walk.d.regroup([given], [groups, size // groups])
        outs = walk.d.regroup([out], [groups, made // groups])
        walk.d.unify(ins[0], outs[0])
        walk.d.unify(ins[1], weight[1])
    if bias is not None:
        walk.d.unify(out, walk.dims(bias)[0])
    return _spread(walk, node, weight, x[:axis], out)


def _spread(walk: _Walk, node: Node, weight: Dims, before: Dims, out: Dim) -> Dims:
    """What a convolution gives: its places come from the input's size, and its kernel keeps its own."""
    walk._freeze(weight[2:], "it is the extent of a kernel")
    places = walk._fresh(node)[len(before) + 1 :]
    walk._freeze(places, "it comes from the input's size")
    return [*before, out, *places]


def _transposed(walk: _Walk, node: Node) -> Dims:
    """A transposed convolution: weights are (inputs, outputs of a group, ...)."""
    x, weight, bias, groups = (
        walk.dims(node.args[0]),
        walk.dims(node.args[1]),
        _arg(node, 2, "bias"),
        _arg(node, 6, "groups", 1),
    )
    axis = len(x) - (len(weight) - 2) - 1
    walk.d.unify(x[axis], weight[0])
    out = weight[1]
    if groups > 1:
        ins = walk.d.regroup([weight[0]], [groups, walk.d.size(weight[0]) // groups])
        out = walk.d.regroup([ins[0], weight[1]], [groups * walk.d.size(weight[1])])[0]
    if bias is not None:
        walk.d.unify(out, walk.dims(bias)[0])
    return _spread(walk, node, weight, x[:axis], out)


GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _recurrent(walk: _Walk, node: Node) -> Any:
    """Stacked recurrent layers: gates share their hidden units, and so do the states of all steps."""
    name = node.target.overloadpacket.__name__
    x, states, weights = walk.dims(node.args[0]), node.args[1], list(map(walk.dims, node.args[2]))
    biases, layers, both = node.args[3], node.args[4], bool(node.args[7])
    given = [walk.dims(state) for state in (states if isinstance(states, (list, tuple)) else [states])]
    width = len(weights) // (layers * (1 + both))
    if width != 2 + 2 * biases:
        return None  # with a projection
    feature, last = x[-1], [x[-1]]
    for layer in range(layers):
        outs = []
        for way in range(1 + both):
            start = (layer * (1 + both) + way) * width
            inner, outer, *rest = weights[start : start + width]
            walk.d.unify(feature, inner[1])
            hidden = outer[1]
            for dim in (inner[0], outer[0], *(bias[0] for bias in rest)):
                parts = walk.d.regroup([dim], [GATES[name], walk.d.size(hidden)])
                if GATES[name] > 1:
                    walk.d.freeze(parts[0], "it counts gates")
                walk.d.unify(parts[-1], hidden)
            for state in given:
                walk.d.unify(state[-1], hidden)
            outs.append(hidden)
        feature = tuple(segment for out in outs for segment in out)
    return [[*x[:-1], feature], *given]


def _embedding(walk: _Walk, node: Node) -> Dims:
    weight = walk.dims(node.args[0])
    walk.d.freeze(weight[0], "it is what an index looks up")
    return [*walk.dims(node.args[1]), weight[1]]


def _layer_norm(walk: _Walk, node: Node) -> Dims:
    x = walk.dims(node.args[0])
    for arg in (_arg(node, 2, "weight"), _arg(node, 3, "bias")):
        if isinstance(arg, Node):
            dims = walk.dims(arg)
            for one, two in zip(x[-len(dims) :], dims, strict=True):
                walk.d.unify(one, two)
    return list(x)


def _batch_norm(walk: _Walk, node: Node) -> Dims:
    x = walk.dims(node.args[0])
    for arg in node.args[1:5]:
        if isinstance(arg, Node):
            walk.d.unify(x[1], walk.dims(arg)[0])
    return list(x)


def _group_norm(walk: _Walk, node: Node) -> Dims:
    x, groups = walk.dims(node.args[0]), node.args[1]
    walk.d.regroup([x[1]], [groups, walk.d.size(x[1]) // groups])
    for arg in (_arg(node, 2, "weight"), _arg(node, 3, "bias")):
        if isinstance(arg, Node):
            walk.d.unify(x[1], walk.dims(arg)[0])
    return list(x)


def _softmax(walk: _Walk, node: Node) -> Dims:
    x = walk.dims(node.args[0])
    walk.d.freeze(x[node.args[1]], "a softmax runs over it")
    return list(x)


def _attention(walk: _Walk, node: Node) -> Dims:
    q, k, v = (walk.dims(arg) for arg in node.args[:3])
    if _arg(node, 6, "scale") is None:
        walk.d.freeze(q[-1], "attention is scaled by its size")
    walk.d.unify(q[-1], k[-1])
    walk.d.unify(k[-2], v[-2])
    mask = _arg(node, 3, "attn_mask")
    if isinstance(mask, Node):
        walk.broadcast(walk.dims(mask), [*q[:-1], k[-2]])
    if node.kwargs.get("enable_gqa") and walk.d.size(q[-3]) != walk.d.size(k[-3]):
        walk.d.unify(k[-3], v[-3])
        heads = walk.d.size(k[-3])
        walk.d.unify(walk.d.regroup([q[-3]], [heads, walk.d.size(q[-3]) // heads])[0], k[-3])
        batch = walk.broadcast(q[:-3], k[:-3], v[:-3])
    else:
        batch = walk.broadcast(q[:-2], k[:-2], v[:-2])
        return [*batch, q[-2], v[-1]]
    return [*batch, q[-3], q[-2], v[-1]]


def _sizes(node: Node) -> list[int]:
    return [int(size) for size in node.meta["val"].shape]


def _view(walk: _Walk, node: Node) -> Dims:
    return walk.d.regroup(walk.dims(node.args[0]), _sizes(node))


def _transpose(walk: _Walk, node: Node) -> Dims:
    dims = list(walk.dims(node.args[0]))
    one, two = _arg(node, 1, "dim0"), _arg(node, 2, "dim1")
    dims[one], dims[two] = dims[two], dims[one]
    return dims


def _t(walk: _Walk, node: Node) -> Dims:
    return list(reversed(walk.dims(node.args[0])))


def _permute(walk: _Walk, node: Node) -> Dims:
    dims = walk.dims(node.args[0])
    return [dims[axis] for axis in node.args[1]]


def _unsqueeze(walk: _Walk, node: Node) -> Dims:
    dims, axis = list(walk.dims(node.args[0])), node.args[1]
    dims.insert(axis if axis >= 0 else axis + len(dims) + 1, walk.d.new(1))
    return dims


def _squeeze(walk: _Walk, node: Node) -> Dims:
    """Dimensions of one index left out, as the result's sizes tell."""
    dims, given = walk.dims(node.args[0]), _arg(node, 1, "dim")
    axes = range(len(dims)) if given is None else [given] if isinstance(given, int) else given
    gone = {axis % len(dims) for axis in axes if walk.d.size(dims[axis]) == 1} if dims else set()
    return [dim for axis, dim in enumerate(dims) if axis not in gone]


def _expand(walk: _Walk, node: Node) -> Dims:
    dims, sizes = walk.dims(node.args[0]), _sizes(node)
    padded = [*[walk.d.new(1)] * (len(sizes) - len(dims)), *dims]
    found = []
    for dim, size in zip(padded, sizes, strict=True):
        if walk.d.size(dim) == 1 and size > 1:
            dim = walk.d.new(size)
        found.append(dim)
    return found


def _cat(walk: _Walk, node: Node) -> Dims:
    axis = _arg(node, 1, "dim", 0)
    parts = [dims for dims in map(walk.dims, node.args[0]) if dims and walk.d.size(dims[axis])]
    axis %= len(parts[0])
    joined = tuple(segment for dims in parts for segment in dims[axis])
    columns = enumerate(zip(*parts, strict=True))
    return [joined if place == axis else walk.one(column) for place, column in columns]


def _stack(walk: _Walk, node: Node) -> Dims:
    axis = _arg(node, 1, "dim", 0)
    found = walk.broadcast(*(walk.dims(one) for one in node.args[0]))
    made = walk.d.new(len(node.args[0]))
    walk.d.freeze(made, "it counts tensors that are stacked")
    found.insert(axis if axis >= 0 else axis + len(found) + 1, made)
    return found


def _split(walk: _Walk, node: Node) -> list[Dims]:
    dims, axis = walk.dims(node.args[0]), _arg(node, 2, "dim", 0)
    sizes = [int(value.shape[axis]) for value in node.meta["val"]]
    pieces = walk.d.cut(dims[axis], sizes)
    return [[*dims[: axis % len(dims)], piece, *dims[axis % len(dims) + 1 :]] for piece in pieces]


def _slice(walk: _Walk, node: Node) -> Dims | None:
    dims, axis, start, end, step = list(walk.dims(node.args[0])), *(
        _arg(node, i, n, d) for i, n, d in ((1, "dim", 0), (2, "start", 0), (3, "end", None), (4, "step", 1))
    )  # fmt: skip
    size = walk.d.size(dims[axis])
    if not all(isinstance(x, int) or x is None for x in (start, end, step)):
        return None
    low, high, step = slice(start, end, step).indices(size)
    if step != 1:
        walk.d.freeze(dims[axis], "every so many of it are taken")
        dims[axis] = walk._fresh(node)[axis]
        walk.d.freeze(dims[axis], "every so many of it are taken")
        return dims
    sizes = [n for n in (low, high - low, size - high) if n]
    dims[axis] = walk.d.cut(dims[axis], sizes)[1 if low else 0]
    return dims


def _select(walk: _Walk, node: Node) -> Dims:
    dims, axis = list(walk.dims(node.args[0])), node.args[1]
    walk.d.freeze(dims[axis], "one of it is taken by its number")
    del dims[axis]
    return dims


def _reduce(walk: _Walk, node: Node) -> Any:
    """Sums, means and the like over some dimensions."""
    dims = walk.dims(node.args[0])
    given = _arg(node, 1, "dim")
    if isinstance(given, Node):  # the smaller of two tensors
        return _pointwise(walk, node)
    axes = range(len(dims)) if given is None or given == [] else [given] if isinstance(given, int) else given
    gone = {axis % len(dims) for axis in axes} if dims else set()
    value = node.meta["val"]
    shape = (value[0] if isinstance(value, (tuple, list)) else value).shape
    if len(shape) == len(dims):
        found = [walk.d.new(1) if axis in gone else dim for axis, dim in enumerate(dims)]
    else:
        found = [dim for axis, dim in enumerate(dims) if axis not in gone]
    return [found] * len(value) if isinstance(value, (tuple, list)) else found


def _pool(walk: _Walk, node: Node) -> Any:
    dims, fresh = walk.dims(node.args[0]), walk._fresh(node)
    several = bool(fresh) and isinstance(fresh[0], list)
    shape = fresh[0] if several else fresh
    kept = [dim if walk.d.size(dim) == walk.d.size(new) and axis < len(dims) - _spatial(node) else new
            for axis, (dim, new) in enumerate(zip(dims, shape, strict=True))]  # fmt: skip
    walk._freeze(kept[len(dims) - _spatial(node) :], "it comes from the input's size")
    return [kept] * len(fresh) if several else kept


def _spatial(node: Node) -> int:
    name = str(node.target)
    return next((n for n in (1, 2, 3) if f"{n}d" in name), 2)


def _pad(walk: _Walk, node: Node) -> Dims:
    dims, fresh, padding = walk.dims(node.args[0]), walk._fresh(node), node.args[1]
    touched = len(padding) // 2
    for axis in range(len(dims) - touched, len(dims)):
        if walk.d.size(dims[axis]) != walk.d.size(fresh[axis]):
            walk.d.freeze(dims[axis], "it is padded")
            walk.d.freeze(fresh[axis], "it is padded")
        else:
            fresh[axis] = dims[axis]
    return [*dims[: len(dims) - touched], *fresh[len(dims) - touched :]]


def _baddbmm(walk: _Walk, node: Node) -> Dims:
    found = _product(walk, walk.dims(node.args[1]), walk.dims(node.args[2]))
    return walk.broadcast(walk.dims(node.args[0]), found)


def _index(walk: _Walk, node: Node) -> Dims:
    """Rows looked up in the leading dimensions by tensors of numbers."""
    dims, numbers = walk.dims(node.args[0]), [a for a in node.args[1]]
    for dim, number in zip(dims, numbers, strict=False):
        if number is not None:
            walk.d.freeze(dim, "it is what an index looks up")
    if None in numbers:
        fresh = walk._fresh(node)
        walk._freeze(fresh, "an index picks some of it")
        walk._freeze(dims, "an index picks some of it")
        return fresh
    return [*walk.broadcast(*map(walk.dims, numbers)), *dims[len(numbers) :]]


def _flatten(walk: _Walk, node: Node) -> Dims:
    return walk.d.regroup(walk.dims(node.args[0]), _sizes(node))


def _repeat(walk: _Walk, node: Node) -> Dims:
    dims = walk.dims(node.args[0])
    padded = [*[walk.d.new(1)] * (len(node.args[1]) - len(dims)), *dims]
    return [tuple(segment for _ in range(times) for segment in dim) if walk.d.size(dim) > 1 else walk.d.new(times)
            for dim, times in zip(padded, node.args[1], strict=True)]  # fmt: skip


def _like(walk: _Walk, node: Node) -> Dims:
    return list(walk.dims(node.args[0]))


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("linear",), _linear),
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    "addmm": _addmm,
    "baddbmm": _baddbmm,
    "index": _index,
    **dict.fromkeys(
        ("where", "__and__", "__or__", "masked_fill", "masked_fill_", "gelu", "silu", "mish", "hardswish"),
        _pointwise,
    ),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys((f"conv_transpose{n}d" for n in ("1", "2", "3")), _transposed),
    "conv_transpose2d": _transposed,
    **dict.fromkeys(GATES, _recurrent),
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    **dict.fromkeys(("softmax", "log_softmax", "_softmax"), _softmax),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _view),
    **dict.fromkeys(("transpose", "swapaxes"), _transpose),
    "t": _t,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "expand_as": _expand,
    "repeat": _repeat,
    **dict.fromkeys(("cat", "concat"), _cat),
    "stack": _stack,
    **dict.fromkeys(("split", "chunk", "split_with_sizes", "tensor_split"), _split),
    "slice": _slice,
    "select": _select,
    **dict.fromkeys(
        (
            "mean",
            "sum",
            "amax",
            "amin",
            "var",
            "std",
            "all",
            "any",
            "norm",
            "linalg_vector_norm",
            "max",
            "min",
            "logsumexp",
        ),
        _reduce,
    ),
    **dict.fromkeys(
        (f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)),
        _pool,
    ),
    **dict.fromkeys(
        (f"upsample_{kind}" for kind in ("nearest2d", "bilinear2d", "nearest1d", "linear1d", "bicubic2d")),
        _pool,
    ),
    "pad": _pad,
    "constant_pad_nd": _pad,
    **dict.fromkeys(
        (
            "dropout",
            "dropout_",
            "contiguous",
            "clone",
            "to",
            "detach",
            "detach_",
            "alias",
            "lift_fresh_copy",
            "_to_copy",
            "cumsum",
            "feature_dropout",
            "alpha_dropout",
            "type_as",
            "relu_",
            "triu",
            "tril",
            "roll",
        ),
        _same,
    ),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), _like),
    **dict.fromkeys(
        (
            "new_ones",
            "new_zeros",
            "new_full",
            "arange",
            "zeros",
            "ones",
            "full",
            "empty",
            "scalar_tensor",
            "_assert_tensor_metadata",
            "sym_size",
            "_assert_scalar",
        ),
        _nothing,
    ),
}


def _where(node: Node) -> str:
    """File and line of the model's code that made a node, as far as the trace tells."""
    lines = [
        line.strip()
        for line in (node.meta.get("stack_trace") or "").splitlines()
        if line.strip().startswith("File")
    ]
    return lines[-1].replace('"', "") if lines else ""
