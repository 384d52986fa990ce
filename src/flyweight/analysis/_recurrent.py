"""Recurrent layers step by step, so that each product with one of their weights is an operation that can be watched.

Shapes: T steps, B sequences, N rows of all steps together, H hidden features, G gates of H rows each. Nothing is dropped out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

_State = tuple[torch.Tensor, ...]
"""What a cell hands on, (B, H) each: the hidden state, and an LSTM's memory behind it."""
_Cell = Callable[[torch.Tensor, torch.Tensor, _State], _State]
"""From a step's input gates (B, G * H), its hidden gates and its state to the state after it."""


def _lstm(given: torch.Tensor, kept: torch.Tensor, state: _State) -> _State:
    enter, forget, new, leave = (given + kept).chunk(4, 1)
    memory = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(memory), memory


def _gru(given: torch.Tensor, kept: torch.Tensor, state: _State) -> _State:
    (reset, update, new), (kept_reset, kept_update, kept_new) = given.chunk(3, 1), kept.chunk(3, 1)
    share = torch.sigmoid(update + kept_update)
    found = torch.tanh(new + torch.sigmoid(reset + kept_reset) * kept_new)
    return ((1 - share) * found + share * state[0],)


def _tanh(given: torch.Tensor, kept: torch.Tensor, state: _State) -> _State:
    return (torch.tanh(given + kept),)


def _relu(given: torch.Tensor, kept: torch.Tensor, state: _State) -> _State:
    return (torch.relu(given + kept),)


LAYERS: Mapping[Callable[..., Any], _Cell] = {
    torch.lstm: _lstm, torch.gru: _gru, torch.rnn_tanh: _tanh, torch.rnn_relu: _relu,
}  # fmt: skip
CELLS: Mapping[Callable[..., Any], _Cell] = {
    torch.lstm_cell: _lstm, torch.gru_cell: _gru, torch.rnn_tanh_cell: _tanh, torch.rnn_relu_cell: _relu,
}  # fmt: skip


@dataclass(frozen=True)
class _Weights:
    """The parameters of one layer in one direction."""

    given: torch.Tensor  # (G * H, I)
    kept: torch.Tensor  # (G * H, H)
    biases: tuple[torch.Tensor | None, torch.Tensor | None]
    narrowed: torch.Tensor | None
    """(projected, H)"""


def unrolled(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """What one of LAYERS or CELLS gives for its arguments, computed by F.linear and products of entries."""
    if function in CELLS:
        state = args[1] if isinstance(args[1], tuple | list) else (args[1],)
        biases = (*args[4:], None, None)
        given, kept = F.linear(args[0], args[2], biases[0]), F.linear(state[0], args[3], biases[1])
        found = CELLS[function](given, kept, tuple(state))
        return found if len(found) > 1 else found[0]
    packed = isinstance(args[3], tuple | list)
    x, hidden, parameters = args[0], *args[2 if packed else 1 : 4 if packed else 3]
    states = tuple(hidden) if isinstance(hidden, tuple | list) else (hidden,)
    both, first = args[8 if packed else 7], not packed and args[8]
    x = x.transpose(0, 1) if first else x
    sizes = args[1].tolist() if packed else [x.shape[1]] * x.shape[0]
    weights = list(_split(parameters, len(states[0])))
    flat = x.reshape(-1, x.shape[-1])
    rows, last = _layers(LAYERS[function], flat, sizes, states, weights, int(both))
    y = rows if packed else rows.reshape(*x.shape[:2], -1)
    return y.transpose(0, 1) if first else y, *last


def _layers(
    cell: _Cell,
    rows: torch.Tensor,
    sizes: Sequence[int],
    states: _State,
    weights: Sequence[_Weights],
    both: int,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The rows (N, directions * H) that the last layer gives, and what all layers hand on in the end."""
    ends: list[_State] = []
    for layer in range(0, len(weights), 1 + both):
        found = []
        for at in range(layer, layer + 1 + both):
            state = tuple(part[at] for part in states)
            outputs, end = _scanned(cell, weights[at], rows, sizes, state, backward=at > layer)
            found.append(outputs)
            ends.append(end)
        rows = torch.cat(found, 1)
    return rows, [torch.stack(parts) for parts in zip(*ends, strict=True)]


def _scanned(
    cell: _Cell, weights: _Weights, rows: torch.Tensor, sizes: Sequence[int], state: _State, *, backward: bool
) -> tuple[torch.Tensor, _State]:
    """One direction of one layer; a step has as many rows as there are sequences of that length."""
    steps = F.linear(rows, weights.given, weights.biases[0]).split(list(sizes))
    outputs = []
    for given in reversed(steps) if backward else steps:
        now = tuple(part[: len(given)] for part in state)
        hidden, *memory = cell(given, F.linear(now[0], weights.kept, weights.biases[1]), now)
        hidden = hidden if weights.narrowed is None else F.linear(hidden, weights.narrowed)
        outputs.append(hidden)
        state = tuple(
            torch.cat((new, old[len(given) :])) for new, old in zip((hidden, *memory), state, strict=True)
        )
    return torch.cat(outputs[::-1] if backward else outputs), state


def _split(parameters: Sequence[torch.Tensor], count: int) -> Iterator[_Weights]:
    """The parameters of each of so many layers and directions: two matrices, two biases or none, a third matrix or none."""
    each = len(parameters) // count
    for start in range(0, len(parameters), each):
        given, kept, *more = parameters[start : start + each]
        biases = (more[0], more[1]) if len(more) > 1 else (None, None)
        yield _Weights(given, kept, biases, more[-1] if len(more) % 2 else None)
