"""Walks a traced graph and tells of each tensor what its dimensions are; how an operation joins them is a rule's to say."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from flyweight.analysis._attributes import Factor, Terms, marks
from flyweight.analysis.dimensions import Dim, Dimensions

Dims: TypeAlias = list[Dim]
Rule: TypeAlias = "Callable[[Walk, Node], Any]"
"""The dimensions of what a node gives, a list of them for several tensors; None: the rule does not know."""
_WRONG = (ValueError, IndexError, KeyError, TypeError, StopIteration)
"""What a rule raises that meets an operation in a form it was not made for."""


class Walk:
    """One pass over a graph."""

    def __init__(self, program: torch.export.ExportedProgram, rules: Mapping[str, Rule]) -> None:
        self.space = Dimensions()
        self.tensors: dict[str, Dims] = {}
        """Of each parameter and buffer."""
        self.parameters = set(program.graph_signature.inputs_to_parameters.values())
        self.attributes: dict[str, Dim] = {}
        """What a module's own number is the size of."""
        self.kinds: list[tuple[str, Dim]] = []
        """What the indices of a dimension are, in a word; the first that is told of an atom holds."""
        self.unknown: dict[str, str] = {}
        """Operations without a rule that hold parameters, and where the first stands."""
        self._untold: list[tuple[str, str, set[int]]] = []
        self._products: list[tuple[Sequence[Factor], Dim]] = []
        self._program, self._rules = program, rules
        self._known: dict[Node, Any] = {}
        self._run()

    def dims(self, node: Any) -> Dims:
        """The dimensions of a tensor; none of a number."""
        found = self._known.get(node, []) if isinstance(node, Node) else []
        return list(found) if isinstance(found, list) else []

    def unify(self, one: Dim, two: Dim) -> None:
        """Equate two dimensions."""
        self.space.unify(one, two)

    def size(self, dim: Dim) -> int:
        """The number of indices."""
        return self.space.size(dim)

    def one(self, dims: Sequence[Dim]) -> Dim:
        """Dimensions that are added up or compared, those of one index aside, as one."""
        large = [dim for dim in dims if self.size(dim) > 1]
        for other in large[1:]:
            self.unify(large[0], other)
        return large[0] if large else self.space.new(1)

    def broadcast(self, *tensors: Dims) -> Dims:
        """The dimensions of an element-wise result."""
        rank = max(map(len, tensors), default=0)
        rows = [[*[self.space.new(1)] * (rank - len(dims)), *dims] for dims in tensors if dims]
        return [self.one(column) for column in zip(*rows, strict=True)]

    def fresh(self, node: Node) -> Any:
        """Dimensions of which nothing is known, for what a node gives."""
        value = node.meta.get("val")
        if isinstance(value, tuple | list):
            return [self._new(one) for one in value]
        return self._new(value)

    def freeze(self, dims: Any, reason: str) -> None:
        """Say that dimensions, lists of them or lists of lists, keep their sizes."""
        for dim in dims:
            if isinstance(dim, list):
                self.freeze(dim, reason)
            else:
                self.space.freeze(dim, reason)

    def call(self, dim: Dim, kind: str) -> None:
        """Say what the indices of a dimension are."""
        self.kinds.append((kind, dim))

    def sized(self, node: Node, dims: Dims) -> None:
        """Note which attributes the sizes of a result are that an operation was told, one number for each dimension."""
        for place, terms in marks(node):
            if place < len(dims):
                self.ruled(terms, dims[place])

    def ruled(self, terms: Terms, dim: Dim) -> None:
        """Note that a dimension has the size of attributes, of their product, or of sums of these, piece by piece."""
        widths = [math.prod(size for _, size in factors) for factors in terms]
        if self.size(dim) != sum(widths) or min(widths) < 1:
            return
        for factors, piece in zip(terms, self.space.cut(dim, widths), strict=True):
            large = [(name, size) for name, size in factors if size > 1]
            if len(large) == 1 and large[0][0]:
                self._is(large[0][0], piece)
            elif len(large) > 1:
                self._products.append((large, piece))

    def _is(self, name: str, dim: Dim) -> None:
        if name:
            self.unify(self.attributes.setdefault(name, dim), dim)

    def _multiplied(self, factors: Sequence[Factor], dim: Dim) -> None:
        """Note that a dimension has the size of a product, once it is known what it is seen as elsewhere."""
        sizes, parts = [size for _, size in factors], self.space.factors(dim)
        names, seen = [name for name, _ in factors if name], [self.size(part) for part in parts]
        if set(itertools.accumulate(sizes, operator.mul)) <= set(itertools.accumulate(seen, operator.mul)):
            parts = self.space.regroup([dim], sizes)
        elif sorted(seen) == sorted(set(sizes)):
            parts = [parts[seen.index(size)] for size in sizes]
        elif len(parts) == len(names) == 1:  # so many pieces behind one another
            own = next(size for name, size in factors if name)
            parts = [self.one(self.space.cut(dim, [own] * (self.size(dim) // own)))] * len(factors)
        elif len(names) == len(factors) and not set(names) & set(self.attributes):
            parts = self.space.regroup([dim], sizes)
        else:
            return
        for (name, _), part in zip(factors, parts, strict=True):
            self._is(name, part)

    def _new(self, value: Any) -> Dims:
        return [self.space.new(int(size)) for size in value.shape] if isinstance(value, torch.Tensor) else []

    def _run(self) -> None:
        names, state = self._named()
        first: dict[object, str] = {}
        for node in self._program.graph.nodes:
            if node.op == "placeholder":
                name = names.get(node.name)
                self._known[node] = self._held(node, name, state, first)
            elif node.op == "call_function":
                self._known[node] = self._called(node)
            elif node.op == "output":
                self.freeze(
                    [self._known[used] for used in node.all_input_nodes], "it is an output of the model"
                )
        for factors, dim in self._products:
            self._multiplied(factors, dim)
        own = set(self._atoms(self.tensors.values()))
        for name, place, held in self._untold:
            if own & set(self._atoms([((atom,),) for atom in held])):
                self.unknown.setdefault(name, place)

    def _named(self) -> tuple[Mapping[str, str], Mapping[str, Any]]:
        """Names of parameters and buffers by those of their nodes, and all tensors that the program holds by their names."""
        signature = self._program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        return names, {**self._program.state_dict, **self._program.constants}

    def _held(self, node: Node, name: str | None, state: Mapping[str, Any], first: dict[object, str]) -> Any:
        """The dimensions of what comes from outside; tensors that are one have the same."""
        if name is None:
            found = self.fresh(node)
            self.freeze(found, "it is an input or a constant of the model")
            return found
        tensor = state[name]
        key: object = (tensor.data_ptr(), tensor.shape) if tensor.numel() else name
        self.tensors[name] = self.tensors.get(first.setdefault(key, name)) or self.fresh(node)
        return self.tensors[name]

    def _called(self, node: Node) -> Any:
        if node.target is operator.getitem:
            return self._known[node.args[0]][node.args[1]]  # type: ignore[index]
        name = str(getattr(getattr(node.target, "overloadpacket", None), "__name__", node.target))
        rule = self._rules.get(name)
        if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            rule = elementwise
        found = self._tried(rule, node) if rule else None
        if found is not None:
            return found
        fresh, given = self.fresh(node), [self._known.get(used, []) for used in node.all_input_nodes]
        self._untold.append((name, where(node), {a for a in self._atoms(given) if not self.space.frozen(a)}))
        self.freeze([fresh, *given], f"{name} has no rule")
        return fresh

    def _atoms(self, dims: Any) -> Iterator[int]:
        """The atoms of dimensions, of lists of them or lists of lists."""
        for dim in dims:
            yield from self._atoms(dim) if isinstance(dim, list) else self.space.atoms(dim)

    def _tried(self, rule: Rule, node: Node) -> Any:
        """What a rule says, if that has the sizes of what the node gives."""
        try:
            found = rule(self, node)
        except _WRONG:
            return None
        value = node.meta.get("val")
        if found is None or not isinstance(value, torch.Tensor):
            return found
        return found if [self.size(dim) for dim in found] == list(value.shape) else None


def argument(node: Node, place: int, name: str, default: Any = None) -> Any:
    """An operation's argument, by its place or its name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def sizes(node: Node) -> list[int]:
    """The shape of what a node gives."""
    return [int(size) for size in node.meta["val"].shape]


def elementwise(walk: Walk, node: Node) -> Dims:
    """Element by element, with broadcasting."""
    return walk.broadcast(*map(walk.dims, _tensors((*node.args, *node.kwargs.values()))))


def where(node: Node) -> str:
    """File and line of the model's code that made a node, as far as the trace tells."""
    lines = map(str.strip, (node.meta.get("stack_trace") or "").splitlines())
    return next((line for line in reversed(list(lines)) if line.startswith("File")), "").replace('"', "")


def _tensors(values: Any) -> Iterator[Node]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, Node):
            yield value
