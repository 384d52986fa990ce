"""Operands, however they are passed; and PyTorch's fused paths off for as long as it takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from flyweight.analysis.calls import OPERATIONS, Watch, operands, owners, unfused

X, W, B = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X, W, B, 2, 1), {}),
        ((X, W), {"bias": B, "stride": 2, "padding": 1}),
        ((), {"input": X, "weight": W, "bias": B, "stride": 2, "padding": 1}),
    ],
)
def test_operands_of_a_convolution(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    x, weight, bias, layout = operands(OPERATIONS[functional.conv2d], args, kwargs)
    assert x is X
    assert weight is W
    assert bias is B
    assert layout == {"stride": 2, "padding": 1, "dilation": 1, "groups": 1}


def test_operands_of_the_others() -> None:
    x, w, b = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    assert operands("linear", (x, w), {}) == (x, w, None, {})
    assert operands("addmm", (b, x, w), {})[:3] == (x, w, b)
    assert operands("embedding", (x, w, None, 1.0), {})[3] == {"max_norm": 1.0}


def test_the_watch_tells_own_uses_from_others() -> None:
    layer, seen, other = nn.Linear(3, 3), [], []
    with Watch(
        owners(layer), lambda path, call: seen.append(call.kind), lambda path, name: other.append(name)
    ):
        layer(torch.randn(2, 3))
        layer.weight * 2
        torch.stack([layer.weight, layer.weight])
        layer.weight.shape  # noqa: B018  # a look at the shape is no use
    assert seen == ["linear"]
    assert other == ["mul", "stack"]


@pytest.mark.parametrize("before", [True, False])
def test_fused_paths_come_back(before: bool) -> None:
    kept = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(before)
    try:
        with pytest.raises(KeyError), unfused():
            assert not torch.backends.mha.get_fastpath_enabled()
            raise KeyError
        assert torch.backends.mha.get_fastpath_enabled() == before
    finally:
        torch.backends.mha.set_fastpath_enabled(kept)
