"""Nodes that decode a stored weight: evenly spaced integers by DequantizeLinear, tables by Gather, super-blocks by products.

Everything here reads constants alone, so a runtime may compute it once, when it loads the graph. Integers lie in the smallest
element type that holds them, of 4 or 8 bits. Factors of inputs come last. Shapes: a weight is (O, I) with G scales a channel;
it is turned to (I, O) for products.
"""

from __future__ import annotations

from typing import cast

import onnx
import torch

from flyweight.codes import Grid
from flyweight.codes._packing import unpack
from flyweight.runtimes import _masked
from flyweight.runtimes._layout import TRANSPOSED, as_stored
from flyweight.runtimes._lowered import KINDS, Lowered, floats
from flyweight.transforms import QuantizedLayer


def decoded(low: Lowered, owner: str, module: QuantizedLayer, *, turned: bool) -> str:
    """Nodes that decode a layer's weight, (I, O) if turned, else in the layer's own shape; returns the floats' name."""
    integers, grid = module.encoded()
    if turned and (
        grid.width > 1 or grid.mask is not None or (owner in low.by_rows and grid.columns is None)
    ):
        return low.turned(decoded(low, owner, module, turned=False))
    name = f"{owner}decoded"
    if name in low.dynamic:
        return name
    low.dynamic.add(name)
    if grid.mask is not None:
        own = low.small(f"{name}.shape", torch.tensor(module.shape))
        return low.node("Reshape", [_masked.decoded(low, owner, module), own], name)
    even = grid.table is None and not grid.fixed
    plain = even and (turned or grid.scales.shape[1] == 1)
    made = name if turned or plain else f"{name}.flat"
    scaled = made if grid.columns is None else f"{name}.scaled"
    if even:
        shape = integers.T.shape if turned else module.shape if plain else integers.shape
        _even(low, owner, (integers, grid), scaled, tuple(shape), turned=turned)
    else:
        _levels(low, owner, module, scaled, turned=turned)
    if grid.columns is not None:
        form = (module.columns, 1) if turned else (1, *module.shape[1:]) if plain else (1, module.columns)
        low.node("Mul", [scaled, floats(low, f"{owner}factors", tuple(form))], made)
    if made != name:
        low.node("Reshape", [made, low.small(f"{name}.shape", torch.tensor(module.shape))], name)
    return name


def rows(low: Lowered, owner: str, module: QuantizedLayer, ids: str, y: str) -> str:
    """Nodes that decode the rows of an embedding that its ids name; returns the floats' name, which is y."""
    integers, grid = module.encoded()
    if grid.mask is not None:
        return low.node("Gather", [decoded(low, owner, module, turned=False), ids], y)
    integers = integers if grid.table is None else integers - grid.low
    if grid.columns is None:
        found = _integer_rows(low, f"{owner}integers", integers, _kind(low, owner, grid), (ids, y))
    else:  # column after column, as the code stores them: fewer bytes in a compressed file
        stored = _stored(low, f"{owner}integers", integers, _kind(low, owner, grid), turned=True)
        found = low.node("Gather", [low.turned(stored), ids], f"{y}.codes")
    if grid.table is None:
        levels = low.node("Cast", [found], f"{y}.rows", to=onnx.TensorProto.FLOAT)
    else:
        index = low.node("Cast", [found], f"{y}.index", to=onnx.TensorProto.INT32)
        if len(grid.table) > 1:
            starts = low.node("Gather", [low.small(f"{y}.first", _starts(grid)), ids], f"{y}.starts")
            index = low.node("Add", [index, starts], f"{y}.places")
        levels = low.node("Gather", [_table_values(low, owner, grid), index], f"{y}.levels")
        if grid.width > 1:
            tail = low.small(f"{y}.inputs", torch.tensor([module.columns]))
            flat = low.node("Concat", [low.node("Shape", [ids], f"{y}.rows"), tail], f"{y}.flat", axis=0)
            levels = low.node("Reshape", [levels, flat], f"{y}.joined")
    groups = grid.scales.shape[1]
    if groups > 1:
        tail = low.small(f"{y}.groups", torch.tensor([groups, grid.group]))
        inner = low.node("Concat", [low.node("Shape", [ids], f"{y}.ids"), tail], f"{y}.inner", axis=0)
        levels = low.node("Reshape", [levels, inner], f"{y}.grouped")
    scaled = grid.fixed or "scales" in module.names
    for kind, there, operation in (
        ("zeros", grid.zeros is not None, "Sub"), ("scales", scaled, "Mul"), ("lifts", grid.offsets is not None, "Sub")
    ):  # fmt: skip
        if there:
            levels = low.node(
                operation, [levels, _per_row(low, owner, module, kind, ids, y, groups)], f"{y}.{kind}d"
            )
    if groups > 1:
        whole = low.small(f"{y}.width", torch.tensor([module.columns]))
        outer = low.node("Concat", [f"{y}.ids", whole], f"{y}.outer", axis=0)
        levels = low.node("Reshape", [levels, outer], f"{y}.whole")
    if grid.columns is not None:
        levels = low.node("Mul", [levels, floats(low, f"{owner}factors", (module.columns,))], f"{y}.factored")
    return low.node("Identity", [levels], y)


def _integer_rows(low: Lowered, key: str, integers: torch.Tensor, kind: str, ends: tuple[str, str]) -> str:
    """Rows of integers (V, D) by ids: runtimes gather bytes, not halves of them, so these are split afterwards."""
    ids, y = ends
    if not kind.endswith("4"):
        return low.node("Gather", [_stored(low, key, integers, kind, turned=False), ids], f"{y}.codes")
    shape = (integers.shape[0], integers.shape[1] // 2)
    if key not in low.layouts:
        low.weights[key], low.layouts[key] = as_stored(integers, kind, turned=False)
    pairs = low.node("Gather", [low.stored(key, KINDS["uint8"], shape), ids], f"{y}.pairs")
    split = _halves(low, pairs, y)
    width = low.small(f"{y}.columns", torch.tensor([integers.shape[1]]))
    whole = low.node(
        "Concat", [low.node("Shape", [ids], f"{y}.shape_of_ids"), width], f"{y}.row_shape", axis=0
    )
    found = low.node("Reshape", [split, whole], f"{y}.codes")
    if kind == "uint4":
        return found
    sixteen = low.small(f"{y}.turn_size", torch.tensor(16.0))
    lifted = low.node("Add", [found, low.small(f"{y}.eight", torch.tensor(8.0))], f"{y}.lifted")
    turns = low.node("Floor", [low.node("Div", [lifted, sixteen], f"{y}.turn")], f"{y}.turns")
    return low.node("Sub", [found, low.node("Mul", [turns, sixteen], f"{y}.wrap")], f"{y}.integers")


def _halves(low: Lowered, pairs: str, y: str) -> str:
    """Nodes that split bytes (...) into halves (..., 2), the low one first, as float32; returns their name."""
    # In floating point: OpenVINO's shifts of bytes do not give what ONNX says.
    both = low.node("Cast", [pairs], f"{y}.both", to=onnx.TensorProto.FLOAT)
    sixteen, last = (
        low.small(f"{y}.{name}", torch.tensor(value)) for name, value in (("sixteen", 16.0), ("last", [-1]))
    )
    second = low.node("Floor", [low.node("Div", [both, sixteen], f"{y}.quotient")], f"{y}.second")
    first = low.node("Sub", [both, low.node("Mul", [second, sixteen], f"{y}.above")], f"{y}.first_half")
    wide = [low.node("Unsqueeze", [half, last], f"{half}.wide") for half in (first, second)]
    return low.node("Concat", wide, f"{y}.split", axis=-1)


def product_integers(low: Lowered, owner: str, module: QuantizedLayer) -> str:
    """The name of a layer's int8 integers (I, O)."""
    rows = owner in low.by_rows
    found = _stored(low, f"{owner}integers", module.encoded()[0], "int8", turned=not rows)
    return low.turned(found) if rows else found


def is_int8(low: Lowered, owner: str, module: QuantizedLayer) -> bool:
    """Whether a layer's weight is stored as int8 integers times one scale a channel, and nothing else."""
    grid = module.encoded()[1]
    bare = grid.zeros is None and grid.table is None and grid.columns is None and grid.scales.shape[1] == 1
    return bare and grid.scales.numel() == module.rows and _kind(low, owner, grid) == "int8"


def scales(low: Lowered, owner: str, module: QuantizedLayer) -> str:
    """The name of float32 scales, one a channel (O,), or one for the whole tensor ()."""
    key, count = f"{owner}scales", module.stored()["scales"].numel()
    return floats(low, key, () if count == 1 and module.rows > 1 else (count,))


def _even(
    low: Lowered,
    owner: str,
    encoded: tuple[torch.Tensor, Grid],
    name: str,
    shape: tuple[int, ...],
    *,
    turned: bool,
) -> None:
    """DequantizeLinear per tensor, per channel or in blocks."""
    integers, grid = encoded
    kind = _kind(low, owner, grid)
    inputs = [_stored(low, f"{owner}integers", integers, kind, turned=turned, shape=shape)]
    groups, stored = grid.scales.shape[1], low.weights[f"{owner}scales"]
    if stored.numel() == 1 and grid.scales.numel() > 1:
        form: tuple[int, ...] = ()
        attributes = {}
    elif groups == 1:
        form, attributes = (len(grid.scales),), {"axis": 1 if turned else 0}
    else:
        form = (groups, len(grid.scales)) if turned else tuple(grid.scales.shape)
        attributes = {"axis": 0 if turned else 1, "block_size": grid.group}
        if turned:
            _turn(low, f"{owner}scales")
    inputs.append(floats(low, f"{owner}scales", form))
    if grid.zeros is not None:
        zeros = grid.zeros[:1] if form == () else grid.zeros
        inputs.append(
            _stored(
                low, f"{owner}zeros", zeros.to(torch.int16), kind, turned=turned and groups > 1, shape=form
            )
        )
    low.node("DequantizeLinear", inputs, name, **attributes)


def _levels(low: Lowered, owner: str, module: QuantizedLayer, name: str, *, turned: bool) -> None:
    """Levels, from a table or as integers, times the scales, less what lifts say."""
    integers, grid = module.encoded()
    start = 0 if grid.table is None else grid.low
    index = _stored(low, f"{owner}integers", integers - start, _kind(low, owner, grid), turned=turned)
    outputs, groups = len(integers), grid.scales.shape[1]
    bare = not grid.fixed and f"{owner}scales" not in low.weights
    levels = name if bare else f"{name}.levels"
    if grid.table is None:
        low.node("Cast", [index], levels, to=onnx.TensorProto.FLOAT)
    else:
        index = low.node("Cast", [index], f"{name}.index", to=onnx.TensorProto.INT32)
        if len(grid.table) > 1:
            starts = _starts(grid).reshape((1, -1) if turned else (-1, 1))
            index = low.node("Add", [index, low.small(f"{name}.starts", starts)], f"{name}.places")
        if grid.width > 1:
            vectors = low.node("Gather", [_table_values(low, owner, grid), index], f"{name}.vectors")
            flat = low.small(f"{name}.flat", torch.tensor([outputs, module.columns]))
            low.node("Reshape", [vectors, flat], levels)
        else:
            low.node("Gather", [_table_values(low, owner, grid), index], levels)
    if bare:
        return
    if groups == 1 and not grid.fixed:
        form: tuple[int, ...] = (1, outputs) if turned else (outputs, 1)
        one = low.weights[f"{owner}scales"].numel() == 1
        low.node("Mul", [levels, floats(low, f"{owner}scales", () if one else form)], name)
        return
    inner = (groups, grid.group, outputs) if turned else (outputs, groups, grid.group)
    form = (groups, 1, outputs) if turned else (outputs, groups, 1)
    found = low.node("Reshape", [levels, low.small(f"{name}.inner", torch.tensor(inner))], f"{name}.grouped")
    for kind, there, operation in (("scales", True, "Mul"), ("lifts", grid.offsets is not None, "Sub")):
        if there:
            found = low.node(
                operation, [found, _each(low, owner, grid, kind, form, turned)], f"{name}.{kind}"
            )
    whole = tuple(integers.T.shape) if turned else tuple(integers.shape)
    low.node("Reshape", [found, low.small(f"{name}.whole", torch.tensor(whole))], name)


def _each(low: Lowered, owner: str, grid: Grid, kind: str, form: tuple[int, ...], turned: bool) -> str:
    """Scales, or what lifts say, one for each group, in a form."""
    if not grid.fixed:
        if turned:
            _turn(low, f"{owner}{kind}")
        return floats(low, f"{owner}{kind}", form)
    found = _products(low, owner, grid, kind)
    name = f"{found}.{'columns' if turned else 'rows'}"
    if name not in low.dynamic:
        low.dynamic.add(name)
        found = low.turned(found) if turned else found
        low.node("Reshape", [found, low.small(f"{name}.form", torch.tensor(form))], name)
    return name


def _products(low: Lowered, owner: str, grid: Grid, kind: str) -> str:
    """Nodes for the scales of super-blocks, or what lifts say, (O, G); returns their name."""
    small, large = ("multiples", "supers") if kind == "scales" else ("lifts", "floors")
    name, key = f"{owner}{kind}.products", f"{owner}{small}"
    if name in low.dynamic:
        return name
    low.dynamic.add(name)
    rows, groups = grid.scales.shape
    signed = grid.offsets is None
    supers = low.weights[f"{owner}{large}"].shape[1]
    if key not in low.layouts:
        bits = low.weights[key].shape[1] * 8 // groups
        multiples = unpack(low.weights[key], bits, groups, signed=signed)
        low.weights[key], low.layouts[key] = as_stored(multiples, "int8" if signed else "uint8", turned=False)
    forms = (rows, supers, groups // supers), (rows, supers, 1)
    stored = low.stored(key, KINDS["int8" if signed else "uint8"], forms[0])
    each = low.node("Cast", [stored], f"{name}.each", to=onnx.TensorProto.FLOAT)
    low.node("Mul", [each, floats(low, f"{owner}{large}", forms[1])], f"{name}.all")
    return low.node(
        "Reshape", [f"{name}.all", low.small(f"{name}.shape", torch.tensor((rows, groups)))], name
    )


def _table_values(low: Lowered, owner: str, grid: Grid) -> str:
    """The name of the table's float32 values, (P * entries,) or the vectors (entries, v)."""
    table, key = cast(torch.Tensor, grid.table), f"{owner}table"
    if key in low.weights:
        return floats(low, key, tuple(table.shape[1:]) if grid.width > 1 else (table.numel(),))
    name = f"{key}.implied"  # of a number format: not stored
    if name not in low.dynamic:
        low.dynamic.add(name)
        low.small(name, table.reshape(-1))
    return name


def _starts(grid: Grid) -> torch.Tensor:
    """Where each channel's table begins, (O, 1) int32."""
    tables, entries = cast(torch.Tensor, grid.table).shape
    each = len(grid.scales) // tables
    return (torch.arange(tables, dtype=torch.int32) * entries).repeat_interleave(each)[:, None]


def _per_row(
    low: Lowered, owner: str, module: QuantizedLayer, kind: str, ids: str, y: str, groups: int
) -> str:
    """Scales or zeros of the rows that are looked up, float32 (..., 1) or (..., G, 1)."""
    key = f"{owner}{kind}"
    grid = module.encoded()[1]
    if kind == "zeros" and grid.zeros is not None:
        shared = module.stored()["scales"].numel() == 1
        zeros = (grid.zeros[:1] if shared else grid.zeros).to(torch.int16)
        name = _zero_floats(low, key, zeros, _kind(low, owner, grid))
    elif grid.fixed:
        name = _products(low, owner, grid, kind)
    else:
        name = floats(low, key, tuple(low.weights[key].shape))
    if grid.fixed or low.weights[key].shape[0] > 1 or module.rows == 1:
        name = low.node("Gather", [name, ids], f"{y}.{kind}")
    if groups == 1:
        return name
    axis = low.small(f"{y}.{kind}.axis", torch.tensor([-1]))
    return low.node("Unsqueeze", [name, axis], f"{y}.{kind}.wide")


def _zero_floats(low: Lowered, key: str, zeros: torch.Tensor, kind: str) -> str:
    """Nodes for zero points (R, C) as float32; halves of bytes are split. Returns their name."""
    name = f"{key}.floats"
    if name in low.dynamic:
        return name
    low.dynamic.add(name)
    if kind.endswith("8"):
        found = _stored(low, key, zeros, kind, turned=False)
        return low.node("Cast", [found], name, to=onnx.TensorProto.FLOAT)
    if key not in low.layouts:
        low.weights[key], low.layouts[key] = as_stored(zeros, kind, turned=False)
    pairs = low.stored(key, KINDS["uint8"], (low.weights[key].numel(),))
    flat = low.node(
        "Reshape", [_halves(low, pairs, name), low.small(f"{name}.flat", torch.tensor([-1]))], f"{name}.all"
    )
    ends = [low.small(f"{name}.{at}", torch.tensor([at])) for at in (0, zeros.numel())]
    own = low.node("Slice", [flat, *ends], f"{name}.own")
    return low.node("Reshape", [own, low.small(f"{name}.shape", torch.tensor(zeros.shape))], name)


def _kind(low: Lowered, owner: str, grid: Grid) -> str:
    """The smallest element type for a grid's integers; a table's count from 0. Rows that are looked up fill whole bytes."""
    lowest, highest = (0, grid.high - grid.low) if grid.table is not None else (grid.low, grid.high)
    if highest > 255:
        return "int16"
    odd = owner in low.by_rows and grid.scales.shape[1] * grid.group // grid.width % 2
    half = (lowest >= -8 and highest <= 7 if lowest < 0 else highest <= 15) and not odd
    return f"{'int' if lowest < 0 else 'uint'}{4 if half else 8}"


def _stored(
    low: Lowered,
    key: str,
    integers: torch.Tensor,
    kind: str,
    *,
    turned: bool,
    shape: tuple[int, ...] | None = None,
) -> str:
    """Store integers (R, C) in an element type, turned or not, and tell the layout; returns the name."""
    if key not in low.layouts:
        low.weights[key], low.layouts[key] = as_stored(integers, kind, turned=turned)
    whole = tuple(integers.T.shape if turned else integers.shape)
    return low.stored(key, KINDS[kind], whole if shape is None else shape)


def _turn(low: Lowered, key: str) -> None:
    if key not in low.layouts:
        low.layouts[key] = TRANSPOSED
        low.weights[key] = low.weights[key].T.contiguous()
