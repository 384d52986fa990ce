"""Gradients of layers in training, against the papers' formulas and against finite differences."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flyweight.errors import ModelError
from flyweight.transforms import Context, QuantizedLayer, frozen, plain_site, quantization_aware
from flyweight.transforms._learned import LearningLayer


def layer(module: nn.Module, **options: object) -> LearningLayer:
    found = quantization_aware.replace(
        module, plain_site(module, ""), quantization_aware.read(options, "options"), Context(training=True)
    )[""]
    assert isinstance(found, LearningLayer)
    return found


def linear(inputs: int = 16, outputs: int = 4, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs)


def lsq(
    w: np.ndarray, s: np.ndarray, z: np.ndarray, low: int, high: int, passed: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Esser et al., equations 3 and 5, entry by entry, with LSQ+'s zero point; w (O, n) with one step s[o] a row."""
    to_w, to_s, to_z = np.zeros_like(w), np.zeros_like(s), np.zeros_like(s)
    for row in range(w.shape[0]):
        for column in range(w.shape[1]):
            v = w[row, column] / s[row]
            if v + z[row] <= low or v + z[row] >= high:
                end = low if v + z[row] <= low else high
                to_s[row] += passed[row, column] * (end - z[row])
                to_z[row] -= passed[row, column] * s[row]
            else:
                to_w[row, column] = passed[row, column]
                to_s[row] += passed[row, column] * (round(v) - v)
    return to_w, to_s, to_z


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [({"bits": 3}, -4, 3), ({"bits": 4}, -7, 7), ({"bits": 2, "symmetric": False}, 0, 3), ({"code": "ternary"}, -1, 1)],
    ids=str,
)  # fmt: skip
def test_gradients_are_the_papers(options: dict[str, object], low: int, high: int) -> None:
    found = layer(linear(), **options)
    passed = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    (found._rounded() * passed).sum().backward()
    grid = found._grid()
    steps = grid.scales[:, 0].detach().double().numpy()
    zeros = np.zeros(4) if grid.zeros is None else grid.zeros[:, 0].detach().double().numpy()
    wanted = lsq(found.master.detach().double().numpy(), steps, zeros, low, high, passed.double().numpy())
    assert np.allclose(found.master.grad.numpy(), wanted[0], atol=1e-6)
    scale = 1 / math.sqrt(16 * high)
    assert np.allclose(found.steps.grad[:, 0].numpy(), scale * wanted[1] / steps, rtol=1e-3, atol=1e-4)
    if found.zeros is not None:
        assert np.allclose(found.zeros.grad[:, 0].numpy(), scale * wanted[2] / steps**2, rtol=1e-3, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([2, 3, 4]), st.sampled_from([None, 16, "tensor"]), st.booleans()
)
def test_steps_follow_finite_differences_of_what_rounding_is_taken_for(
    seed: int, bits: int, group: object, symmetric: bool
) -> None:
    """With each entry's rounding error held fixed, the value is smooth in the step, and LSQ's gradient is its slope."""
    found = layer(linear(32, 3, seed), bits=bits, group=group, symmetric=symmetric)
    passed = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (found._rounded() * passed.float()).sum().backward()
    grid = found._grid()
    count = 32 // grid.group

    def wide(values: torch.Tensor) -> torch.Tensor:
        return values.detach().double().repeat_interleave(32 // values.shape[1], 1)

    w, s = found.master.detach().double(), wide(grid.scales)
    z = torch.zeros_like(s) if grid.zeros is None else wide(grid.zeros)
    held = (w / s).round() - w / s
    inside = (w / s + z > grid.low) & (w / s + z < grid.high)

    def value(factor: float) -> torch.Tensor:
        levels = torch.where(inside, w / (s * factor) + held, (w / s + z).clamp(grid.low, grid.high) - z)
        return levels * s * factor

    slopes = (value(1 + 1e-6) - value(1 - 1e-6)) / 2e-6 * passed  # by the logarithm of the step
    sums = slopes.sum()[None, None] if group == "tensor" else slopes.unflatten(1, (count, -1)).sum(-1)
    steps = grid.scales.detach().double()[: len(sums)]
    share = w.numel() / sums.numel()
    wanted = sums / steps.square() / math.sqrt(share * grid.high)
    assert torch.allclose(found.steps.grad.double(), wanted, rtol=2e-3, atol=1e-3 * float(wanted.abs().max()))


def test_input_gradients_are_the_papers() -> None:
    found = layer(linear(), activations=4)
    found.static((0.2, 6), (-1.0, 1.0), 15)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    passed = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    (found._round(x) * passed).sum().backward()
    step, zero = np.float64(np.float32(0.2)), 6.0
    rows = [array.detach().double().numpy().reshape(1, -1) for array in (x, passed)]
    wanted = lsq(rows[0], np.array([step]), np.array([zero]), 0, 15, rows[1])
    scale = 1 / math.sqrt(16 * 15)  # numbers of one sample
    assert np.allclose(x.grad.numpy().reshape(1, -1), wanted[0], atol=1e-6)
    assert float(found.input_step.grad) == pytest.approx(scale * wanted[1][0] / step, rel=1e-3)
    assert float(found.input_zero.grad) == pytest.approx(scale * wanted[2][0] / step**2, rel=1e-3)


def test_plain_gradient_descent_moves_steps_as_the_paper_says() -> None:
    found = layer(linear(), bits=3)
    before = found._grid().scales.detach().double()
    (found._rounded().square().sum() * 0.01).backward()
    values = found._rounded().detach()
    wanted = lsq(
        found.master.detach().double().numpy(), before[:, 0].numpy(), np.zeros(4), -4, 3,
        (0.02 * values).double().numpy(),
    )[1]  # fmt: skip
    torch.optim.SGD([found.steps], 1e-3).step()
    moved = (found._grid().scales.detach().double() - before)[:, 0].numpy()
    assert np.allclose(moved, -1e-3 * wanted / math.sqrt(16 * 3), rtol=2e-2, atol=1e-8)


def test_straight_through_gradients_pass_unchanged_and_the_grid_stays() -> None:
    found = layer(linear(), bits=2, gradient="ste", activations=8)
    passed = torch.randn(4, 16)
    (found._rounded() * passed).sum().backward()
    assert torch.equal(found.master.grad, passed)
    x = torch.randn(2, 16, requires_grad=True)
    found._round(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 16))
    assert {name for name, _ in found.named_parameters()} == {"master", "inner.bias"}


def test_what_asks_for_no_gradient_gets_none() -> None:
    module = linear()
    module.weight.requires_grad_(False)
    found = layer(module, bits=3, activations=8)
    found(torch.randn(3, 16)).sum().backward()
    assert {name for name, p in found.named_parameters() if p.grad is not None} == {"inner.bias"}
    assert {name for name, p in found.named_parameters() if p.requires_grad} == {"inner.bias"}


def test_a_step_that_is_driven_through_zero_stays_usable() -> None:
    found = layer(linear(), bits=4)
    x = torch.randn(3, 16)
    with torch.no_grad():
        wanted = found(x).clone()
        found.steps.neg_()
    assert torch.equal(found(x), wanted)  # a symmetric grid has no sign
    with torch.no_grad():
        found.steps.zero_()
    assert torch.isfinite(found(x)).all()
    found(x).square().sum().backward()
    assert torch.isfinite(found.steps.grad).all()
    assert torch.equal(frozen(nn.Sequential(found.eval()))(x), found(x))


@pytest.mark.parametrize("where", ["master", "steps", "input_step"])
def test_a_training_that_diverged_is_named(where: str) -> None:
    found = layer(linear(), bits=4, activations=8)
    with torch.no_grad():
        getattr(found, where).fill_(float("nan"))
    with pytest.raises(ModelError, match=f"NaN or infinite values in {where} .at first.; train again"):
        frozen(nn.ModuleDict({"first": found}))


def test_steps_beyond_half_precision_are_refused_when_frozen() -> None:
    found = layer(linear(), bits=4, scale="float16")
    with torch.no_grad():
        found.steps.fill_(1e9)
    with pytest.raises(ModelError, match="steps"):
        found.frozen()


def test_sparse_gradients_of_an_embedding() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(20, 8, sparse=True)
    found = layer(table, bits=4)
    found(torch.tensor([1, 3, 3])).sum().backward()
    assert set(found.master.grad.abs().sum(1).nonzero().flatten().tolist()) <= {1, 3}
    assert table.sparse
    assert torch.isfinite(found.steps.grad).all()


def test_the_output_s_range_is_followed_in_training_alone() -> None:
    found = layer(linear(), activations=8).eval()
    before = found.output_range.clone()
    found(100 * torch.randn(3, 16))
    assert torch.equal(found.output_range, before)
    found.train()(100 * torch.randn(3, 16))
    assert float(found.output_range[1]) > float(before[1])


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own compiler raises one
@pytest.mark.parametrize(
    "options", [{"bits": 2, "symmetric": False}, {"bits": 4, "gradient": "ste", "activations": 8}], ids=str
)
def test_it_compiles_as_one_graph(options: dict[str, object]) -> None:
    found = layer(linear(), **options)
    x = torch.randn(3, 16)
    compiled = torch.compile(found, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    grads = {name: p.grad.clone() for name, p in found.named_parameters()}
    found.zero_grad()
    found(x).square().sum().backward()
    for name, p in found.named_parameters():
        assert torch.allclose(grads[name], p.grad, rtol=1e-5, atol=1e-7), name
    torch.compiler.reset()


def test_a_copy_learns_by_itself() -> None:
    found = layer(linear(), bits=3, activations=4)
    twin = copy.deepcopy(found)
    twin(torch.randn(3, 16)).sum().backward()
    assert found.master.grad is None
    assert isinstance(twin.frozen(), QuantizedLayer)
