"""Bags by plain operations are PyTorch's, whatever way they are given."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtimes.nets import changed, gap, prepared
from torch import nn
from torch.nn import functional

from flyweight import discover
from flyweight.analysis.sites import model_bytes
from flyweight.inputs.check import run
from flyweight.runtimes._bags import bags
from flyweight.runtimes._files import WEIGHTS
from flyweight.testing.zoo import ZOO
from flyweight.transforms import QuantizedLayer

TABLE = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))


def same(*args: Any, **kwargs: Any) -> None:
    wanted = functional.embedding_bag(*args, **kwargs)
    weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
    found = bags(functools.partial(torch.nn.functional.embedding, weight=weight), args, kwargs)
    assert torch.allclose(found, wanted, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4), st.integers(1, 5), st.sampled_from(["sum", "mean", "max"]),
    st.sampled_from([None, 0, 8, -1]), st.integers(0, 99),
)  # fmt: skip
def test_bags_of_one_length(count: int, length: int, mode: str, padding: int | None, seed: int) -> None:
    numbers = torch.randint(9, (count, length), generator=torch.Generator().manual_seed(seed))
    same(numbers, TABLE, mode=mode, padding_idx=padding)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=5), st.sampled_from(["sum", "mean", "max"]),
    st.sampled_from([None, 3]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_bags_by_offsets(lengths: list[int], mode: str, padding: int | None, last: bool, seed: int) -> None:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    numbers = torch.randint(9, (int(ends[-1]),), generator=torch.Generator().manual_seed(seed))
    offsets = ends if last else ends[:-1]
    same(numbers, TABLE, offsets, mode=mode, padding_idx=padding, include_last_offset=last)


@pytest.mark.parametrize("offsets", [None, torch.tensor([0, 2, 2])])
def test_weighed_sums(offsets: torch.Tensor | None) -> None:
    numbers = torch.randint(9, (2, 3) if offsets is None else (6,))
    factors = torch.randn(numbers.shape)
    same(numbers, TABLE, offsets, mode="sum", per_sample_weights=factors)
    same(numbers, weight=TABLE, offsets=offsets, mode="sum")


class Baskets(nn.Module):
    """Numbers (N,) behind one another and where each bag begins (B,) -> (B, 3)."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items, self.out = nn.EmbeddingBag(40, 16, mode=mode, padding_idx=2), nn.Linear(16, 3)

    def forward(self, numbers: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.items(numbers, offsets))
        return found


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("options", [None, {}, {"bits": 4, "symmetric": False}, {"code": "entropy"}], ids=str)
def test_a_recommender_s_tables_are_looked_up_in_stored_rows(
    runtime: str, options: dict[str, Any] | None, tmp_path: Path
) -> None:
    reason = discover.method("runtimes", runtime).available()
    if reason:
        pytest.skip(reason)
    entry = next(entry for entry in ZOO if entry.name == "recommender")
    model, examples = entry.build(), list(entry.examples())
    found = model if options is None else changed(model, examples, "weight_only", options)
    if options is not None:
        assert isinstance(found.history, QuantizedLayer)
    predictor = prepared(runtime, found, examples, tmp_path)
    for batch in examples:
        assert gap(run(found, batch), predictor(batch)) < 2e-5
    assert (tmp_path / WEIGHTS).stat().st_size < model_bytes(found) + 3000


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_by_offsets_run_with_stored_rows(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    source = torch.Generator().manual_seed(1)
    examples = [
        (torch.randint(40, (count,), generator=source), torch.tensor(offsets))
        for count, offsets in ((5, [0, 2]), (9, [0, 0, 4]), (7, [0, 3, 3, 5]))
    ]
    found = changed(Baskets(mode).eval(), examples, "weight_only")
    predictor = prepared("onnxruntime", found, examples, tmp_path)
    for batch in examples:
        assert gap(run(found, batch), predictor(batch)) < 2e-5
