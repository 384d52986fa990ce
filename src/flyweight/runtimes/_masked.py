"""Nodes that decode a sparse weight: bits say where the values that stay go, and zeros are in all other places.

The place of a value is the number of ones before its bit. All of it is computed from constants, so runtimes
do it once, when they load the graph. Shapes: a weight (O, I) in R times C blocks, of which B stay, with G scales a channel.
"""

from __future__ import annotations

from typing import cast

import onnx
import torch

from flyweight.codes._packing import unpack
from flyweight.codes._sparsity import Pattern
from flyweight.runtimes._layout import as_stored
from flyweight.runtimes._lowered import KINDS, Lowered, floats
from flyweight.transforms import QuantizedLayer

_BYTES = "mask.bytes"
"""Name of the bits of every byte, (256, 8)."""


def decoded(low: Lowered, owner: str, module: QuantizedLayer) -> str:
    """Nodes that decode a sparse weight as (O, I); returns the floats' name."""
    integers, grid = module.encoded()
    pattern, mask, name = cast(Pattern, grid.pattern), cast(torch.Tensor, grid.mask), f"{owner}sparse"
    high, wide = pattern.blocks(*mask.shape)
    bits = _bits(low, f"{owner}mask", high * wide, wide)
    one, flat = (low.small(f"{name}.{at}", torch.tensor(at)) for at in (1, 0))
    whole = low.node("Cast", [bits], f"{name}.bits", to=onnx.TensorProto.INT32)
    before = low.node("CumSum", [whole, flat], f"{name}.counted")
    ones = low.node("Cast", [one], f"{name}.one", to=onnx.TensorProto.INT32)
    places = low.node("Sub", [before, ones], f"{name}.places")  # -1, the last, before the first one: times 0
    kind = "int4" if grid.high <= 7 else "int8" if grid.high <= 127 else "int16"
    kept = _kept(low, f"{owner}integers", pattern.cut(integers)[pattern.cut(mask)[..., 0]], kind)
    found = low.node("Gather", [kept, places], f"{name}.found")
    column = low.node("Unsqueeze", [bits, one], f"{name}.column")
    blocks = low.node("Mul", [found, column], f"{name}.blocks")
    if pattern.height * pattern.width > 1:
        parts = low.small(f"{name}.parts", torch.tensor((high, wide, pattern.height, pattern.width)))
        blocks = low.node("Reshape", [blocks, parts], f"{name}.cut")
        blocks = low.node("Transpose", [blocks], f"{name}.joined", perm=[0, 2, 1, 3])
    groups = low.small(f"{name}.groups", torch.tensor((*grid.scales.shape, grid.group)))
    levels = low.node("Reshape", [blocks, groups], f"{name}.levels")
    shape = low.small(f"{name}.shape", torch.tensor(mask.shape))
    form = (1, 1, 1) if low.weights[f"{owner}scales"].numel() == 1 else (*grid.scales.shape, 1)
    scaled = low.node("Mul", [levels, floats(low, f"{owner}scales", form)], f"{name}.scaled")
    return low.node("Reshape", [scaled, shape], name)


def _kept(low: Lowered, key: str, kept: torch.Tensor, kind: str) -> str:
    """The name of the integers (B, n) that stay, stored in an element type, as float32."""
    if key not in low.layouts:
        low.weights[key], low.layouts[key] = as_stored(kept, kind, turned=False)
    stored = low.stored(key, KINDS[kind], tuple(kept.shape))
    if kind != "int4":
        return low.node("Cast", [stored], f"{key}.kept", to=onnx.TensorProto.FLOAT)
    return low.node("DequantizeLinear", [stored, low.small(f"{key}.one", torch.tensor(1.0))], f"{key}.kept")


def _bits(low: Lowered, key: str, count: int, wide: int) -> str:
    """The name of a mask's bits, (count,) float32, in rows of so many."""
    if _BYTES not in low.dynamic:
        low.dynamic.add(_BYTES)
        every = torch.arange(256, dtype=torch.uint8)[:, None]
        low.small(_BYTES, unpack(every, 1, 8, signed=False).float())
    index = low.node("Cast", [low.stored(key)], f"{key}.index", to=onnx.TensorProto.INT32)
    bits = low.node("Gather", [_BYTES, index], f"{key}.eights")
    rows = low.small(f"{key}.rows", torch.tensor((count // wide, -1)))
    whole = low.node("Reshape", [bits, rows], f"{key}.whole")
    ends = [low.small(f"{key}.{at}", torch.tensor([value])) for at, value in enumerate((0, wide, 1))]
    own = low.node("Slice", [whole, ends[0], ends[1], ends[2]], f"{key}.own")
    return low.node("Reshape", [own, low.small(f"{key}.flat", torch.tensor([-1]))], f"{key}.bits")
