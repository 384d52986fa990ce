"""The entropy code against entries counted one at a time, and against what information theory promises of it."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.codes import Grid, entropy
from flyweight.codes.entropy import Options, file_bits
from flyweight.errors import ArtifactError, UsageError
from flyweight.testing.conformance import check_code, failures

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def slow(
    weight: torch.Tensor, step: float, energy: list[float] | None = None
) -> tuple[float, list[float], list[list[int]]]:
    """Scale, factors and integers by the definition, in Python's own numbers; nothing rounded as it is stored."""
    rows = weight.double().tolist()
    roots = [math.sqrt(math.fsum(x * x for x in row) / len(row)) for row in rows]
    roots = [root for root in roots if root > 0]
    scale = step * math.prod(roots) ** (1 / len(roots))
    factors = [1.0] * len(rows[0])
    if energy is not None:
        mean = math.fsum(energy) / len(energy)
        factors = [1 / math.sqrt(e / mean + 0.01) for e in energy]
        middle = math.exp(math.fsum(map(math.log, factors)) / len(factors))
        factors = [one / middle for one in factors]
    for column in range(len(factors)):
        factors[column] = max(factors[column], max(abs(row[column]) for row in rows) / scale / 127)
    return scale, factors, [[round(x / scale / f) for x, f in zip(row, factors, strict=True)] for row in rows]


@pytest.mark.parametrize("step", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("energetic", [False, True])
@pytest.mark.parametrize("case", ["plain", "zero row", "outlier"])
def test_it_is_the_definition(step: float, energetic: bool, case: str) -> None:
    weight = normal(6, 10) * torch.tensor([1, 0.5, 3, 1, 0.1, 2])[:, None]
    if case == "zero row":
        weight[2] = 0
    if case == "outlier":
        weight[1, 3] = 500
    energy = torch.linspace(0.01, 9, 10) if energetic else None
    scale, factors, integers = slow(weight, step, None if energy is None else energy.tolist())
    grid = entropy.fit(weight, Options(step=step, scale="float32"), energy)
    assert torch.allclose(grid.scales.double(), torch.full((6, 1), scale).double(), rtol=1e-6)
    assert grid.columns is not None
    assert torch.allclose(grid.columns.double(), torch.tensor(factors).double(), rtol=2**-9)
    apart = (grid.nearest(weight) - torch.tensor(integers)).abs()
    assert (
        int(apart.max()) <= 1
    )  # factors are rounded to float16: an entry near the middle may go the other way
    assert float((apart > 0).float().mean()) < 0.1
    values = grid.values(grid.nearest(weight)).double()
    expected = grid.nearest(weight).double() * grid.scales.double() * grid.columns.double()
    assert torch.allclose(values, expected, rtol=1e-6)


@given(st.integers(0, 10**6), st.floats(1 / 64, 8), st.booleans(), st.floats(1, 1e4))
@settings(max_examples=60, deadline=None)
def test_no_entry_is_cut_off_and_none_is_further_than_half_a_step(
    seed: int, step: float, energetic: bool, outlier: float
) -> None:
    weight = normal(5, 16, seed)
    weight[seed % 5, seed % 16] *= outlier
    energy = torch.rand(16, generator=torch.Generator().manual_seed(seed)) if energetic else None
    grid = entropy.fit(weight, Options(step=step), energy)
    assert grid.columns is not None
    steps = (grid.scales * grid.columns).double()
    assert float((weight.double() / steps).abs().max()) <= 127.001
    error = (grid.values(grid.nearest(weight)).double() - weight.double()).abs()
    assert bool((error <= steps * 0.5001).all())


@pytest.mark.parametrize(("step", "bits"), [(1.0, 2.2), (0.5, 3.05), (0.25, 4.05), (0.125, 5.05)])
def test_half_the_step_is_one_bit_more(step: float, bits: float) -> None:
    weight = normal(512, 256)
    grid = entropy.fit(weight, Options(step=step))
    taken = file_bits(grid.nearest(weight)) / weight.numel()
    assert taken == pytest.approx(bits, abs=0.12)
    error = float((grid.values(grid.nearest(weight)) - weight).square().mean())
    assert error == pytest.approx(step**2 / 12, rel=0.03)


def test_one_step_for_all_channels_beats_one_for_each() -> None:
    sizes = torch.exp(torch.randn(256, 1, generator=torch.Generator().manual_seed(1)) / 2)
    weight = normal(256, 256) * sizes
    grid = entropy.fit(weight, Options(scale="float32"))
    each = replace(grid, scales=0.5 * weight.square().mean(1, keepdim=True).sqrt())
    at_three_bits = []
    for one in (grid, each):
        integers = one.nearest(weight)
        error = float((one.values(integers) - weight).square().sum())
        at_three_bits.append(error * 4 ** (file_bits(integers) / weight.numel() - 3))
    assert at_three_bits[0] < 0.9 * at_three_bits[1]


def test_file_bits_are_those_of_a_huffman_code_and_can_be_read_back() -> None:
    integers = (normal(128, 300) * 3).round().to(torch.int16)
    raw = bytes(value & 255 for column in integers.T.tolist() for value in column)
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    packed = coder.compress(raw) + coder.flush()
    assert file_bits(integers) == 8 * len(packed)
    assert zlib.decompress(packed, -15) == raw
    stored = entropy.store(
        integers, Grid(-127, 127, 300, torch.ones(128, 1), columns=torch.ones(300)), Options()
    )
    assert stored["integers"].numpy().tobytes() == raw
    counts = Counter(raw)
    least = sum(-n * math.log2(n / len(raw)) for n in counts.values())
    assert least <= file_bits(integers) <= 1.03 * least


def test_the_stored_form_by_hand() -> None:
    grid = Grid(-127, 127, 3, torch.tensor([[0.5], [2.0]]), columns=torch.tensor([1.0, 0.25, 4.0]))
    integers = torch.tensor([[1, -1, 127], [0, 5, -127]], dtype=torch.int16)
    stored = entropy.store(integers, grid, Options())
    assert stored["integers"].tolist() == [[1, 0], [-1, 5], [127, -127]]
    assert stored["integers"].numpy().tobytes() == bytes([1, 0, 255, 5, 127, 129])
    assert stored["scales"].dtype == stored["factors"].dtype == torch.float16
    assert stored["factors"].tolist() == [[1.0, 0.25, 4.0]]
    assert grid.values(integers).tolist() == [[0.5, -0.125, 254.0], [0.0, 2.5, -1016.0]]
    assert entropy.nbytes(2, 3, Options()) == 6 + 2 * 2 + 3 * 2
    assert entropy.nbytes(2, 3, Options(scale="float32")) == 6 + 2 * 4 + 3 * 2


def test_a_grid_without_factors_is_stored_with_ones() -> None:
    grid = Grid(-127, 127, 2, torch.ones(1, 1))
    integers = torch.tensor([[3, -4]], dtype=torch.int16)
    found, after = entropy.restore(entropy.store(integers, grid, Options()), 2, Options())
    assert torch.equal(found, integers)
    assert torch.equal(after.values(found), grid.values(integers))


def test_a_byte_that_no_integer_has_is_refused() -> None:
    weight = normal(4, 32)
    grid = entropy.fit(weight, Options())
    stored = entropy.store(grid.nearest(weight), grid, Options())
    stored["integers"][5, 1] = -128
    with pytest.raises(ArtifactError, match=r"stored integers must be in \[-127, 127\], got -128"):
        entropy.restore(stored, 32, Options())


def test_factors_that_cannot_be_stored_are_refused_and_made_storable() -> None:
    weight = normal(4, 32)
    grid = entropy.fit(weight, Options())
    assert grid.columns is not None
    odd = replace(grid, columns=grid.columns * 1.0003)
    with pytest.raises(UsageError, match="pass the grid through storable"):
        entropy.store(grid.nearest(weight), odd, Options())
    kept = entropy.storable(odd, Options())
    integers, back = entropy.restore(entropy.store(kept.nearest(weight), kept, Options()), 32, Options())
    assert torch.equal(integers, kept.nearest(weight))
    assert back.columns is not None
    assert kept.columns is not None
    assert torch.equal(back.columns, kept.columns)
    with pytest.raises(UsageError, match="float16"):
        entropy.storable(replace(grid, scales=grid.scales * 1e9), Options())


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4, 32),
        torch.full((4, 32), 0.3),
        torch.full((4, 32), 1e-40),
        normal(1, 32),
        normal(32, 8).T,
    ],
    ids=["zeros", "constant", "denormal", "one row", "not contiguous"],
)
def test_awkward_weights(weight: torch.Tensor) -> None:
    grid = entropy.fit(weight, Options(step=0.01 + 1 / 64))
    values = grid.values(grid.nearest(weight))
    assert torch.allclose(values, weight, atol=0.04 * float(weight.abs().max()) + 1e-30)
    assert torch.equal(values == 0, values.abs() < 1e-30)


def test_an_input_without_energy_gets_a_coarse_step_not_none() -> None:
    energy = torch.ones(64)
    energy[5] = 0
    grid = entropy.fit(normal(32, 64), Options(), energy)
    assert grid.columns is not None
    ratio = float(grid.columns[5] / grid.columns[6])
    assert ratio == pytest.approx(math.sqrt((1 / energy.mean() + 0.01) / 0.01), rel=0.01)


def test_float32_scales_keep_the_contract_too() -> None:
    assert not failures(check_code("entropy", [Options(step=0.3, scale="float32")]))


@pytest.mark.parametrize(
    "wrong", [{"step": 0}, {"step": -1}, {"step": 9}, {"step": float("nan")}, {"scale": "e8m0"}], ids=str
)
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="must be"):
        Options(**wrong)  # type: ignore[arg-type]


def test_channels_with_one_input_are_refused() -> None:
    assert "one input each" in str(entropy.refuse(5, 1, Options()))
