"""Layers in the format compressed-tensors: its own package reads our integers, and slow plain code agrees."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.codes import Grid, entropy, integer, low_float, palette, ternary
from flyweight.errors import ArtifactError, ModelError
from flyweight.runtimes import _compressed_tensors as form

installed = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)
SHAPE = (37, 48)


def weight(shape: tuple[int, int] = SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encoded(options: Any, shape: tuple[int, int] = SHAPE) -> tuple[torch.Tensor, Grid]:
    code = {
        integer.Options: integer,
        ternary.Options: ternary,
        low_float.Options: low_float,
        palette.Options: palette,
    }[type(options)]
    grid = code.fit(weight(shape), options)
    return grid.nearest(weight(shape)), grid


def unpacked_slowly(words: torch.Tensor, bits: int, count: int) -> list[list[int]]:
    """Bit after bit: the i-th integer of a row at bit i * bits, counted from -2^(bits - 1)."""
    rows = []
    for row in words.tolist():
        stream = "".join(format(word & 0xFFFFFFFF, "032b")[::-1] for word in row)
        fields = [stream[i * bits : (i + 1) * bits][::-1] for i in range(count)]
        rows.append([int(field, 2) - 2 ** (bits - 1) for field in fields])
    return rows


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    rows=st.integers(1, 9),
    columns=st.integers(2, 70),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_integer_lies_where_it_should(
    bits: int, rows: int, columns: int, symmetric: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    low, high = (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    integers = torch.randint(low, high + 1, (rows, columns), generator=random, dtype=torch.int16)
    zeros = None if symmetric else torch.randint(0, 2**bits, (rows, 1), generator=random).float()
    grid = Grid(low, high, columns, torch.rand(rows, 1, generator=random) + 0.1, zeros)
    found = form.packed("a.b", integers, grid, (rows, columns), torch.float32)
    down = 0 if symmetric else 2 ** (bits - 1)
    words = found["a.b.weight_packed"]
    assert words.dtype == torch.int32
    assert words.shape == (rows, -(-columns * bits // 32))
    assert unpacked_slowly(words, bits, columns) == (integers - down).tolist()
    assert found["a.b.weight_shape"].tolist() == [rows, columns]
    assert torch.equal(found["a.b.weight_scale"], grid.scales)
    if zeros is not None:
        turned = found["a.b.weight_zero_point"].T
        assert unpacked_slowly(turned, bits, rows) == (zeros.T - down).tolist()
    for kind in ("packed", "blocks", "bytes"):
        stored = form.packed("a.b", integers, grid, (rows, columns), torch.float32, kind)
        back, same = form.unpacked("a.b", stored, grid, columns)
        assert torch.equal(back, integers)
        assert torch.equal(same.values(back), grid.values(integers))


@installed
@pytest.mark.parametrize("kind", ["packed", "blocks", "bytes"])
@pytest.mark.parametrize(
    "options",
    [
        *(integer.Options(bits=b, group=g, symmetric=s) for b in (2, 3, 4, 5, 6, 8) for g, s in ((None, True), (16, False))),
        integer.Options(bits=4, reduced=True), integer.Options(bits=8, group="tensor", symmetric=False),
        ternary.Options(group=16), low_float.Options(), low_float.Options(group=16),
    ],
)  # fmt: skip
def test_the_package_decodes_to_our_values(options: Any, kind: Any) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    integers, grid = encoded(options)
    found = form.packed("a", integers, grid, SHAPE, torch.float32, kind)
    chosen = form.scheme(options, kind, SHAPE[1])
    config = QuantizationConfig.model_validate(form.described({"a": chosen}, []))
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    own = {name.removeprefix("a."): tensor for name, tensor in found.items()}
    own["weight_scale"] = own["weight_scale"].float()
    assert torch.equal(compressor.decompress(own, scheme)["weight"], grid.values(integers))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (palette.Options(), "palette"),
        (entropy.Options(), "entropy"),
        (low_float.Options(format="e5m2"), "low_float of format e5m2"),
        (low_float.Options(format="e2m1", group=32, scale="e8m0"), "low_float of format e2m1"),
    ],
)
def test_what_the_format_lacks_is_refused_by_name(options: Any, name: str) -> None:
    with pytest.raises(ModelError, match=f"the code {name}.*at model.layer.*take the code integer"):
        form.configuration({"model.layer": options}, [])


def test_grids_and_shapes_that_do_not_fit_are_refused() -> None:
    integers, grid = encoded(palette.Options(bits=4))
    with pytest.raises(ModelError, match=r"evenly spaced integers.*at here"):
        form.packed("here", integers, grid, SHAPE, torch.float32)
    integers, grid = encoded(integer.Options())
    columns = dataclasses.replace(grid, columns=torch.ones(SHAPE[1]))
    with pytest.raises(ModelError, match="evenly spaced"):
        form.packed("here", integers, columns, SHAPE, torch.float32)
    with pytest.raises(ModelError, match="2 to 8 bits"):
        form.packed("here", integers, dataclasses.replace(grid, high=1000), SHAPE, torch.float32)
    with pytest.raises(ModelError, match="holds matrices"):
        form.packed("here", integers, grid, (37, 12, 2, 2), torch.float32)


def test_scales_take_the_smallest_dtype_that_holds_them() -> None:
    def kind(scale: str, dtype: torch.dtype, **more: Any) -> torch.dtype:
        integers, grid = encoded(integer.Options(bits=4, group=16, scale=scale, **more))
        return form.packed("a", integers, grid, SHAPE, dtype)["a.weight_scale"].dtype

    assert kind("float16", torch.float32) == torch.float16
    assert kind("float32", torch.float32) == torch.float32
    assert kind("float32", torch.bfloat16) == torch.float32
    # packed zero points are decoded in the dtype of the scales as they lie in the file
    assert kind("float16", torch.float32, symmetric=False) == torch.float32
    integers, grid = encoded(integer.Options(bits=4))
    grid = dataclasses.replace(grid, scales=torch.full_like(grid.scales, 2.0**100))
    assert form.packed("a", integers, grid, SHAPE, torch.bfloat16)["a.weight_scale"].dtype == torch.bfloat16


def test_layers_of_one_scheme_share_a_group() -> None:
    four, eight = integer.Options(bits=4, group=32), integer.Options()
    said = form.configuration(
        {"a": four, "b": eight, "c": dataclasses.replace(four, range="minmax")}, ["head"]
    )
    assert said["ignore"] == ["head"]
    assert said["format"] == "pack-quantized"
    assert said["quant_method"] == "compressed-tensors"
    assert said["config_groups"] == {
        "group_0": {
            "targets": ["a", "c"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
            },
            "format": "pack-quantized",
        },
        "group_1": {
            "targets": ["b"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "format": "pack-quantized",
        },
    }
    assert "dequantize" not in said
    assert form.configuration({"a": low_float.Options(), "b": four}, [])["format"] == "mixed-precision"


def test_zero_points_of_layers_that_differ_are_never_packed() -> None:
    zeros, eight = integer.Options(bits=4, group=32, symmetric=False), integer.Options()
    assert form.configuration({"a": zeros, "b": zeros}, [])["dequantize"] is True
    with pytest.raises(ModelError, match=r"must all have one scheme, got 2 schemes"):
        form.configuration({"a": zeros, "b": eight}, [])
    alone = form.schemes({"a": (zeros, 64), "b": (zeros, 32)}, frozenset())
    assert {one.form for one in alone.values()} == {"packed"}
    mixed = form.schemes({"a": (zeros, 64), "b": (eight, 64), "e": (zeros, 64)}, frozenset({"e"}))
    assert {path: one.form for path, one in mixed.items()} == {"a": "blocks", "b": "packed", "e": "bytes"}
    assert mixed["a"].arguments()["block_structure"] == [1, 32]
    wide = form.schemes({"a": (dataclasses.replace(zeros, group=None), 64), "b": (eight, 64)}, frozenset())
    assert wide["a"].arguments()["block_structure"] == [1, 64]
    assert "dequantize" not in form.described(mixed, [])


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: stored.pop("a.weight_scale"),
        lambda stored: stored.pop("a.weight_packed"),
        lambda stored: stored.pop("a.weight_zero_point"),
        lambda stored: stored.update({"a.weight_scale": torch.ones(37, 2)}),
        lambda stored: stored.update({"a.weight_packed": stored["a.weight_packed"][:5]}),
    ],
)
def test_other_tensors_are_refused_when_they_are_read(change: Any) -> None:
    integers, grid = encoded(integer.Options(bits=4, group=16, symmetric=False))
    stored = form.packed("a", integers, grid, SHAPE, torch.float32)
    change(stored)
    with pytest.raises(ArtifactError, match=r"must belong to the model.*at a"):
        form.unpacked("a", stored, grid, SHAPE[1])


def test_numbers_that_are_none_are_refused() -> None:
    integers, grid = encoded(low_float.Options())
    stored = form.packed("a", integers, grid, SHAPE, torch.float32)
    stored["a.weight"][0, 0] = float("nan")
    with pytest.raises(ArtifactError, match="not finite"):
        form.unpacked("a", stored, grid, SHAPE[1])
