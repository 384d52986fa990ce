"""Fills an exported skeleton's open sites with what each layer is: floats, or integers that a runtime computes with.

One standard ONNX file serves every runtime here: 8-bit products as QuantizeLinear/DequantizeLinear pairs (unsigned
activations, signed weights per channel) or as DynamicQuantizeLinear with MatMulInteger, stored weights as
DequantizeLinear (per channel or in blocks) or, where runtimes multiply them as they are, MatMulNBits, embeddings as Gather
of integer rows.
Weights are not in the graph: it refers by offset to `weights.safetensors`, so they are stored once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import onnx
import torch
from onnx import helper
from torch import nn

from flyweight.analysis.bare import TURNED, is_bare
from flyweight.runtimes import _activations, _blocks, _decode
from flyweight.runtimes._constants import constants
from flyweight.runtimes._export import DOMAIN, Skeleton
from flyweight.runtimes._layout import ONNX_ONLY, TRANSPOSED
from flyweight.runtimes._lowered import TYPES, Lowered
from flyweight.runtimes._pads import Pads
from flyweight.runtimes._state import stored_keys, unique_state
from flyweight.transforms import QuantizedLayer

IR_VERSION = 11


def lower(skeleton: Skeleton, model: nn.Module, paths: Mapping[str, nn.Module]) -> Lowered:
    """The model's graph with every site filled in; model: the module the skeleton was made of."""
    proto = onnx.ModelProto()
    proto.ParseFromString(skeleton.graph)
    low = Lowered(proto, unique_state(model), keys=stored_keys(model))
    low.by_rows = {_owner(low, path, paths[path]) for path in _looked_up(proto)}
    _state_constants(low, paths)
    pads = Pads(proto)
    for node in proto.graph.node:
        if node.domain == DOMAIN:
            at = {item.name: helper.get_attribute_value(item) for item in node.attribute}
            _site(low, node, at, paths[at["path"].decode()], pads)
        elif not pads.merged(node):
            low.nodes.append(node)
    _activations.output_grids(low)
    _activations.round_activations(low)
    _finish(low)
    return low


def _site(low: Lowered, node: Any, at: Mapping[str, Any], module: nn.Module, pads: Pads) -> None:
    kind, path = at["kind"].decode(), at["path"].decode()
    owner = _owner(low, path, module)
    x, y = "".join(node.input), node.output[0]
    if kind == "weight":
        _weight(low, owner, module, y)
    elif kind == "embedding":
        _embedding(low, owner, module, x, y)
    elif kind == "conv":
        x = pads.source(x, at)
        _convolution(low, owner, module, (x, y), at)
    else:
        _linear(low, path, module, (x, y), at)


def _linear(low: Lowered, path: str, module: nn.Module, ends: tuple[str, str], at: Mapping[str, Any]) -> None:
    (x, y), owner = ends, _owner(low, path, module)
    if not at["bias"]:
        _product(low, owner, module, x, y)
        return
    bias, product = low.stored(_bias(low, path, module)), f"{y}.product"
    static = getattr(module, "activations", "") == "static" and at["rank"] == 2
    if static and isinstance(module, QuantizedLayer) and _decode.is_int8(low, owner, module):
        _static_matrix(low, owner, module, x, product)
        bias = _integer_bias(
            low, _activations.input_step(low, module, x), (bias, _decode.scales(low, owner, module))
        )
    else:
        _product(low, owner, module, x, product)
    low.node("Add", [product, bias], y)


def _weight(low: Lowered, owner: str, module: nn.Module, y: str) -> None:
    """The weight itself, as the layer's own shape has it."""
    if isinstance(module, QuantizedLayer):
        low.node("Identity", [_decode.decoded(low, owner, module, turned=module.transposed)], y)
    else:
        low.node("Identity", [low.stored(_key(owner, module))], y)


def _key(owner: str, module: nn.Module) -> str:
    """The key of a layer's float weight."""
    return owner.removesuffix(".") if is_bare(module) else f"{owner}weight"


def _looked_up(proto: Any) -> list[str]:
    """The paths of the open sites that are embeddings."""
    open_sites = [node for node in proto.graph.node if node.domain == DOMAIN]
    said = [{item.name: helper.get_attribute_value(item) for item in node.attribute} for node in open_sites]
    return [at["path"].decode() for at in said if at["kind"] == b"embedding"]


def _owner(low: Lowered, path: str, module: nn.Module) -> str:
    """What the keys of a layer's stored weight begin with: those of the first layer that holds it."""
    if is_bare(module):
        return f"{low.keys[path.removesuffix(TURNED)]}."
    name = "integers" if isinstance(module, QuantizedLayer) else "weight"
    return low.keys[f"{_prefix(path)}{name}"].removesuffix(name)


def _prefix(path: str) -> str:
    return f"{path}." if path else ""  # the model itself may be the layer


def _bias(low: Lowered, path: str, module: nn.Module) -> str:
    return low.keys[f"{_prefix(path)}{'inner.bias' if isinstance(module, QuantizedLayer) else 'bias'}"]


def _embedding(low: Lowered, owner: str, module: nn.Module, x: str, y: str) -> None:
    if not isinstance(module, QuantizedLayer):
        low.node("Gather", [low.stored(f"{owner}weight"), x], y)
        return
    kind = TYPES[module.dtype]
    same = kind == onnx.TensorProto.FLOAT
    found = _decode.rows(low, owner, module, x, y if same else f"{y}.float")
    if not same:
        low.node("Cast", [found], y, to=kind)


def _product(low: Lowered, owner: str, module: nn.Module, x: str, y: str) -> str:
    """Nodes for x @ weight; returns the name of the product."""
    if not isinstance(module, QuantizedLayer):
        key = f"{owner}weight"
        if owner in low.by_rows:
            return low.node("MatMul", [x, low.turned(low.stored(key))], y)
        if isinstance(module, nn.Linear):
            _transpose(low, key)
        return low.node("MatMul", [x, low.stored(key)], y)
    if _blocks.fits(low, owner, module):
        return _blocks.product(low, owner, module, x, y)
    if module.activations == "dynamic":
        return _dynamic_product(low, owner, module, x, y)
    if module.activations == "rows":
        return _row_product(low, owner, module, x, y)
    if module.activations == "static":
        x = _activations.rounded_input(low, module, x)
    return low.node("MatMul", [x, _decode.decoded(low, owner, module, turned=True)], y)


def _static_matrix(low: Lowered, owner: str, module: QuantizedLayer, x: str, y: str) -> str:
    """Nodes for matrix x @ weight where a bias follows, of a layer with fixed ranges.

    ONNX Runtime joins the two, and keeps to integers then only if the weight has zero points and the bias is of integers too.
    """
    weight = f"{owner}matrix"
    if weight not in low.dynamic:
        low.dynamic.add(weight)
        integers, scales = _decode.product_integers(low, owner, module), _decode.scales(low, owner, module)
        low.node("DequantizeLinear", [integers, scales, _weight_zeros(low, owner, module)], weight, axis=1)
    return low.node("MatMul", [_activations.rounded_input(low, module, x), weight], y)


def _dynamic_product(low: Lowered, owner: str, module: QuantizedLayer, x: str, y: str) -> str:
    codes, scales, zero = (f"{x}.{part}" for part in ("q8", "q8_scale", "q8_zero"))
    if codes not in low.dynamic:
        low.dynamic.add(codes)
        low.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], [codes, scales, zero]))
    weight = _decode.product_integers(low, owner, module)
    low.node("MatMulInteger", [codes, weight, zero, _weight_zeros(low, owner, module)], f"{y}.sum")
    low.node("Cast", [f"{y}.sum"], f"{y}.float", to=onnx.TensorProto.FLOAT)
    low.node("Mul", [scales, _decode.scales(low, owner, module)], f"{y}.scale")
    return low.node("Mul", [f"{y}.float", f"{y}.scale"], y)


def _row_product(low: Lowered, owner: str, module: QuantizedLayer, x: str, y: str) -> str:
    """The product of rows rounded each on a grid of its own: sum((q - z) w) = sum(q w) - z sum(w), in integers but for z."""
    codes, steps, below = _rounded_rows(low, x)
    weight, sums = _decode.product_integers(low, owner, module), f"{owner}sums"
    if sums not in low.dynamic:  # over constants: runtimes compute it once, when they load it
        low.dynamic.add(sums)
        wide = low.node("Cast", [weight], f"{sums}.wide", to=onnx.TensorProto.FLOAT)
        low.node("ReduceSum", [wide, low.small(f"{sums}.axis", torch.tensor([0]))], sums, keepdims=0)
    nothing = low.small(f"{y}.nothing", torch.tensor(0, dtype=torch.uint8))
    low.node("MatMulInteger", [codes, weight, nothing, _weight_zeros(low, owner, module)], f"{y}.sum")
    low.node("Cast", [f"{y}.sum"], f"{y}.float", to=onnx.TensorProto.FLOAT)
    low.node("Add", [f"{y}.float", low.node("Mul", [below, sums], f"{y}.below")], f"{y}.whole")
    low.node("Mul", [f"{y}.whole", _decode.scales(low, owner, module)], f"{y}.scaled")
    return low.node("Mul", [f"{y}.scaled", steps], y)


def _rounded_rows(low: Lowered, x: str) -> tuple[str, str, str]:
    """Names of x's unsigned 8-bit integers, of each row's step, and of its zero point times -1; layers share them."""
    codes, steps, below = (f"{x}.{part}" for part in ("rows8", "rows8_step", "rows8_below"))
    if codes in low.dynamic:
        return codes, steps, below
    low.dynamic.add(codes)

    def constant(name: str, value: torch.Tensor) -> str:
        return low.small(f"{codes}.{name}", value)

    axis, nothing = constant("axis", torch.tensor([-1])), constant("nothing", torch.tensor(0.0))
    ends = []
    for kind, bound in (("ReduceMin", "Min"), ("ReduceMax", "Max")):
        found = low.node(kind, [x, axis], f"{codes}.{kind}", keepdims=1)
        ends.append(low.node(bound, [found, nothing], f"{codes}.{bound}"))
    span = low.node("Sub", [ends[1], ends[0]], f"{codes}.span")
    step = low.node("Div", [span, constant("top", torch.tensor(255.0))], f"{codes}.step")
    low.node("Max", [step, constant("least", torch.tensor(1e-30))], steps)
    low.node("Round", [low.node("Div", [ends[0], steps], f"{codes}.low")], below)
    lifted = low.node("Sub", [low.node("Div", [x, steps], f"{codes}.ratios"), below], f"{codes}.lifted")
    ones = [constant("one", torch.tensor(1.0)), constant("zero", torch.tensor(0, dtype=torch.uint8))]
    low.node("QuantizeLinear", [lifted, *ones], codes)
    return codes, steps, below


def _weight_zeros(low: Lowered, owner: str, module: QuantizedLayer) -> str:
    """The name of the zero points of a layer's int8 integers: all 0."""
    zeros = f"{owner}zero"
    if zeros not in low.dynamic:
        low.dynamic.add(zeros)
        low.small(zeros, torch.zeros(module.rows, dtype=torch.int8))
    return zeros


def _convolution(
    low: Lowered, owner: str, module: nn.Module, ends: tuple[str, str], at: Mapping[str, Any]
) -> None:
    (x, y), bias = ends, [low.stored(_bias(low, at["path"].decode(), module))] if at["bias"] else []
    layout = {name: at[name] for name in ("strides", "pads", "dilations", "group")}
    if not isinstance(module, QuantizedLayer):
        low.node("Conv", [x, low.stored(f"{owner}weight"), *bias], y, **layout)
        return
    name = _decode.decoded(low, owner, module, turned=False)
    if module.activations == "static":
        if x not in low.grids:
            low.grids[x], low.tops[x] = _activations.grid_of(module.input_grid), module.top
        step, _ = low.grids[x]
        low.alone.discard(x)
        low.outputs.append((y, _activations.grid_of(module.output_grid)))
        # Another layer may have chosen the input's grid. The weights' scales only allow for half of this layer's own.
        if bias and step > 0.5 * _activations.grid_of(module.input_grid)[0]:
            bias = [_integer_bias(low, step, (bias[0], _decode.scales(low, owner, module)))]
    low.node("Conv", [x, name, *bias], y, **layout)


def _integer_bias(low: Lowered, step: float, given: tuple[str, str]) -> str:
    """The bias as 32-bit integers in units of input step times weight scale, as integer convolutions need it.

    The graph computes them from the stored bias; runtimes do so once, when they load it. Returns the name of the floats
    that the integers stand for.
    """
    (bias, scales), name = given, f"{given[0]}.{step!r}"
    if name not in low.dynamic:
        low.dynamic.add(name)
        low.node("Mul", [scales, low.small(f"{name}.step", torch.tensor(step))], f"{name}.steps")
        low.node("Div", [bias, f"{name}.steps"], f"{name}.quotients")
        low.node("Round", [f"{name}.quotients"], f"{name}.rounds")
        low.node("Cast", [f"{name}.rounds"], f"{name}.codes", to=onnx.TensorProto.INT32)
        low.node("DequantizeLinear", [f"{name}.codes", f"{name}.steps"], name, axis=0)
    return name


def _transpose(low: Lowered, key: str) -> None:
    if key not in low.layouts:
        low.layouts[key] = TRANSPOSED
        low.weights[key] = low.weights[key].T.contiguous()


def _state_constants(low: Lowered, sites: Iterable[str]) -> None:
    """Let the graph's own constants refer to the weights: those of the model by their key, large others by a new one."""
    filled = tuple(f"{path}." for path in sites)  # may be stored otherwise, so nothing else may refer to them
    kept = []
    for found in constants(
        low.graph.graph, {k: t for k, t in low.weights.items() if not k.startswith(filled)}
    ):
        item, name = found.item, found.item.name
        if found.tensor is None:
            kept.append(item)
        elif found.turned:
            low.node("Transpose", [low.stored(found.key)], name, perm=[1, 0])
        else:
            key = found.key or f"{ONNX_ONLY}{name}"
            low.weights.setdefault(key, found.tensor)
            low.refers[name] = (key, item.data_type, tuple(item.dims))
    del low.graph.graph.initializer[:]
    low.graph.graph.initializer.extend(kept)


def _finish(low: Lowered) -> None:
    proto = low.graph
    del proto.graph.node[:]
    proto.graph.node.extend(low.nodes)
    del proto.graph.value_info[:]
    del proto.metadata_props[:]
    del proto.functions[:]
    proto.doc_string, proto.producer_name, proto.producer_version = "", "flyweight", ""
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.name = node.doc_string = ""
    _shorten(proto.graph, kept={*low.refers, *low.weights})
    for index in reversed(range(len(proto.opset_import))):
        if proto.opset_import[index].domain == DOMAIN:
            del proto.opset_import[index]
    proto.ir_version = IR_VERSION


def _shorten(graph: Any, kept: set[str]) -> None:
    """Number the tensors between the nodes, whose names would weigh as much as the rest of the graph.

    The graph's inputs and outputs and the names in `kept` stay. Graphs inside nodes may refer to any tensor around them
    and keep their own names, so a graph that has some is left alone.
    """
    if any(attribute.g.node or attribute.graphs for node in graph.node for attribute in node.attribute):
        return
    kept |= {"", *(value.name for value in (*graph.input, *graph.output))}
    free = (name for name in map(str, itertools.count()) if name not in kept)
    made = [item.name for item in graph.initializer] + [name for node in graph.node for name in node.output]
    short = {name: name if name in kept else next(free) for name in dict.fromkeys(made)}
    for item in graph.initializer:
        item.name = short[item.name]
    for node in graph.node:
        node.input[:] = [short.get(name, name) for name in node.input]
        node.output[:] = [short.get(name, name) for name in node.output]
