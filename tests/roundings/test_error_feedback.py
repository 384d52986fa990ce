"""Error feedback against the textbook: in float64, one column after the other, the Hessian of what remains inverted anew."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from roundings.samples import (
    KINDS,
    asymmetric,
    decoded,
    gram,
    grids,
    output_errors,
    points,
    random,
    seen,
    symmetric,
)

from flyweight.codes import Grid
from flyweight.errors import DataError, UsageError
from flyweight.roundings import Seen, error_feedback
from flyweight.roundings.error_feedback import Options

pytestmark = pytest.mark.usefixtures("one_thread")
CLEAR = 1e-3
"""Of a step of the grid: nearer to a tie, float32 may decide otherwise than float64."""


def textbook(
    weight: torch.Tensor, grid: Grid, matrix: torch.Tensor, act_order: bool, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers (O, I), and which rows never came near a tie (O,)."""
    diagonal = matrix.diagonal().double()
    dead = diagonal == 0
    hessian = matrix.double() + torch.diag(damping * diagonal[~dead].mean() + dead.double())
    left = (
        sorted(range(len(hessian)), key=lambda k: -float(diagonal[k]))
        if act_order
        else list(range(len(hessian)))
    )
    work, integers = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.int16)
    clear = torch.ones(len(weight), dtype=torch.bool)
    while left:
        k, inverse = left[0], torch.linalg.inv(hessian[left][:, left])
        choices = points(grid, k)
        apart = (choices - work[:, k, None]).abs()
        two = apart.sort(1).values[:, :2]
        clear &= two[:, 1] - two[:, 0] > CLEAR * grid.scales[:, k // grid.group].abs()
        best = apart.argmin(1)
        integers[:, k] = (best + grid.low).to(torch.int16)
        error = (work[:, k] - choices.gather(1, best[:, None])[:, 0]) / inverse[0, 0]
        work[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return integers, clear


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dead", [False, True])
def test_it_is_the_textbook(kind: str, act_order: bool, dead: bool) -> None:
    weight, matrix = torch.randn(64, 24, generator=random(5)), gram(24)
    if dead:
        matrix[7], matrix[:, 7] = 0, 0
    grid = grids(weight * 0.8, 8)[kind]
    expected, clear = textbook(weight, grid, matrix, act_order, 0.01)
    assert clear.double().mean() > 0.8
    simple = grid.nearest(weight)
    worse = output_errors(simple, grid, weight, matrix) < output_errors(expected, grid, weight, matrix)
    expected[worse] = simple[worse]
    found, same = error_feedback.pick(weight, grid, seen(matrix), Options(act_order=act_order))
    assert same is grid
    assert torch.equal(found[clear], expected[clear])
    ours, theirs = (output_errors(q, grid, weight, matrix).sum() for q in (found, expected))
    assert float(ours) == pytest.approx(float(theirs), rel=0.01)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, matrix = torch.randn(8, 300, generator=random(6)), gram(300, count=600)
    grid = symmetric(weight, 4, 100)
    found = {}
    for block in (1, 7, 128, 1000):
        monkeypatch.setattr(error_feedback, "_BLOCK", block)
        integers, _ = error_feedback.pick(weight, grid, seen(matrix), Options())
        found[block] = integers
    assert all((one == found[1]).double().mean() > 0.97 for one in found.values())
    errors = [float(output_errors(one, grid, weight, matrix).sum()) for one in found.values()]
    assert max(errors) < 1.02 * min(errors)


@settings(deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([1, 4]), st.integers(1, 4), st.booleans(),
    st.sampled_from([0.0, 0.01, 1.0]), st.sampled_from([1, 3, 100]),
)  # fmt: skip
def test_no_row_is_worse_than_nearest(
    seed: int, kind: str, group: int, groups: int, act_order: bool, damping: float, count: int
) -> None:
    inputs = group * groups
    weight, matrix = torch.randn(4, inputs, generator=random(seed)), gram(inputs, count, seed)
    grid = grids(weight * 0.8, group)[kind]
    found, _ = error_feedback.pick(weight, grid, seen(matrix), Options(act_order=act_order, damping=damping))
    ours, theirs = (output_errors(q, grid, weight, matrix) for q in (found, grid.nearest(weight)))
    assert (ours <= theirs * (1 + 1e-4) + 1e-6 * float(weight.square().sum() * matrix.trace())).all()


def test_it_is_much_better_than_nearest_where_inputs_go_together() -> None:
    weight, matrix = torch.randn(32, 128, generator=random(7)), gram(128, count=512)
    grid = asymmetric(weight, 4, 32)
    errors = {
        act_order: float(
            output_errors(
                error_feedback.pick(weight, grid, seen(matrix), Options(act_order=act_order))[0],
                grid,
                weight,
                matrix,
            ).sum()
        )
        for act_order in (False, True)
    }
    simple = float(output_errors(grid.nearest(weight), grid, weight, matrix).sum())
    assert errors[True] < errors[False] < 0.8 * simple


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    weight, matrix = torch.randn(8, 16, generator=random(8)), gram(16)
    dead = [2, 9]
    matrix[dead], matrix[:, dead] = 0, 0
    grid = symmetric(weight)
    found, _ = error_feedback.pick(weight, grid, seen(matrix), Options())
    assert torch.equal(found[:, dead], grid.nearest(weight)[:, dead])
    assert not torch.equal(found, grid.nearest(weight))
    found, _ = error_feedback.pick(weight, grid, seen(torch.zeros(16, 16)), Options())
    assert torch.equal(found, grid.nearest(weight))


def drifted(count: int = 400, inputs: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Original inputs and those of a model whose earlier layers were changed, (n, I) each."""
    found = random(9)
    before = torch.randn(count, inputs, generator=found) @ torch.randn(inputs, inputs, generator=found)
    change = torch.eye(inputs) + 0.1 * torch.randn(inputs, inputs, generator=found)
    return before, before @ change


@pytest.mark.parametrize("drift", [0.3, 1.0])
def test_drift_aims_at_the_damped_least_squares_weight(drift: float) -> None:
    before, after = drifted()
    matrix, cross = after.T @ after / len(after), before.T @ after / len(after)
    weight = torch.randn(8, 16, generator=random(10))
    _, target = error_feedback.feed_back(
        weight, symmetric(weight), Seen(gram=matrix, cross=cross), Options(drift=drift, damping=0.05)
    )
    ridge = 0.05 * matrix.diagonal().mean().double() * torch.eye(16).double()
    whole = weight.double() @ (cross.double() + ridge) @ torch.linalg.inv(matrix.double() + ridge)
    assert torch.allclose(target.double(), (1 - drift) * weight + drift * whole, rtol=1e-3, atol=1e-4)


def test_drift_makes_up_for_what_earlier_layers_changed() -> None:
    before, after = drifted()
    what = Seen(gram=after.T @ after / len(after), cross=before.T @ after / len(after))
    weight = torch.randn(8, 16, generator=random(11))
    grid = symmetric(weight, 6)

    def error(drift: float) -> float:
        integers, _ = error_feedback.pick(weight, grid, what, Options(drift=drift))
        return float((before @ weight.T - after @ grid.values(integers).T).square().mean())

    assert error(1.0) < 0.5 * error(0.5) < 0.5 * error(0.0)


def test_without_drift_in_the_inputs_the_target_is_the_weight() -> None:
    weight, matrix = torch.randn(4, 8, generator=random(12)), gram(8)
    _, target = error_feedback.feed_back(
        weight, symmetric(weight), Seen(gram=matrix, cross=matrix), Options(drift=1.0)
    )
    assert torch.equal(target, weight)


def test_dead_inputs_keep_their_target_under_drift() -> None:
    weight, matrix, cross = torch.randn(4, 8, generator=random(12)), gram(8), gram(8, seed=4)
    matrix[3], matrix[:, 3] = 0, 0
    _, target = error_feedback.feed_back(
        weight, symmetric(weight), Seen(gram=matrix, cross=cross), Options(drift=1.0)
    )
    assert torch.equal(target[:, 3], weight[:, 3])


def test_without_a_cross_matrix_nothing_has_drifted() -> None:
    weight = torch.randn(4, 8, generator=random(13))
    _, target = error_feedback.feed_back(weight, symmetric(weight), seen(gram(8)), Options(drift=1.0))
    assert torch.equal(target, weight)


@pytest.mark.parametrize("cross", [torch.ones(8, 7), torch.full((8, 8), float("nan"))])
def test_a_cross_matrix_that_cannot_be_used_is_refused(cross: torch.Tensor) -> None:
    weight = torch.randn(4, 8, generator=random(13))
    with pytest.raises(DataError, match="the cross matrix of original and new inputs must"):
        error_feedback.pick(weight, symmetric(weight), Seen(gram=gram(8), cross=cross), Options(drift=0.5))


@pytest.mark.parametrize(
    "wrong", [{"damping": -0.1}, {"damping": 1.5}, {"drift": -1}, {"drift": 1.1}, {"damping": float("nan")}]
)
def test_options_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"must be in \[0, 1\]"):
        Options(**wrong)


def test_the_reference_decodes_as_the_grid_does() -> None:
    weight = torch.randn(4, 8, generator=random(13))
    for grid in grids(weight, 4).values():
        integers = grid.nearest(weight)
        assert torch.allclose(decoded(integers, grid).float(), grid.values(integers), rtol=1e-6, atol=1e-7)
