"""Which tensors of an output count, and when they are logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from flyweight.analysis.answers import answer, output_of, vocabularies_of
from flyweight.errors import DataError

FLOATS, WIDE = torch.zeros(2, 3), torch.zeros(2, 5, 7)


@dataclass
class Record:
    """An output with names."""

    logits: torch.Tensor
    hidden: torch.Tensor


CASES: list[tuple[Any, bool, list[torch.Tensor]]] = [
    (WIDE, True, [WIDE]), (FLOATS, False, [FLOATS]), ((FLOATS, WIDE), False, [FLOATS, WIDE]), ((WIDE, FLOATS), True, [WIDE]),
    ({"logits": FLOATS, "more": WIDE}, True, [FLOATS]), (Record(FLOATS, WIDE), True, [FLOATS]),
    ([torch.zeros(2, dtype=torch.int64), FLOATS], False, [FLOATS]), (torch.zeros(7), False, [torch.zeros(7)]),
]  # fmt: skip


@pytest.mark.parametrize(("output", "logits", "tensors"), CASES, ids=lambda _: "")
def test_what_counts(output: Any, logits: bool, tensors: list[torch.Tensor]) -> None:
    found = answer(output, {7})
    assert found.logits is logits
    assert [one.shape for one in found.tensors] == [one.shape for one in tensors]


def test_vocabularies_are_the_embeddings_sizes() -> None:
    assert vocabularies_of(nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2))) == {7}


def test_an_output_has_slopes_and_a_refusal_names_the_example() -> None:
    model = nn.Linear(3, 2)
    assert output_of(model, [(torch.zeros(1, 3),)], 0).requires_grad
    assert output_of(model, [{"input": torch.zeros(1, 3)}], 0).shape == (1, 2)
    with pytest.raises(DataError, match=r"with gradients") as caught:
        output_of(model, [torch.zeros(1, 3), torch.zeros(1, 4)], 1)
    assert "examples[1]" in str(caught.value)
