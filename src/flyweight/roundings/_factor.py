"""The triangular factor of a Gram matrix that says how an error in one input is made up for by the inputs after it.

With the inputs in order and H = R R^T, R upper triangular, the error e H e^T of a row is the sum of (e R)_j^2, and (e R)_j
holds only e_0 .. e_j. What error feedback needs is R with its columns divided by its diagonal. This is the factor that
Frantar et al. (arXiv 2210.17323) take from the inverse of H, without an inverse (Chee et al., QuIP, arXiv 2307.13304, show
that both are the same).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Factor:
    """A damped Gram matrix, taken apart in an order of the inputs. Inputs that are always zero stand by themselves."""

    order: torch.Tensor  # (I,) int64: the inputs, first one first
    root: (
        torch.Tensor
    )  # (I, I) lower: root root^T is the damped matrix over `scale`, inputs in the reverse of `order`
    scale: float
    """What the matrix was divided by: the mean of the diagonal."""


def factorize(gram: torch.Tensor, by_size: bool, damping: float, together: int = 1) -> Factor | None:
    """The factor of gram (I, I), or None when all inputs are always zero.

    by_size: largest diagonal first, else in the order in which they come; so many neighbours stay together. damping: share of
    the mean diagonal that is added to the diagonal; it grows tenfold until the factor exists in float32, or else in float64.
    """
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    if bool(dead.all()):
        return None
    scale = float(diagonal[~dead].double().mean())
    order = torch.arange(len(gram), device=gram.device)
    if by_size:
        sizes = diagonal.view(-1, together).sum(1)
        first = torch.sort(sizes, descending=True, stable=True).indices * together
        order = (first[:, None] + torch.arange(together, device=gram.device)).flatten()
    reverse = order.flip(0)
    scaled = (gram / scale)[reverse][:, reverse]
    still = dead[reverse]
    scaled[still], scaled[:, still] = 0.0, 0.0
    scaled.diagonal()[still] = 1.0
    return Factor(order, _root(scaled, damping), scale)


def carried(factor: Factor) -> torch.Tensor:
    """(I, I) strictly lower: entry [j, i] is the share of the error in the i-th input that the j-th takes over."""
    upper = factor.root.T.flip((0, 1))  # R^T is lower: R is upper in `order`
    return (upper / upper.diagonal()[:, None]).tril(-1).contiguous()


def solve(factor: Factor, right: torch.Tensor) -> torch.Tensor:
    """X (O, I) with X (gram + damping) = right (O, I)."""
    reverse = factor.order.flip(0)
    turned = (right / factor.scale)[:, reverse].T.to(factor.root)
    solution = torch.empty_like(right)
    solution[:, reverse] = torch.cholesky_solve(turned, factor.root).T.to(right)
    return solution


def _root(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """The Cholesky factor of a matrix with a mean diagonal of 1; damping grows until it exists, as it does in the end."""
    while True:
        for kind in (torch.float32, torch.float64):
            damped = matrix.to(kind, copy=True)
            damped.diagonal().add_(damping)
            found: tuple[torch.Tensor, torch.Tensor] = torch.linalg.cholesky_ex(damped)
            if not int(found[1]):
                return found[0]
        damping = max(10 * damping, 1e-6)
