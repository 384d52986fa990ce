"""Exports one of a model's equal blocks in place of all: nearly all of an export's time goes into them.

Where a model has a chain of blocks, those that compute alike, each with its own weights, become open nodes
`flyweight.Block` in the graph of the rest. A block is exported by itself, its parameters being inputs, and its graph is put
in for each node. Two blocks compute alike if their code is the same, apart from their number, and one with the weights of
the other gives the same output to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as trees

from flyweight import transforms
from flyweight.analysis.bare import is_bare, layer_at
from flyweight.analysis.blocks import blocks, called, stream
from flyweight.records import Batch
from flyweight.runtimes._attention import FourDimensional
from flyweight.runtimes._identity import identity

LEAST = 3
"""Equal blocks from which it pays to export one by itself."""
BLOCK = "Block"
_NUMBERS = frozenset({"layer_idx", "path"})
"""Attributes that only say which block it is."""
Program = Callable[[nn.Module, Sequence[torch.Tensor], Sequence[dict[int, Any]], Sequence[str]], Any]
"""Exports a module on tensors, of which these dimensions are free, to a ModelProto with inputs of these names."""


@dataclass(frozen=True, eq=False)
class _Call:
    """What an open block was called with in a trace."""

    leaves: tuple[Any, ...]
    """Tensors on the meta device in place of tensors."""
    form: trees.TreeSpec
    free: tuple[dict[int, Any], ...]
    """The free dimensions of each tensor."""


class _OpenBlock(nn.Module):
    """A block that is exported as one open node, and tells what it was called with."""

    def __init__(self, path: str, domain: str, output: Any, calls: dict[str, _Call]) -> None:
        super().__init__()
        self.path, self.domain, self.calls = path, domain, calls
        self.leaves, self.form = trees.tree_flatten(output)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, form = trees.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.calls[self.path] = _Call(
            tuple(_sized(leaf) for leaf in leaves), form, tuple(_free(tensor) for tensor in tensors)
        )
        state = tensors[0]
        node = torch.onnx.ops.symbolic(
            f"{self.domain}::{BLOCK}", tensors, {"path": self.path}, dtype=state.dtype, shape=state.shape, version=1
        )  # fmt: skip
        return trees.tree_unflatten([node if leaf is ... else leaf for leaf in self.leaves], self.form)


class _Alone(nn.Module):
    """A block as a function of its tensors and its parameters."""

    def __init__(self, block: nn.Module, call: _Call, names: Sequence[str]) -> None:
        super().__init__()
        self.block, self.call, self.names = block, call, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        given = iter(inputs)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.call.leaves]
        args, kwargs = trees.tree_unflatten(leaves, self.call.form)
        with FourDimensional():
            output = functional_call(self.block, dict(zip(self.names, given, strict=True)), args, kwargs)
        return next(leaf for leaf in trees.tree_leaves(output) if isinstance(leaf, torch.Tensor))


@dataclass(frozen=True, eq=False)
class Equal:
    """Blocks of a model, the first that computes as each does, and the form of their outputs."""

    leaders: Mapping[str, str]
    outputs: Mapping[str, Any]
    """Each block's output with ... in place of its tensor."""


def equal(model: nn.Module, twin: nn.Module, sites: Sequence[str], example: Batch) -> Equal | None:
    """The blocks of a model that are worth exporting once, or None; twin: the model with its sites open."""
    chain = blocks(model, example)
    if chain is None or len(chain.paths) < LEAST:
        return None
    if not {*chain.paths}.isdisjoint(sites):  # a site is one open node already, whatever its neighbours are
        return None
    found = stream(model, chain, [example])
    if found is None or not all(arguments[0].args for arguments in found.arguments):
        return None
    leaders: dict[str, str] = {}
    outputs: dict[str, Any] = {}
    state = found.states[0]
    for path, arguments in zip(chain.paths, found.arguments, strict=True):
        output = called(model.get_submodule(path), arguments[0], state)
        tensors = [leaf for leaf in trees.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        if len(tensors) != 1 or tensors[0].shape != state.shape:
            return None
        outputs[path] = trees.tree_map(lambda leaf: ... if isinstance(leaf, torch.Tensor) else leaf, output)
        same = (
            other
            for other in dict.fromkeys(leaders.values())
            if _code(twin.get_submodule(other)) == _code(twin.get_submodule(path))
            and torch.equal(
                _first(called(_posing(model, other, path, sites), arguments[0], state)), tensors[0]
            )
        )
        leaders[path] = next(same, path)
        state = tensors[0]
    return Equal(leaders, outputs) if len(leaders) >= LEAST * len(set(leaders.values())) else None


def export(
    twin: nn.Module, found: Equal, domain: str, whole: Callable[[nn.Module], Any], program: Program
) -> Any:
    """The ModelProto of a model whose blocks are open nodes to `whole`, the equal ones filled in from one export each."""
    calls: dict[str, _Call] = {}
    opened = {path: _OpenBlock(path, domain, found.outputs[path], calls) for path in found.leaders}
    outer = whole(transforms.substitute(twin, dict(opened)).eval())
    bodies = {
        path: _body(twin.get_submodule(path), calls[path], program) for path in set(found.leaders.values())
    }
    nodes = list(outer.graph.node)
    del outer.graph.node[:]
    for node in nodes:
        if node.domain == domain and node.op_type == BLOCK:
            path = node.attribute[0].s.decode()
            leader = found.leaders[path]
            _fill(outer.graph, node, bodies[leader], (leader, path), twin.get_submodule(path))
        else:
            outer.graph.node.append(node)
    return outer


def _body(block: nn.Module, call: _Call, program: Program) -> Any:
    """A block's graph, whose inputs are numbered: its tensors, then its parameters and buffers."""
    state = dict(_state(block))
    tensors = [leaf for leaf in call.leaves if isinstance(leaf, torch.Tensor)]
    values = [torch.zeros(one.shape, dtype=one.dtype) for one in tensors] + list(state.values())
    names = [input_name(index) for index in range(len(values))]
    return program(_Alone(block, call, tuple(state)), values, [*call.free, *({} for _ in state)], names)


def _fill(graph: Any, node: Any, body: Any, places: tuple[str, str], block: nn.Module) -> None:
    """Append a block's nodes to a graph in place of its open node; places: of the block exported, and of this one."""
    from onnx import numpy_helper

    (leader, path), state = places, list(_state(block))
    names = {input_name(index): name for index, name in enumerate(node.input)}
    for index, (name, value) in enumerate(state, start=len(node.input)):
        names[input_name(index)] = f"model.{path}.{name}"
        if any(input_name(index) in one.input for one in body.graph.node):
            graph.initializer.append(
                numpy_helper.from_array(value.detach().numpy(), names[input_name(index)])
            )
    names |= {body.graph.output[0].name: node.output[0], "": ""}
    for item in body.graph.initializer:
        copy = graph.initializer.add()
        copy.CopyFrom(item)
        copy.name = names.setdefault(item.name, f"{path}/{item.name}")
    for one in body.graph.node:
        copy = graph.node.add()
        copy.CopyFrom(one)
        for ends in (copy.input, copy.output):
            ends[:] = [names.setdefault(name, f"{path}/{name}") for name in ends]
        for attribute in copy.attribute:
            if copy.op_type == "Site" and attribute.name == "path":
                attribute.s = (path + attribute.s.decode().removeprefix(leader)).encode()


def input_name(index: int) -> str:
    """What the input of that number is called in a block's graph."""
    return f"given_{index}"


def _state(block: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A block's parameters and buffers by name."""
    yield from block.named_parameters()
    yield from block.named_buffers()


def _code(block: nn.Module) -> list[object]:
    """What must be the same in blocks that compute alike, but for their weights."""
    modules = [(path, identity(module, without=_NUMBERS)) for path, module in block.named_modules()]
    return [*modules, *((name, tuple(one.shape), one.dtype) for name, one in _state(block))]


def _posing(model: nn.Module, leader: str, path: str, sites: Sequence[str]) -> nn.Module:
    """The leader's block with the layers, parameters and buffers of another."""
    block, begin = model.get_submodule(path), f"{path}."
    inside = [site.removeprefix(begin) for site in sites if site.startswith(begin)]
    layers = {name: layer_at(block, name) for name in inside}
    changes = {name: layer for name, layer in layers.items() if not is_bare(layer)}
    own = transforms.substitute(model.get_submodule(leader), changes)
    for name, value in _state(block):
        owner, _, last = name.rpartition(".")
        setattr(layer_at(own, owner), last, value)
    return own.eval()


def _first(output: Any) -> torch.Tensor:
    return next(leaf for leaf in trees.tree_leaves(output) if isinstance(leaf, torch.Tensor))


def _sized(leaf: Any) -> Any:
    """A tensor without values in place of one of a trace; anything else as it is."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return torch.empty([int(size) for size in leaf.shape], dtype=leaf.dtype, device="meta")


def _free(tensor: torch.Tensor) -> dict[int, Any]:
    return {place: torch.export.Dim.AUTO for place, size in enumerate(tensor.shape) if type(size) is not int}
