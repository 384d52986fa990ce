"""What rows of tables count, against sums written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flyweight.analysis import lookups


class Recommender(nn.Module):
    """Two tables, whose rows are summed and scored by a layer."""

    def __init__(self, mode: str = "sum") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.users, self.items = nn.Embedding(7, 8), nn.EmbeddingBag(9, 8, mode=mode)
        self.head = nn.Linear(8, 3)

    def forward(self, user: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return self.head(self.users(user) + self.items(items))


EXAMPLES = [
    (torch.tensor([0, 1, 1, 5]), torch.tensor([[0, 2], [2, 3], [2, 8], [1, 1]])),
    (torch.tensor([1, 2]), torch.tensor([[4, 4], [2, 0]])),
]


def test_rows_count_as_often_as_they_are_looked_up_for_a_prediction() -> None:
    found = lookups.tables(Recommender(), ["users", "items"], EXAMPLES, seed=0)
    assert found["users"].counts.tolist() == pytest.approx([n / 6 for n in (1, 3, 1, 0, 0, 1, 0)])
    assert found["items"].counts.tolist() == pytest.approx([n / 6 for n in (2, 2, 4, 1, 2, 0, 0, 0, 1)])


@pytest.mark.parametrize(("mode", "share"), [("sum", 1.0), ("mean", 0.25)])
def test_the_matrix_is_that_of_the_slopes(mode: str, share: float) -> None:
    """Of a normal answer (here three numbers, no logits) it is W^T W on average; a bag's mean of two rows gives a quarter."""
    model = Recommender(mode)
    examples = [(torch.randint(7, (500,)), torch.randint(9, (500, 2))) for _ in range(4)]
    found = lookups.tables(model, ["users", "items"], examples, seed=0)
    weight = model.head.weight.detach()
    wanted = weight.T @ weight
    for name, factor in (("users", 1.0), ("items", share)):
        gap = (found[name].gram - factor * wanted).norm() / (factor * wanted).norm()
        assert gap < 0.15


def test_what_does_not_reach_the_output_is_not_known() -> None:
    model = Recommender()
    with torch.no_grad():
        model.head.weight.zero_()
    assert lookups.lazily(model, ["users"], EXAMPLES, seed=0)("users") is None
    assert lookups.lazily(Recommender(), ["users"], EXAMPLES, seed=0)("items") is None
