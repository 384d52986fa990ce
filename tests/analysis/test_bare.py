"""Parameters that are read and not called are sites: in recurrent layers, in attention, and a model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from flyweight.analysis.bare import layer_at
from flyweight.analysis.fisher import fisher
from flyweight.analysis.gram import grams
from flyweight.analysis.sites import analyse, plain_site


class Own(nn.Module):
    """Calls a function with itself."""

    def __init__(self, forward: Callable[..., Any], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.compute = forward
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: torch.Tensor) -> Any:
        return self.compute(self, x)


class Custom(nn.Module):
    """A linear layer of a class that says nothing of how it reads its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight)


def named(model: nn.Module, x: torch.Tensor) -> list[str]:
    return [site.name for site in analyse(model.eval(), [x]).sites]


@pytest.mark.parametrize(
    ("compute", "site"),
    [
        (lambda self, x: functional.linear(x, self.w.T), "w.T"),
        (lambda self, x: x @ self.w, "w.T"),
        (lambda self, x: torch.mm(x, self.w.data), "w.T"),
        (lambda self, x: torch.matmul(x, self.w.to(x.dtype)), "w.T"),
        (lambda self, x: x @ self.v.T, "v"),
        (lambda self, x: x.matmul(self.v.transpose(0, 1)), "v"),
        (lambda self, x: torch.cat([functional.linear(x, part) for part in self.v.chunk(2)], 1), "v"),
        (lambda self, x: functional.linear(x, self.v[1:3]), "v"),
        (lambda self, x: functional.conv1d(x[:, None], self.k), "k"),
    ],
)
def test_a_model_s_own(compute: Callable[..., Any], site: str) -> None:
    model = Own(compute, w=(4, 6), v=(6, 4), k=(2, 1, 3))
    assert named(model, torch.randn(3, 4)) == [site]
    weight = layer_at(model, site).get_parameter("weight")
    assert weight is model.get_parameter(site.removesuffix(".T"))
    assert plain_site(model, site).kind == ("conv" if site == "k" else "linear")


def test_a_square_matrix_is_told_from_itself_turned() -> None:
    assert named(Own(lambda self, x: x @ self.w.T, w=(4, 4)), torch.randn(3, 4)) == ["w"]
    assert named(Own(lambda self, x: x @ self.w, w=(4, 4)), torch.randn(3, 4)) == ["w.T"]


def test_a_class_of_one_s_own_is_read() -> None:
    assert named(nn.Sequential(Custom(), nn.Linear(5, 2)), torch.randn(3, 4)) == ["0.weight", "1"]
    assert named(Custom(), torch.randn(3, 4)) == ["weight"]


def test_costs_and_matrices_of_a_recurrent_layer() -> None:
    layer, x = nn.LSTM(4, 3, batch_first=True), torch.randn(2, 5, 4)
    model = Own(lambda self, x: self.rnn(x)[0])
    model.rnn = layer
    found = analyse(model.eval(), [x])
    assert [(site.name, site.macs, site.bytes) for site in found.sites] == [
        ("rnn.weight_ih_l0", 10 * 4 * 12, 4 * 4 * 12), ("rnn.weight_hh_l0", 10 * 3 * 12, 4 * 3 * 12),
    ]  # fmt: skip
    hidden = torch.cat([torch.zeros(2, 1, 3), layer(x)[0].detach()[:, :-1]], 1).reshape(-1, 3)
    wanted = {"rnn.weight_ih_l0": x.reshape(-1, 4), "rnn.weight_hh_l0": hidden}
    for path, matrix in grams(model, list(wanted), [x]).items():
        torch.testing.assert_close(matrix, wanted[path].T @ wanted[path] / 10)
    importance = fisher(model, list(wanted), [x], seed=0)
    assert all(one.shape == (12,) and bool((one > 0).all()) for one in importance.values())


def test_rows_of_a_packed_weight_count_where_their_outputs_go() -> None:
    model = Own(lambda self, x: functional.linear(x, self.v[2:4]), v=(6, 4))
    importance = fisher(model.eval(), ["v"], [torch.randn(3, 4)], seed=0)["v"]
    assert importance.nonzero().flatten().tolist() == [2, 3]


def test_no_such_parameter() -> None:
    with pytest.raises(AttributeError):
        layer_at(nn.LSTM(4, 3), "weight_ih_l7")
