"""Blocks decode to the bit, by a slow plain reader and by the format's own package; files come whole."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.errors import ModelError
from flyweight.runtimes import _gguf
from flyweight.runtimes._gguf import Tensor, Type, pack, unpack

KINDS = pytest.mark.parametrize("kind", _gguf.INTEGERS, ids=lambda kind: kind.name)


def case(kind: Type, seed: int, rows: int = 3, blocks: int = 4, groups: int = 2) -> tuple[Any, Any, Any]:
    """Integers of the whole range, and scales and minima in half precision, some tiny, negative or zero."""
    source = np.random.default_rng(seed)
    integers = source.integers(kind.low, kind.high + 1, (rows, 32 * blocks))
    integers[0, :2] = kind.low, kind.high
    scales = (source.standard_normal((rows, groups)) * 10.0 ** source.integers(-7, 4)).astype(np.float16)
    scales[0, 0] = 0
    minima = (source.standard_normal((rows, groups)) * 10.0 ** source.integers(-6, 3)).astype(np.float16)
    return integers, scales.astype(np.float32), minima.astype(np.float32) if kind.minimum else None


def slow(kind: Type, packed: Any, columns: int) -> list[list[float]]:
    """The values of packed rows, one by one, from the layout in words: scale, minimum, fifth bits, nibbles or bytes."""
    rows = []
    for row in packed:
        values: list[float] = []
        for block in range(columns // 32):
            raw = bytes(row[block * kind.bytes : (block + 1) * kind.bytes])
            scale, raw = struct.unpack("<e", raw[:2])[0], raw[2:]
            minimum = 0.0
            if kind.minimum:
                minimum, raw = struct.unpack("<e", raw[:2])[0], raw[2:]
            fifths = 0
            if kind.name.startswith("Q5"):
                fifths, raw = int.from_bytes(raw[:4], "little"), raw[4:]
            for index in range(32):
                if kind.name == "Q8_0":
                    integer = struct.unpack("<b", raw[index : index + 1])[0]
                else:
                    integer = raw[index % 16] >> (4 * (index // 16)) & 15
                    integer += 16 * (fifths >> index & 1) + kind.low
                values.append(integer * scale + minimum)
        rows.append(values)
    return rows


@KINDS
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 4), blocks=st.sampled_from([1, 2, 6]))
def test_blocks_decode_to_the_bit(kind: Type, seed: int, rows: int, blocks: int) -> None:
    integers, scales, minima = case(kind, seed, rows, blocks, groups=1 if blocks == 1 else 2)
    packed = pack(kind, integers, scales, minima)
    assert packed.dtype == np.uint8
    assert packed.shape == (rows, blocks * kind.bytes)
    spread = 32 * blocks // scales.shape[1]
    wanted = integers * np.repeat(scales, spread, 1).astype(np.float64)
    if minima is not None:
        wanted = wanted + np.repeat(minima, spread, 1)
    assert np.array_equal(slow(kind, packed, 32 * blocks), wanted)
    again, halves, lowest = unpack(packed, 32 * blocks)
    assert np.array_equal(again, integers)
    assert np.array_equal(halves, np.repeat(scales, blocks // scales.shape[1], 1))
    assert (lowest is None) == (minima is None)
    assert minima is None or np.array_equal(lowest, np.repeat(minima, blocks // scales.shape[1], 1))


@KINDS
@pytest.mark.parametrize("seed", range(8))
def test_the_format_s_own_package_decodes_the_same_float32(kind: Type, seed: int) -> None:
    gguf = pytest.importorskip("gguf")
    integers, scales, minima = case(kind, seed)
    found = gguf.quants.dequantize(pack(kind, integers, scales, minima), gguf.GGMLQuantizationType[kind.name])
    wanted = integers.astype(np.float32) * np.repeat(scales, 64, 1)
    if minima is not None:
        wanted = wanted + np.repeat(minima, 64, 1)
    assert found.dtype == np.float32
    assert np.array_equal(found, wanted)


def test_types_are_those_of_the_format_s_own_package() -> None:
    gguf = pytest.importorskip("gguf")
    for kind in (_gguf.F32, _gguf.F16, *_gguf.INTEGERS):
        theirs = gguf.GGMLQuantizationType[kind.name]
        assert (kind.number, (kind.length, kind.bytes)) == (theirs, gguf.GGML_QUANT_SIZES[theirs])


@pytest.mark.parametrize(
    ("low", "high", "minimum", "name"),
    [
        (-7, 7, False, "Q4_0"), (-8, 7, False, "Q4_0"), (-1, 8, False, "Q5_0"), (-16, 15, False, "Q5_0"),
        (-127, 127, False, "Q8_0"), (-129, 0, False, None), (0, 0, False, "Q4_0"), (0, 15, True, "Q4_1"),
        (0, 31, True, "Q5_1"), (0, 32, True, None), (-3, 12, True, "Q4_1"),
    ],
)  # fmt: skip
def test_the_smallest_type_that_holds_the_integers(low: int, high: int, minimum: bool, name: str) -> None:
    found = _gguf.fitting(low, high, minimum)
    assert (found.name if found else None) == name


@pytest.mark.parametrize(
    ("integers", "scales", "word"),
    [
        (np.full((1, 32), 8), np.ones((1, 1)), "from -8 to 7, got 8 to 8"),
        (np.full((1, 32), -9), np.ones((1, 1)), "got -9"),
        (np.zeros((1, 40)), np.ones((1, 1)), "multiples of 32 inputs in a GGUF, got 40 inputs in 1 groups"),
        (np.zeros((2, 64)), np.ones((2, 4)), "64 inputs in 4 groups"),
        (np.zeros((2, 96)), np.ones((2, 2)), "96 inputs in 2 groups"),
        (np.zeros((2, 0)), np.ones((2, 1)), "0 inputs"),
        (np.zeros((1, 32)), np.full((1, 1), 0.1), "half-precision numbers, got finer ones"),
        (np.zeros((1, 32)), np.full((1, 1), 1e5), "at most 65504, got 1e"),
        (np.zeros((1, 32)), np.full((1, 1), np.nan), "half-precision"),
    ],
)
def test_what_a_block_cannot_hold_is_refused(integers: Any, scales: Any, word: str) -> None:
    with pytest.raises(ModelError, match=word):
        pack(_gguf.Q4_0, integers.astype(np.int8), scales.astype(np.float32))


def test_minima_belong_to_types_that_have_them() -> None:
    integers, scales, minima = case(_gguf.Q4_1, 0)
    with pytest.raises(ModelError, match="scales and minima"):
        pack(_gguf.Q4_1, integers, scales)
    with pytest.raises(ModelError, match="scales alone"):
        pack(_gguf.Q8_0, integers, scales, minima)


def test_strides_do_not_matter() -> None:
    integers, scales, _ = case(_gguf.Q4_0, 5, rows=32, blocks=1, groups=1)
    turned = np.ascontiguousarray(integers.T).T
    assert not turned.flags["C_CONTIGUOUS"]
    assert np.array_equal(pack(_gguf.Q4_0, turned, scales), pack(_gguf.Q4_0, integers, scales))


def test_rows_of_no_type_are_refused() -> None:
    for shape, columns in (((2, 19), 32), ((2, 18), 40), ((2, 0), 0)):
        with pytest.raises(ModelError, match="whole blocks of a known type"):
            unpack(np.zeros(shape, np.uint8), columns)


def test_halves() -> None:
    values = np.array([1.0, 0.1, 65504.0, 1e-9], np.float32)
    assert np.array_equal(_gguf.halved(values), values.astype(np.float16).astype(np.float32))
    assert _gguf.lossless_half(np.array([0.5, -2048.0], np.float32))
    assert not _gguf.lossless_half(np.array([0.1], np.float32))
    assert not _gguf.lossless_half(np.array([1e5], np.float32))


METADATA: dict[str, _gguf.Value] = {
    "general.architecture": "llama", "a.count": 7, "a.ratio": 0.5, "a.yes": True, "a.no": False, "a.none": [],
    "a.words": ["", "ä ", "x"], "a.kinds": [1, -2, 3], "a.parts": [0.25, 2.0],
}  # fmt: skip


def tensors() -> list[Tensor]:
    integers, scales, _ = case(_gguf.Q8_0, 3)
    floats = np.arange(15, dtype=np.float32).reshape(3, 5)
    return [
        Tensor("floats", _gguf.F32, (3, 5), lambda: _gguf.plain(_gguf.F32, floats)),
        Tensor("halves", _gguf.F16, (5, 3), lambda: _gguf.plain(_gguf.F16, floats.T)),
        Tensor("packed", _gguf.Q8_0, (3, 128), lambda: pack(_gguf.Q8_0, integers, scales)),
    ]


def test_a_file_comes_back_through_the_format_s_own_reader(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    _gguf.write(tmp_path / "m.gguf", METADATA, tensors())
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    for key, value in METADATA.items():
        assert value == [] or reader.fields[key].contents() == value, key
    wanted = tensors()
    assert [t.name for t in reader.tensors] == [t.name for t in wanted]
    for theirs, ours in zip(reader.tensors, wanted, strict=True):
        assert tuple(theirs.shape)[::-1] == ours.shape
        assert theirs.data.tobytes() == ours.make().tobytes()
        assert theirs.n_bytes == ours.bytes
        assert theirs.data_offset % 32 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").stat().st_size % 32 == 0


def test_equal_contents_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        _gguf.write(tmp_path / name, METADATA, tensors())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_file_comes_whole_or_not_at_all(tmp_path: Path) -> None:
    def fails() -> Any:
        raise OSError("no room")

    (tmp_path / "m.gguf").write_text("old")
    for make, error in ((fails, OSError), (lambda: np.zeros(3), ModelError)):
        with pytest.raises(error):
            _gguf.write(tmp_path / "m.gguf", {}, [*tensors(), Tensor("last", _gguf.F32, (2, 2), make)])
        assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
        assert (tmp_path / "m.gguf").read_text() == "old"


@pytest.mark.parametrize(
    ("names", "shape", "word"),
    [(("a", "a"), (4, 32), "different names"), (("a", "b"), (4, 33), "whole blocks")],
)
def test_a_file_that_no_reader_takes_is_not_written(
    tmp_path: Path, names: tuple[str, ...], shape: tuple[int, ...], word: str
) -> None:
    with pytest.raises(ModelError, match=word):
        _gguf.write(tmp_path / "m", {}, [Tensor(name, _gguf.Q4_0, shape, lambda: 1) for name in names])
    assert not list(tmp_path.iterdir())
