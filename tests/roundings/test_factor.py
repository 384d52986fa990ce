"""The factor against its definition and against the inverse that GPTQ's paper takes; damping until it works."""

from __future__ import annotations

import pytest
import torch
from roundings.samples import gram, random

from flyweight.roundings._factor import carried, factorize, solve

N = 10


def damped(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    return matrix.double() + damping * matrix.diagonal().double().mean() * torch.eye(N).double()


@pytest.mark.parametrize("by_size", [False, True])
def test_shares_are_those_of_the_inverse(by_size: bool) -> None:
    matrix = gram(N)
    factor = factorize(matrix, by_size, 0.01)
    assert factor is not None
    order = matrix.diagonal().argsort(descending=True) if by_size else torch.arange(N)
    assert torch.equal(factor.order, order)
    inverse = torch.linalg.inv(damped(matrix, 0.01)[order][:, order])
    upper = torch.linalg.cholesky(inverse).mT  # inverse = upper^T upper, as in the paper
    # e_j R_jj + sum_{i<j} e_i R_ij = 0 with R the inverse of that factor
    r = torch.linalg.inv(upper)
    assert torch.allclose(carried(factor).double(), (r / r.diagonal()).triu(1).T, rtol=1e-3, atol=1e-5)


def test_it_solves() -> None:
    matrix, right = gram(N), torch.randn(4, N, generator=random(3))
    factor = factorize(matrix, True, 0.1)
    assert factor is not None
    expected = right.double() @ torch.linalg.inv(damped(matrix, 0.1))
    assert torch.allclose(solve(factor, right).double(), expected, rtol=1e-4, atol=1e-5)


def test_inputs_that_are_always_zero_stand_by_themselves() -> None:
    matrix = gram(N)
    matrix[4, 4] = 0  # beside it, what cannot be if the matrix is right
    factor = factorize(matrix, False, 0.01)
    assert factor is not None
    shares = carried(factor)
    assert (shares[4] == 0).all()
    assert (shares[:, 4] == 0).all()
    live = [k for k in range(N) if k != 4]
    assert factor.scale == pytest.approx(float(matrix.diagonal()[live].mean()))


def test_without_any_input_there_is_no_factor() -> None:
    assert factorize(torch.zeros(N, N), True, 0.01) is None


@pytest.mark.parametrize("damping", [0.0, 1e-9, 0.01])
@pytest.mark.parametrize("case", ["rank one", "indefinite", "wild"])
def test_damping_never_fails(case: str, damping: float) -> None:
    matrix = gram(N, count=1)
    if case == "indefinite":
        matrix = gram(N) - 3 * gram(N).diagonal().amin() * torch.eye(N)
        matrix.diagonal().clamp_(min=0.01)
    elif case == "wild":
        matrix = torch.full((N, N), 1e15).fill_diagonal_(1.0)
    factor = factorize(matrix, True, damping)
    assert factor is not None
    assert torch.isfinite(carried(factor)).all()
    assert torch.isfinite(factor.root).all()
