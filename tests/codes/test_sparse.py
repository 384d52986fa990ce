"""Sparse weights against sorting and counting, one entry at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codes import slow
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.codes import integer, sparse
from flyweight.codes._sparsity import Pattern, packed, unpacked
from flyweight.codes.sparse import Options
from flyweight.errors import ArtifactError, UsageError
from flyweight.testing.conformance import check_code, failures

pytestmark = pytest.mark.usefixtures("one_thread")

MORE = (
    Options(score="magnitude", bits=2),
    Options(pattern="1:4", sparsity=0.75, bits=6),
    Options(pattern="4:8", group="tensor"),
    Options(pattern="1x4", sparsity=0.25, bits=3, group=32, scale="float16"),
)
PATTERNS = ("row", "tensor", "2:4", "1:2", "2x3", "4x1")


def kept_by_hand(scores: torch.Tensor, pattern: str, sparsity: float) -> list[list[bool]]:
    """What stays, by sorting lists; of equals the first."""
    rows, columns = scores.shape
    high, wide = (int(n) for n in pattern.split("x")) if "x" in pattern else (1, 1)
    sums = {
        (r, c): sum(float(scores[r * high + i, c * wide + j]) for i in range(high) for j in range(wide))
        for r in range(rows // high)
        for c in range(columns // wide)
    }
    rivals = [sorted(sums)]
    if pattern == "row":
        rivals = [[place for place in sorted(sums) if place[0] == r] for r in range(rows)]
    share = 1 - sparsity
    if ":" in pattern:
        some, each = (int(n) for n in pattern.split(":"))
        places = sorted(sums)
        rivals, share = [places[at : at + each] for at in range(0, len(places), each)], some / each
    stay = {
        place
        for group in rivals
        for place in sorted(group, key=lambda p: -sums[p])[
            : max(1, len(group) - round((1 - share) * len(group)))
        ]
    }
    return [[(r // high, c // wide) in stay for c in range(columns)] for r in range(rows)]


@given(
    st.sampled_from(PATTERNS), st.sampled_from([0.3, 0.5, 0.9]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_what_stays_is_what_is_largest(name: str, sparsity: float, high: int, wide: int, seed: int) -> None:
    scores = torch.randint(
        0, 20, (4 * high, 12 * wide), generator=torch.Generator().manual_seed(seed)
    ).double()
    pattern = Pattern(name, sparsity)
    mask = pattern.choose(scores)
    assert pattern.spread(mask).tolist() == kept_by_hand(scores, name, sparsity)
    assert int(mask.sum()) == pattern.kept(*scores.shape)
    assert torch.equal(pattern.joined(pattern.cut(scores)), scores)
    assert torch.equal(unpacked(packed(mask), mask.shape[1]), mask)


@pytest.mark.parametrize("options", MORE, ids=str)
def test_settings_that_are_no_levels_keep_the_contract_too(options: Options) -> None:
    assert not failures(check_code("sparse", [options]))


def test_scores_are_of_magnitude_or_of_what_inputs_make_of_it() -> None:
    weight = torch.tensor([[3.0, -2.0, 1.0, 0.5], [1.0, 1.5, -4.0, 0.1]])
    energy = torch.tensor([0.01, 1.0, 1.0, 100.0])
    for score, wanted in (
        ("magnitude", [[1, 1, 0, 0], [0, 1, 1, 0]]),
        ("energy", [[0, 1, 0, 1], [0, 0, 1, 1]]),
    ):
        grid = sparse.fit(weight, Options(score=score), energy)
        assert grid.mask is not None
        wanted_mask = torch.tensor(wanted) > 0
        if score == "energy":  # |W| times the root of the energy: 0.3, 2, 1, 5 and 0.1, 1.5, 4, 1
            wanted_mask = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 0]]) > 0
        assert torch.equal(grid.mask, wanted_mask)


def test_bytes_by_hand_and_values_by_hand() -> None:
    weight = torch.arange(1.0, 33.0).view(2, 16) * torch.tensor([1.0, -1.0]).repeat(16).view(2, 16)
    options = Options(pattern="tensor", sparsity=0.75, bits=4)
    grid = sparse.fit(weight, options)
    integers = grid.nearest(weight)
    stored = sparse.store(integers, grid, options)
    assert [int(v) for v in stored["mask"].flatten()] == [0, 0, 0, 255]
    kept = integers[1, 8:].tolist()
    assert bytes(stored["integers"][0].tolist()) == slow.bits_of(kept, 4)
    assert sparse.nbytes(2, 16, options) == 4 + 4 + 2 * 4
    values = grid.values(integers)
    assert torch.equal(values[0], torch.zeros(16))
    assert torch.allclose(values[1, 8:], weight[1, 8:], atol=32 / 7 / 2 + 0.5)


def test_wide_values_are_as_exact_as_half_floats() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    grid = sparse.fit(weight, Options())
    assert grid.mask is not None
    error = (grid.values(grid.nearest(weight)) - weight)[grid.mask]
    assert float(error.norm()) < float((weight - weight.half().float())[grid.mask].norm())
    assert float(grid.scales.max()) * grid.high > 3.9 * float(weight.abs().max())


def test_narrow_values_have_the_scales_of_the_integer_code() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    options = Options(bits=4, group=32, scale="float16")
    grid = sparse.fit(weight, options)
    wanted = integer.fit(weight * grid.mask, integer.Options(bits=4, group=32, scale="float16"))
    assert torch.equal(grid.scales, wanted.scales)


@pytest.mark.parametrize(
    ("given_options", "match"),
    [
        ({"sparsity": 0.0}, r"sparsity must be in \(0, 1\)"),
        ({"sparsity": 1.0}, r"sparsity must be in \(0, 1\)"),
        ({"sparsity": float("nan")}, r"sparsity must be in \(0, 1\)"),
        ({"pattern": "2:4", "sparsity": 0.6}, r"sparsity must be 0.5 with 2:4"),
        ({"pattern": "4:4"}, r"sparsity must be 0 with 4:4"),
        ({"pattern": "0x4"}, r"pattern must be"),
        ({"pattern": "any"}, r"pattern must be"),
        ({"bits": 7}, r"bits must be one of"),
        ({"score": "taylor"}, r"score must be one of"),
        ({"scale": "float16"}, r"scale must be float32 with 16 bits"),
    ],
)
def test_options_out_of_range_are_refused(given_options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Options(**given_options)


def test_shapes_that_do_not_divide_are_refused() -> None:
    assert "do not divide into 16x16" in str(sparse.refuse(24, 64, Options(pattern="16x16")))
    assert "do not divide into 2:4" in str(sparse.refuse(24, 66, Options(pattern="2:4")))


def test_what_is_not_of_the_pattern_is_not_stored_or_read() -> None:
    weight, options = torch.randn(4, 16, generator=torch.Generator().manual_seed(2)), Options(bits=8)
    grid = sparse.fit(weight, options)
    integers = grid.nearest(weight)
    with pytest.raises(UsageError, match="what does not stay must be 0"):
        sparse.store(torch.ones_like(integers), grid, options)
    with pytest.raises(UsageError, match="a mask must be row"):
        sparse.store(integers * 0, sparse.fit(weight, Options(sparsity=0.25)), options)
    stored = sparse.store(integers, grid, options)
    stored["mask"] = torch.full_like(stored["mask"], 255)
    with pytest.raises(ArtifactError, match="a mask must keep 32 blocks, got 64"):
        sparse.restore(stored, 16, options)
