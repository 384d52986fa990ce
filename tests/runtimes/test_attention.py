"""Attention in the graph: one node, the numbers of PyTorch, and no copies where heads are only split for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flyweight.inputs.check import run
from flyweight.runtimes import onnxruntime, openvino

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
attend = F.scaled_dot_product_attention
WIDTH, HEADS = 16, 4


class Attending(nn.Module):
    """(B, L, 16) and a mask (B, L) -> (B, L, 16), by a function of the three projections and the mask."""

    def __init__(self, attention: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.attention = attention

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.attention(self.q(x), self.k(x), self.v(x), mask.bool()))
        return found


def heads(x: torch.Tensor, count: int = HEADS) -> torch.Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def rows(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def masked(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """The usual way: heads are split, padding is masked."""
    return rows(attend(heads(q), heads(k), heads(v), mask[:, None, None, :].expand(-1, 1, q.shape[1], -1)))


def added(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return rows(attend(heads(q), heads(k), heads(v), torch.where(mask[:, None, None], 0.0, -1e9), scale=0.3))


def causal(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return rows(attend(heads(q), heads(k), heads(v), is_causal=True)) * mask[..., None]


def grouped(q: Any, k: Any, v: Any, mask: Any) -> Any:
    few = k[..., : WIDTH // 2], v[..., : WIDTH // 2]
    parts = (heads(few[0], HEADS // 2), heads(few[1], HEADS // 2))
    return rows(attend(heads(q), *parts, mask[:, None, None], enable_gqa=True))


def alone(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """One head without a dimension of its own."""
    return attend(q, k, v, mask[:, None, :].expand(-1, q.shape[1], -1))


def shared(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """One head of keys and values for all queries."""
    few = [heads(x[..., :4], 1) for x in (k, v)]
    return rows(attend(heads(q), *few, mask[:, None, None]))


def turned(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """Heads are changed before they attend, so that they are no rows."""
    return rows(attend(heads(q).flip(-1), heads(k).flip(-1), heads(v), mask[:, None, None]))


def read_twice(q: Any, k: Any, v: Any, mask: Any) -> Any:
    found = attend(heads(q), heads(k), heads(v), mask[:, None, None])
    return rows(found) + found.mean()


CASES = {masked: 0, added: 0, causal: 0, grouped: 0, alone: 0, shared: 0, turned: 4, read_twice: 4}
"""The transpositions that are left in the graph."""


@pytest.mark.parametrize("attention", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("runtime", [onnxruntime, openvino], ids=["onnxruntime", "openvino"])
def test_attention_gives_what_pytorch_gives(attention: Any, runtime: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attending(attention).eval()
    examples = [(torch.randn(2, length, WIDTH), torch.ones(2, length).long()) for length in (6, 9)]
    examples[1][1][0, 4:] = 0
    examples[1][1][1] = 0  # nothing to attend to: PyTorch says 0
    predict = runtime.prepare(model, examples, tmp_path)
    for batch in examples:
        torch.testing.assert_close(predict(batch), run(model, batch), atol=1e-5, rtol=1e-5)
    graph = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("Attention") == 1
    assert kinds.count("Transpose") == CASES[attention]
    assert "Softmax" not in kinds


def test_attention_over_more_dimensions_is_flattened(tmp_path: Path) -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return attend(q, k, v, torch.eye(x.shape[-2], dtype=torch.bool).expand(x.shape[1], 1, -1, -1))

    torch.manual_seed(0)
    model, batch = Windows().eval(), torch.randn(2, 3, 2, 5, 8)
    predict = onnxruntime.prepare(model, [batch], tmp_path)
    torch.testing.assert_close(predict(batch), run(model, batch), atol=1e-5, rtol=1e-5)
