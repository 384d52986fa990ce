"""Packed integers, bit by bit."""

from __future__ import annotations

import pytest
import torch
from codes.slow import bits_of, trits_of
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.codes._packing import pack, pack_ternary, packed_width, ternary_width, unpack, unpack_ternary


@st.composite
def integers(draw: st.DrawFn) -> tuple[torch.Tensor, int, bool]:
    bits, signed = draw(st.integers(1, 8)), draw(st.booleans())
    low = -(2 ** (bits - 1)) if signed else 0
    entry = st.integers(low, low + 2**bits - 1)
    columns = draw(st.integers(1, 40))
    rows = draw(st.lists(st.lists(entry, min_size=columns, max_size=columns), min_size=1, max_size=3))
    return torch.tensor(rows, dtype=torch.int16), bits, signed


@given(integers())
@settings(max_examples=200, deadline=None)
def test_bits_lie_as_said_and_come_back(given: tuple[torch.Tensor, int, bool]) -> None:
    numbers, bits, signed = given
    packed = pack(numbers, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(numbers), packed_width(numbers.shape[1], bits))
    assert [bytes(row) for row in packed.tolist()] == [bits_of(row, bits) for row in numbers.tolist()]
    assert torch.equal(unpack(packed, bits, numbers.shape[1], signed), numbers)


@given(
    st.lists(st.lists(st.integers(-1, 1), min_size=13, max_size=13), min_size=1, max_size=4),
    st.integers(1, 13),
)
@settings(max_examples=100, deadline=None)
def test_ternary_digits_lie_as_said_and_come_back(rows: list[list[int]], columns: int) -> None:
    numbers = torch.tensor(rows, dtype=torch.int16)[:, :columns]
    packed = pack_ternary(numbers)
    assert packed.shape == (len(rows), ternary_width(columns))
    assert [bytes(row) for row in packed.tolist()] == [trits_of(row[:columns]) for row in rows]
    assert torch.equal(unpack_ternary(packed, columns), numbers)


@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_4_bits_lie_as_the_runtimes_have_them(columns: int) -> None:
    numbers = torch.randint(-8, 8, (5, columns), generator=torch.Generator().manual_seed(0))
    halves = torch.nn.functional.pad(numbers & 15, (0, columns % 2))
    assert torch.equal(pack(numbers, 4), (halves[:, 0::2] + 16 * halves[:, 1::2]).to(torch.uint8))


def test_8_bits_are_bytes() -> None:
    numbers = torch.arange(-128, 128).view(2, 128)
    assert torch.equal(pack(numbers, 8).view(torch.int8), numbers.to(torch.int8))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64])
def test_any_integers_that_do_not_lie_together_are_packed(dtype: torch.dtype) -> None:
    numbers = torch.randint(-4, 4, (9, 14), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(pack(numbers.t()[::2], 3), pack(numbers.t()[::2].contiguous(), 3))
    assert torch.equal(unpack(pack(numbers.t(), 3), 3, 9, signed=True), numbers.t().to(torch.int16))
