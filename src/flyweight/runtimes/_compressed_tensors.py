"""Quantized layers in the format compressed-tensors of vLLM and transformers: a layer's tensors, and what config.json says.

Integers go in as they are, packed without gaps: the i-th of b bits lies at bit i * b of a row of little-endian words. They
are counted from -2^(b - 1), so that a grid with zero points moves down by that much, integers and zero points alike; a
value is (integer - zero) * scale in the scale's dtype. Scales are written in the smallest dtype that holds them exactly.
There are four forms, which differ in what their readers can do:

packed    a scale per channel or group, zero points packed along the channels: what vLLM reads. transformers reads it only
          where a model has no zero points, or the same scheme in every layer; then it decodes at once, by "dequantize".
blocks    as packed, but blocks of one row, with zero points in a byte each: any mixture; not for vLLM.
bytes     an integer a byte, whatever its bits: embeddings, which transformers cannot load packed; not for vLLM.
floats    e4m3, a number a byte.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch.nn.functional import pad as padded

from flyweight.codes import Grid, integer, low_float, ternary
from flyweight.codes._packing import pack, unpack
from flyweight.errors import ModelError, another_model
from flyweight.records import JSON

Form: TypeAlias = 'Literal["packed", "blocks", "bytes", "floats"]'
METHOD = "compressed-tensors"
NAMES = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point")
"""What a layer's tensors are called, behind its path."""
_FORMATS: Mapping[Form, str] = {
    "packed": "pack-quantized",
    "blocks": "pack-quantized",
    "bytes": "int-quantized",
    "floats": "float-quantized",
}
_WORD = 4
"""Bytes of the words that integers are packed into."""
_E4M3 = 126
"""Numbers of e4m3 above 0."""


@dataclass(frozen=True)
class Scheme:
    """How a layer is stored; layers of one scheme share a group in config.json."""

    form: Form
    bits: int
    group: int | None
    """Inputs that share a scale; None: all of an output channel's."""
    symmetric: bool
    columns: int = 0
    """Inputs of a channel, where the form asks for them: blocks as long as a channel."""

    def arguments(self) -> dict[str, JSON]:
        """The format's words for it."""
        kind = "float" if self.form == "floats" else "int"
        said: dict[str, JSON] = {"num_bits": self.bits, "type": kind, "symmetric": self.symmetric}
        if self.form == "blocks":
            return said | {"strategy": "block", "block_structure": [1, self.group or self.columns]}
        if self.group is None:
            return said | {"strategy": "channel"}
        return said | {"strategy": "group", "group_size": self.group}


def scheme(options: Any, form: Form = "packed", columns: int = 0) -> Scheme:
    """The scheme of a code's options, for a layer with so many inputs; ModelError, by name, for what the format lacks."""
    group = options.group if isinstance(getattr(options, "group", None), int) else None
    if isinstance(options, low_float.Options) and options.format == "e4m3":
        return Scheme("floats", 8, group, True)
    if not isinstance(options, integer.Options | ternary.Options):
        raise _lacking(options)
    symmetric = not isinstance(options, integer.Options) or options.symmetric
    bits = options.bits if isinstance(options, integer.Options) else 2
    wanted = "packed" if form == "blocks" and symmetric else form
    return Scheme(wanted, bits, group, symmetric, columns if wanted == "blocks" and group is None else 0)


def schemes(layers: Mapping[str, tuple[Any, int]], embeddings: frozenset[str]) -> dict[str, Scheme]:
    """Schemes that transformers can load together, of layers by path: code options, and inputs of a channel.

    Raises ModelError, with the layer, for a code that the format lacks.
    """
    found = {path: _scheme(path, options, "packed", n) for path, (options, n) in layers.items()}
    if len(set(found.values())) == 1 and not embeddings:
        return found
    return {
        path: _scheme(path, options, "bytes" if path in embeddings else "blocks", columns)
        for path, (options, columns) in layers.items()
    }


def packed(
    path: str,
    integers: torch.Tensor,
    grid: Grid,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    form: Form = "packed",
) -> dict[str, torch.Tensor]:
    """A layer's tensors by their names in the file.

    integers: (O, I) on the grid; shape: the weight's own; dtype: the model's floats, which scales are written in where it
    is the smallest that holds them. Raises ModelError for a grid that the format cannot hold exactly.
    """
    _check(path, grid, shape)
    if grid.table is not None:
        levels = grid.table[0][integers.long() - grid.low]
        return _named(
            path, {"weight": levels.to(torch.float8_e4m3fn), "weight_scale": _scales(grid.scales, dtype)}
        )
    bits = width(grid)
    down = 0 if grid.zeros is None else 1 << bits - 1
    counted = integers.to(torch.int16) - down
    found: dict[str, torch.Tensor] = {}
    if form == "bytes":
        found["weight"] = counted.to(torch.int8)
    else:
        found["weight_packed"] = _words(counted, bits)
        found["weight_shape"] = torch.tensor(shape, dtype=torch.int64)
    found["weight_scale"] = _scales(grid.scales, dtype)
    if grid.zeros is not None:
        zeros = grid.zeros.to(torch.int16) - down
        if form == "packed":
            # transformers decodes these at once, in the dtype of the scales as they lie in the file
            found["weight_scale"] = grid.scales.float()
            found["weight_zero_point"] = _words(zeros.T, bits).T
        else:
            found["weight_zero_point"] = zeros.to(torch.int8)
    return _named(path, found)


def unpacked(
    path: str, stored: Mapping[str, torch.Tensor], grid: Grid, columns: int
) -> tuple[torch.Tensor, Grid]:
    """The int16 integers (O, columns) and the grid, as `packed` was given them, of a file's tensors.

    grid: of the layer's code and options, whose scales and zeros do not matter. Raises ArtifactError for other tensors.
    """
    own = {name: stored[f"{path}.{name}"] for name in NAMES if f"{path}.{name}" in stored}
    try:
        scales = own["weight_scale"].float()
        if grid.table is not None:
            return _counted(own["weight"].float(), grid), dataclasses.replace(grid, scales=scales)
        bits = width(grid)
        up = 0 if grid.zeros is None else 1 << bits - 1
        counted = own["weight"] if "weight" in own else _integers(own["weight_packed"], bits, columns)
        zeros = None
        if grid.zeros is not None:
            zeros = own["weight_zero_point"]
            if zeros.dtype == torch.int32:
                zeros = _integers(zeros.T, bits, len(counted)).T
            zeros = zeros.float() + up
    except (KeyError, RuntimeError) as error:
        raise another_model(json.dumps(str(error))[:120], path) from None
    if counted.shape != (len(scales), columns) or scales.shape[1] != columns // grid.group:
        got = json.dumps(f"shapes {tuple(counted.shape)} and {tuple(scales.shape)}")
        raise another_model(got, path)
    return counted.to(torch.int16) + up, dataclasses.replace(grid, scales=scales, zeros=zeros)


def configuration(layers: Mapping[str, Any], ignore: Sequence[str]) -> dict[str, JSON]:
    """The quantization_config of layers, by path, with the options of their codes, each packed as vLLM reads it.

    ignore: paths of linear layers that stay as they are. Raises ModelError, with the layer, for what the format lacks, and
    for zero points among layers that differ, which transformers would decode wrongly.
    """
    found = {path: _scheme(path, options, "packed", 0) for path, options in layers.items()}
    if len(set(found.values())) > 1 and not all(one.symmetric for one in found.values()):
        raise ModelError(
            "layers with packed zero points must all have one scheme",
            got=f"{len(set(found.values()))} schemes",
            way_out="leave out the zero points, or give all layers the same bits and groups",
        )
    return described(found, ignore)


def described(found: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, JSON]:
    """The quantization_config of layers by path; those of one scheme share a group."""
    groups: dict[Scheme, list[JSON]] = {}
    for path, one in found.items():
        groups.setdefault(one, []).append(path)
    formats = {_FORMATS[one.form] for one in groups}
    said: dict[str, JSON] = {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {
            f"group_{index}": {"targets": paths, "weights": one.arguments(), "format": _FORMATS[one.form]}
            for index, (one, paths) in enumerate(groups.items())
        },
    }
    decoded = any(one.form == "packed" and not one.symmetric for one in groups)
    return said | {"dequantize": True} if decoded else said


def width(grid: Grid) -> int:
    """Bits of a grid's integers, 2 to 8: of evenly spaced ones, counted from 0 with zero points, else around it."""
    return grid.high.bit_length() + (grid.zeros is None)


def _scheme(path: str, options: Any, form: Form, columns: int) -> Scheme:
    try:
        return scheme(options, form, columns)
    except ModelError as error:
        raise error.at(path) from None


def _lacking(options: Any) -> ModelError:
    name = type(options).__module__.rpartition(".")[2]
    form = f" of format {options.format}" if hasattr(options, "format") else ""
    return ModelError(
        f"{METHOD} holds evenly spaced integers, and floats e4m3",
        got=f"the code {name}{form}",
        way_out="take the code integer, or low_float with format e4m3, or another runtime",
    )


def _check(path: str, grid: Grid, shape: tuple[int, ...]) -> None:
    if len(shape) != 2:
        raise ModelError(f"{METHOD} holds matrices", got=f"shape {shape}", where=path)
    float8 = grid.table is not None and len(grid.table) == 1 and grid.high == _E4M3
    if grid.columns is not None or not (float8 or grid.table is None) or not (float8 or width(grid) <= 8):
        raise ModelError(
            f"{METHOD} holds evenly spaced integers of 2 to 8 bits, and floats e4m3", got="another grid", where=path
        )  # fmt: skip


def _scales(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scales (O, G) in float16, the model's dtype or float32, whichever first holds them exactly."""
    for kind in (torch.float16, dtype):
        held = scales.to(kind)
        if kind.itemsize <= torch.float32.itemsize and torch.equal(held.float(), scales):
            return held.contiguous()
    return scales.float()


def _words(counted: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers (O, I), counted from -2^(bits - 1), as words (O, ceil(I * bits / 32)) int32."""
    raw = pack(counted + (1 << bits - 1), bits)
    return padded(raw, (0, -raw.shape[1] % _WORD)).view(torch.int32)


def _integers(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The (O, count) int16 integers of `_words`."""
    found = unpack(words.contiguous().view(torch.uint8), bits, count, signed=False)[:, :count]
    return found - (1 << bits - 1)


def _counted(levels: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Which of a table's levels each is."""
    table = torch.empty(0) if grid.table is None else grid.table[0]
    found = torch.searchsorted(table, levels.contiguous()).clamp(max=len(table) - 1)
    if not torch.equal(table[found], levels):
        raise KeyError("a number that is not finite")
    return (found + grid.low).to(torch.int16)


def _named(path: str, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With memory of their own: layers that share a weight are written one by one."""
    kept = torch.contiguous_format
    return {f"{path}.{name}": tensor.clone(memory_format=kept) for name, tensor in found.items()}
