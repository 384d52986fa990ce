"""The choice of what stays: never worse than scores of single entries here, and best of all where all can be tried."""

from __future__ import annotations

import itertools

import pytest
import torch
from roundings.samples import ROUNDINGS, gram, output_errors, random, seen, symmetric

from flyweight.codes import Grid, sparse
from flyweight.discover import method
from flyweight.errors import DataError, ModelError, UsageError
from flyweight.roundings import Seen, alternating, coordinate, pick_parts
from flyweight.roundings.alternating import Options

pytestmark = pytest.mark.usefixtures("one_thread")
INPUTS = 32


def weights(rows: int = 8, inputs: int = INPUTS, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=random(seed))


def error(integers: torch.Tensor, grid: Grid, weight: torch.Tensor, matrix: torch.Tensor) -> float:
    return float(output_errors(integers, grid, weight, matrix).sum())


@pytest.mark.parametrize("name", [*ROUNDINGS, "alternating"])
@pytest.mark.parametrize("pattern", ["row", "2:4", "4x2"])
@pytest.mark.parametrize("bits", [16, 4])
def test_every_rounding_keeps_zeros_where_the_mask_has_them(name: str, pattern: str, bits: int) -> None:
    weight, matrix, rounding = weights(), gram(INPUTS), method("roundings", name)
    options = sparse.Options(pattern=pattern, bits=bits)
    grid = sparse.fit(weight, options, matrix.diagonal())
    integers, found = rounding.pick(weight, grid, seen(matrix), rounding.Options())
    stored = sparse.store(integers, found := sparse.storable(found, options), options)
    back, again = sparse.restore(stored, INPUTS, options)
    assert torch.equal(back, integers)
    assert torch.equal(again.values(back), found.values(integers))
    assert int((integers != 0).sum()) <= weight.numel() // 2
    nearest = error(grid.nearest(weight), grid, weight, matrix)
    if name not in ("nearest", "half_quadratic"):
        assert error(integers, found, weight, matrix) < nearest


@pytest.mark.parametrize("pattern", ["row", "tensor", "2:4", "4x1"])
def test_choosing_together_beats_scores(pattern: str) -> None:
    errors = [0.0, 0.0]
    for seed in range(4):
        weight, matrix = weights(seed=seed), gram(INPUTS, seed=seed)
        grid = sparse.fit(weight, sparse.Options(pattern=pattern), matrix.diagonal())
        for at, rounding in enumerate((coordinate, alternating)):
            found = rounding.pick(weight, grid, seen(matrix), rounding.Options())
            errors[at] += error(*found, weight, matrix)
    assert errors[1] < 0.9 * errors[0]


def test_near_the_best_of_all_masks() -> None:
    total = least = scored = 0.0
    for seed in range(5):
        weight, matrix = weights(1, 8, seed), gram(8, seed=seed).double()
        options = Options(turns=100)
        mask, _ = alternating.chosen(weight, matrix.float(), sparse.Options().keep, options)
        scores = sparse.fit(weight, sparse.Options(), matrix.diagonal().float()).mask
        assert scores is not None
        costs = {}
        for places in itertools.combinations(range(8), 4):
            at = torch.tensor(places)
            solved = torch.linalg.solve(matrix[at][:, at], matrix[at] @ weight[0].double())
            change = weight[0].double().clone()
            change[at] -= solved
            costs[places] = float(change @ matrix @ change)
        least += min(costs.values())
        total += costs[tuple(mask[0].nonzero()[:, 0].tolist())]
        scored += costs[tuple(scores[0].nonzero()[:, 0].tolist())]
    assert least <= total < 1.2 * least + 0.2 * (scored - least)


def test_scales_follow_what_stays() -> None:
    weight, matrix = weights(), gram(INPUTS)
    grid = sparse.fit(weight, sparse.Options(bits=4, group=16), matrix.diagonal())
    _, found = alternating.pick(weight, grid, seen(matrix), Options())
    assert not torch.equal(found.scales, grid.scales)
    shared = sparse.fit(weight, sparse.Options(bits=4, group="tensor"), matrix.diagonal())
    _, found = alternating.pick(weight, shared, seen(matrix), Options())
    assert torch.equal(found.scales, shared.scales)


def test_inputs_that_are_always_zero() -> None:
    weight, matrix = weights(), gram(INPUTS)
    matrix[3], matrix[:, 3] = 0, 0
    grid = sparse.fit(weight, sparse.Options(), matrix.diagonal())
    for one in (matrix, torch.zeros_like(matrix)):
        integers, found = alternating.pick(weight, grid, seen(one), Options())
        assert torch.isfinite(found.values(integers)).all()
        sparse.store(integers, found, sparse.Options())


def test_parts_that_read_different_inputs() -> None:
    weight = weights()
    grid = sparse.fit(weight, sparse.Options(), torch.ones(INPUTS))
    both = [seen(gram(INPUTS, seed=seed)) for seed in (0, 1)]
    integers, found = pick_parts(alternating.pick, weight, grid, both, Options())
    alone, own = alternating.pick(weight[4:], sparse.fit(weight[4:], sparse.Options()), both[1], Options())
    assert torch.equal(found.values(integers)[4:] == 0, own.values(alone) == 0)
    sparse.store(integers, found, sparse.Options())


def test_bad_input_is_refused() -> None:
    weight, matrix = weights(), gram(INPUTS)
    grid = sparse.fit(weight, sparse.Options(), None)
    with pytest.raises(UsageError, match="alternating chooses what becomes zero"):
        alternating.pick(weight, symmetric(weight), seen(matrix), Options())
    with pytest.raises(DataError, match="must be known"):
        alternating.pick(weight, grid, Seen(), Options())
    with pytest.raises(ModelError, match="weights must be finite"):
        alternating.pick(weight * float("nan"), grid, seen(matrix), Options())
    for wrong in ({"turns": 1}, {"sweeps": 0}, {"damping": -1.0}, {"drift": 2.0}):
        with pytest.raises(UsageError):
            Options(**wrong)  # type: ignore[arg-type]
