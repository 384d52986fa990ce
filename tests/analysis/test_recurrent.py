"""Recurrent layers step by step give what PyTorch's own give, on sequences of one length and of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from flyweight.analysis._recurrent import CELLS, LAYERS, unrolled

KINDS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (nn.LSTM, {}), (nn.LSTM, {"proj_size": 5}), (nn.LSTM, {"proj_size": 5, "bias": False}), (nn.GRU, {}),
    (nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu", "bias": False}),
)  # fmt: skip


class Unrolled(TorchFunctionMode):
    """Recurrent layers and cells run step by step."""

    count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in LAYERS or func in CELLS:
            self.count += 1
            return unrolled(func, args)
        return func(*args, **(kwargs or {}))


def leaves(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for part in value:
            if part is not None:
                yield from leaves(part)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_layers(kind: Any, options: dict[str, Any], both: bool, first: bool) -> None:
    torch.manual_seed(0)
    layer = kind(7, 6, 2, bidirectional=both, batch_first=first, **options)
    x = torch.randn(4, 9, 7) if first else torch.randn(9, 4, 7)
    hidden = torch.randn(2 * (1 + both), 4, options.get("proj_size", 6))
    state = (hidden, torch.randn(2 * (1 + both), 4, 6)) if kind is nn.LSTM else hidden
    packed = nn.utils.rnn.pack_padded_sequence(x, [3, 9, 1, 5], batch_first=first, enforce_sorted=False)
    for given in ((x,), (x, state), (packed,), (packed, state), (x[0],)):
        with Unrolled() as mode:
            found = list(leaves(layer(*given)))
        assert mode.count == 1
        for one, other in zip(found, leaves(layer(*given)), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("cell", [nn.LSTMCell(7, 6), nn.GRUCell(7, 6), nn.RNNCell(7, 6, bias=False)])
def test_cells(cell: nn.Module) -> None:
    x = torch.randn(3, 7)
    with Unrolled() as mode:
        found = list(leaves(cell(x)))
    assert mode.count == 1
    for one, other in zip(found, leaves(cell(x)), strict=True):
        torch.testing.assert_close(one, other)
