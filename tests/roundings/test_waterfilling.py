"""Waterfilling against the textbook in float64, and against what theory says of error, bits and importance."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from roundings.samples import KINDS, gram, grids, output_errors, random, seen
from torch import nn

from flyweight.codes import Grid, entropy, integer
from flyweight.codes.entropy import file_bits
from flyweight.errors import DataError, ModelError, UsageError
from flyweight.records import Plan, Step
from flyweight.roundings import Seen, error_feedback, pick_parts, waterfilling
from flyweight.roundings.waterfilling import Options
from flyweight.transforms import Context, QuantizedLayer, apply, plain_site

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(rows: int = 48, inputs: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=random(seed))


def fitted(weight: torch.Tensor, **options: Any) -> Grid:
    return entropy.fit(weight, entropy.Options(**options))


def pick(weight: torch.Tensor, what: Seen, **options: Any) -> tuple[torch.Tensor, Grid]:
    grid = fitted(weight, scale="float32")
    integers, found = waterfilling.pick(weight, grid, what, Options(**options))
    assert integers.dtype == torch.int16
    assert integers.shape == weight.shape
    assert -127 <= int(integers.min()) <= int(integers.max()) <= 127
    assert torch.isfinite(found.values(integers)).all()
    return integers, found


def bits(integers: torch.Tensor, halves: bool = False) -> float:
    """Bits an entry in the file, scales and factors included."""
    rows, inputs = integers.shape
    return (file_bits(integers) + 16 * ((1 if halves else 2) * rows + inputs)) / integers.numel()


def loss(integers: torch.Tensor, grid: Grid, weight: torch.Tensor, matrix: torch.Tensor) -> float:
    return float(output_errors(integers, grid, weight, matrix).sum())


def textbook(
    weight: torch.Tensor, grid: Grid, matrix: torch.Tensor, damping: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers (O, I), which rows never came near a tie (O,), and the diagonal of the inverse's factor (I,)."""
    diagonal = matrix.diagonal().double()
    hessian = matrix.double() + torch.diag((damping * diagonal.mean()).expand(len(matrix)))
    left = sorted(range(len(matrix)), key=lambda k: -float(diagonal[k]))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[left][:, left]), upper=True)
    work, integers = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.int16)
    clear, parts = torch.ones(len(weight), dtype=torch.bool), torch.zeros(len(matrix)).double()
    assert grid.columns is not None
    for at, k in enumerate(left):
        parts[k] = upper[at, at]
        steps = grid.scales[:, 0].double() * float(grid.columns[k])
        levels = work[:, k] / steps
        levels = levels / (1 + 1 / 12 / levels.square().mean())
        clear &= ((levels - levels.floor()) - 0.5).abs() > 2e-3
        integers[:, k] = levels.round().to(torch.int16)
        error = (work[:, k] - levels.round() * steps) / upper[at, at]
        work[:, left[at:]] -= error[:, None] * upper[at, at:]
    return integers, clear, parts


@pytest.mark.parametrize("level", [0.3, 2.0])
@pytest.mark.parametrize("important", [False, True])
def test_it_is_the_textbook(level: float, important: bool) -> None:
    weight, matrix = drawn(96, 16), gram(16)
    rows = torch.rand(96, generator=random(3)) if important else None
    what = Seen(gram=matrix, rows=rows)
    integers, grid = pick(weight, what, level=level, damping=0.05)
    expected, clear, parts = textbook(weight, grid, matrix, 0.05)
    assert clear.double().mean() > 0.5
    assert torch.equal(integers[clear], expected[clear])
    sizes = torch.ones(96).double() if rows is None else (rows.double() + 0.05 * rows.double().mean()).rsqrt()
    steps = grid.scales.double() * (grid.columns if grid.columns is not None else 1)
    assert torch.allclose(steps, level * sizes[:, None] * parts, rtol=2e-3)


def test_a_level_says_the_error_of_an_entry() -> None:
    weight, matrix = drawn(64, 96), gram(96, count=400)
    for level in (0.05, 0.2):
        integers, grid = pick(weight, seen(matrix), level=level, damping=0.0)
        assert loss(integers, grid, weight, matrix) == pytest.approx(weight.numel() * level**2 / 12, rel=0.05)


def test_channels_that_count_more_get_smaller_errors() -> None:
    weight, matrix = drawn(64, 96), gram(96, count=400)
    rows = torch.exp(torch.randn(64, generator=random(2)))
    integers, grid = pick(weight, Seen(gram=matrix, rows=rows), level=0.1, damping=0.0)
    counted = output_errors(integers, grid, weight, matrix) * (rows + 0.05 * rows.mean())
    assert torch.allclose(counted, torch.full((64,), 96 * 0.01 / 12).double(), rtol=0.5)
    assert float(counted.mean()) == pytest.approx(96 * 0.01 / 12, rel=0.05)


@given(st.integers(0, 10**6), st.floats(1.9, 6.5), st.sampled_from([200, 600]), st.booleans())
@settings(max_examples=15, deadline=None)
def test_bits_are_met(seed: int, wanted: float, rows: int, halves: bool) -> None:
    weight, matrix = drawn(rows, 96, seed), gram(96, 300, seed)
    grid = fitted(weight, scale="float16" if halves else "float32")
    integers, found = waterfilling.pick(weight, grid, seen(matrix), Options(bits=wanted))
    assert wanted - 0.05 < bits(integers, halves) < wanted + 0.02
    assert torch.equal(found.scales.half().float(), found.scales) or not halves


def test_without_a_wish_it_takes_the_bits_of_nearest() -> None:
    weight, matrix = drawn(256, 96), gram(96, 300)
    for step in (0.25, 1.0):
        grid = fitted(weight, step=step)
        integers, _ = waterfilling.pick(weight, grid, seen(matrix), Options())
        assert file_bits(integers) == pytest.approx(file_bits(grid.nearest(weight)), rel=0.02)


def test_at_equal_bits_it_has_at_most_half_the_error_of_groups() -> None:
    weight, matrix = drawn(256, 256), gram(256, count=1024)
    options = integer.Options(bits=3, group=32, symmetric=False, scale="float16")
    grid = integer.fit(weight, options, matrix.diagonal())
    theirs, _ = error_feedback.pick(weight, grid, seen(matrix), error_feedback.Options())
    size = 8 * integer.nbytes(256, 256, options) / weight.numel()
    ours, found = waterfilling.pick(weight, fitted(weight), seen(matrix), Options(bits=size))
    assert bits(ours, halves=True) <= size + 0.01
    assert loss(ours, found, weight, matrix) < 0.5 * loss(theirs, grid, weight, matrix)


def test_the_pull_to_zero_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, matrix = drawn(256, 128), gram(128, count=512)
    found = {}
    for pull in (waterfilling._PULL, 0.0):
        monkeypatch.setattr(waterfilling, "_PULL", pull)
        integers, grid = pick(weight, seen(matrix), bits=2.2)
        found[pull] = loss(integers, grid, weight, matrix) * 4 ** bits(integers)
    assert found[1 / 12] < 0.97 * found[0.0]


def test_nothing_given_is_changed_and_equal_calls_give_equal_answers() -> None:
    weight, matrix, rows = drawn(), gram(64), torch.rand(48)
    grid = fitted(weight)
    kept = [one.clone() for one in (weight, matrix, rows, grid.scales)]
    found = [
        waterfilling.pick(weight, grid, Seen(gram=matrix, rows=rows), Options(bits=3.5)) for _ in range(2)
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1].scales, found[1][1].scales)
    assert all(torch.equal(a, b) for a, b in zip(kept, (weight, matrix, rows, grid.scales), strict=True))
    other = [weight.T.contiguous().T, weight.double(), nn.Parameter(weight)]
    for one in other:
        again = waterfilling.pick(one, grid, Seen(gram=matrix, rows=rows), Options(bits=3.5))[0]
        assert torch.equal(again, found[0][0])


@pytest.mark.parametrize("factor", [2.0**-20, 4.0])
def test_units_of_weight_and_inputs_do_not_matter_to_the_bits(factor: float) -> None:
    weight, matrix = drawn(), gram(64)
    first, before = pick(weight, seen(matrix), bits=4)
    second, after = pick(weight * factor, seen(matrix * 2.0**30), bits=4)
    assert torch.equal(first, second)
    assert torch.allclose(before.scales * factor, after.scales, rtol=1e-5)


@pytest.mark.parametrize("case", ["zero rows", "constant", "outlier", "one row", "one column", "two inputs"])
@pytest.mark.parametrize("options", [{"bits": 3.0}, {"level": 0.5}, {}], ids=str)
def test_awkward_weights(case: str, options: dict[str, float]) -> None:
    weight = drawn()
    if case == "zero rows":
        weight[::2] = 0
    elif case == "constant":
        weight = torch.full((48, 64), 0.3)
    elif case == "outlier":
        weight[2, 5] = 1e4
    elif case == "one row":
        weight = weight[:1]
    elif case in ("one column", "two inputs"):
        weight = weight[:, : 1 if case == "one column" else 2]
    grid = Grid(
        -127, 127, weight.shape[1], torch.full((len(weight), 1), 0.3), columns=torch.ones(weight.shape[1])
    )
    integers, found = waterfilling.pick(weight, grid, seen(gram(weight.shape[1])), Options(**options))
    values = found.values(integers)
    assert not bool(values[(weight == 0).all(1)].any())
    assert torch.isfinite(values).all()
    if case == "outlier":
        assert float(values[2, 5]) == pytest.approx(1e4, rel=0.05)


def test_a_weight_of_zeros_and_inputs_of_zeros_are_rounded_to_nearest() -> None:
    for weight, matrix in ((torch.zeros(8, 16), gram(16)), (drawn(8, 16), torch.zeros(16, 16))):
        grid = fitted(weight)
        integers, same = waterfilling.pick(weight, grid, seen(matrix), Options(bits=3))
        assert same is grid
        assert torch.equal(integers, grid.nearest(weight))


def test_dead_inputs_get_the_coarsest_step() -> None:
    weight, matrix = drawn(), gram(64)
    dead = [2, 9]
    matrix[dead], matrix[:, dead] = 0, 0
    integers, grid = pick(weight, seen(matrix), level=0.2)
    assert grid.columns is not None
    assert float(grid.columns[2]) == float(grid.columns[9]) == float(grid.columns.max())
    assert torch.equal(integers[:, 2], _pulled(weight, grid, 2))


def test_a_channel_beyond_the_largest_integer_leaves_the_others_their_steps() -> None:
    weight = drawn(rows=256, inputs=64)
    what = seen(gram(64))
    level = 0.02 * float(weight.std())
    _, plain = pick(weight, what, level=level)
    weight[7] *= 50
    integers, grid = pick(weight, what, level=level)
    others = torch.arange(256) != 7
    assert torch.equal(grid.columns, plain.columns)
    assert torch.equal(grid.scales[others], plain.scales[others])
    assert grid.scales[7] > plain.scales[7]
    assert int(integers.abs().max()) <= entropy.LIMIT


def _pulled(weight: torch.Tensor, grid: Grid, column: int) -> torch.Tensor:
    """A column that takes over nothing from the others."""
    assert grid.columns is not None
    levels = weight[:, column] / (grid.scales[:, 0] * grid.columns[column])
    return (levels / (1 + 1 / 12 / levels.square().mean())).round().to(torch.int16)


@pytest.mark.parametrize(
    "case", ["one sample", "two inputs alike", "huge", "tiny", "not positive", "one large"]
)
def test_awkward_inputs(case: str) -> None:
    weight, matrix = drawn(), gram(64)
    if case == "one sample":
        matrix = gram(64, count=1)
    elif case == "two inputs alike":
        matrix[3] = matrix[4]
        matrix[:, 3] = matrix[:, 4]
    elif case in ("huge", "tiny"):
        matrix = matrix * (1e30 if case == "huge" else 1e-30)
    elif case == "one large":
        matrix[7], matrix[:, 7] = matrix[7] * 1e3, matrix[:, 7] * 1e3
    else:
        matrix = matrix - 2 * matrix.diagonal().min() * torch.eye(64)
    integers, _ = pick(weight, seen(matrix), bits=4.0)
    assert bits(integers) < 4.05


def test_importances_of_zero_say_nothing() -> None:
    weight, matrix = drawn(), gram(64)
    plain = pick(weight, seen(matrix), level=0.3)
    none = pick(weight, Seen(gram=matrix, rows=torch.zeros(48)), level=0.3)
    assert torch.equal(plain[0], none[0])


@pytest.mark.parametrize("rows", [torch.ones(47), -torch.ones(48), torch.full((48,), float("nan"))])
def test_importances_that_cannot_be_used_are_refused(rows: torch.Tensor) -> None:
    with pytest.raises(DataError, match="the importance of output channels must be"):
        pick(drawn(), Seen(gram=gram(64), rows=rows))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "columns"])
def test_grids_of_other_codes_are_refused(kind: str) -> None:
    weight = drawn()
    with pytest.raises(UsageError, match="take the code entropy, or the rounding error_feedback"):
        waterfilling.pick(weight, grids(weight, 4)[kind], seen(gram(64)), Options())


def test_what_was_seen_and_the_weight_are_checked() -> None:
    weight = drawn()
    with pytest.raises(DataError, match="the Gram matrix of the inputs must be known"):
        pick(weight, Seen())
    with pytest.raises(DataError, match=r"must have the shape \(64, 64\), got \(63, 63\)"):
        pick(weight, seen(gram(63)))
    grid = fitted(weight)
    weight[1, 2] = float("nan")
    with pytest.raises(ModelError, match="weights must be finite, got 1 of 3072 values"):
        waterfilling.pick(weight, grid, seen(gram(64)), Options())


@pytest.mark.parametrize(
    "wrong",
    [{"bits": 1}, {"bits": 8}, {"level": 0}, {"level": float("inf")}, {"bits": 3, "level": 1.0}, {"damping": 2},
     {"drift": -1}, {"bits": float("nan")}],
    ids=str,
)  # fmt: skip
def test_options_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="must be"):
        Options(**wrong)  # type: ignore[arg-type]


def test_channels_that_read_different_inputs_are_refused() -> None:
    weight = drawn(8, 16)
    with pytest.raises(UsageError, match="cannot share factors of columns"):
        pick_parts(
            waterfilling.pick,
            weight,
            fitted(weight),
            [seen(gram(16, seed=k)) for k in range(2)],
            Options(bits=3),
        )
    found, _ = pick_parts(
        error_feedback.pick, weight, fitted(weight), [seen(gram(16, seed=k)) for k in range(2)],
        error_feedback.Options(),
    )  # fmt: skip
    assert found.shape == weight.shape


def test_drift_is_made_up_for() -> None:
    found = random(9)
    before = torch.randn(400, 32, generator=found) @ torch.randn(32, 32, generator=found)
    after = before @ (torch.eye(32) + 0.05 * torch.randn(32, 32, generator=found))
    what = Seen(gram=after.T @ after / 400, cross=before.T @ after / 400)
    weight = drawn(64, 32)
    errors = []
    for drift in (0.0, 1.0):
        integers, grid = pick(weight, what, bits=6, drift=drift)
        errors.append(float((before @ weight.T - after @ grid.values(integers).T).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_a_step_of_a_plan_uses_what_is_known_of_rows() -> None:
    layer = nn.Linear(64, 48)
    model = nn.Sequential(layer)
    matrix, asked = gram(64), []
    rows = torch.exp(2 * torch.randn(48, generator=random(4)))

    def importance(site: str) -> torch.Tensor:
        asked.append(site)
        return rows

    context = Context(gram=lambda _: matrix, rows=importance)
    options = {"code": "entropy", "rounding": "waterfilling", "level": 0.05}
    site = dataclasses.replace(plain_site(model, "0"))
    changed = apply(model, Plan((Step("weight_only", "0", options),)), [site], context)
    quantized = changed[0]
    assert isinstance(quantized, QuantizedLayer)
    integers, grid = quantized.encoded()
    expected = waterfilling.pick(
        layer.weight.detach(), fitted(layer.weight), Seen(gram=matrix, rows=rows), Options(level=0.05)
    )
    assert torch.equal(integers, expected[0])
    assert torch.equal(grid.values(integers), expected[1].values(expected[0]))
    assert asked == ["0"]
    plain = {"bits": 4, "rounding": "error_feedback"}
    apply(model, Plan((Step("weight_only", "0", plain),)), [site], context)
    assert asked == ["0"]  # other roundings do not ask: it costs passes backward
    rebuilt = apply(model, Plan((Step("weight_only", "0", options),)), [site], Context(rebuilding=True))
    rebuilt.load_state_dict(changed.state_dict())
    assert torch.equal(rebuilt[0].weight, quantized.weight)
