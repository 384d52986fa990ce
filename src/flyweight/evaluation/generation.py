"""How fast a language model reads a prompt and how fast it writes, told apart, and what it writes.

Reading (prefill) takes all tokens at once and is limited by arithmetic; writing (decode) takes one after the other and is
limited by how fast the weights come from memory: a format may speed up one and slow down the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flyweight.errors import UsageError

ROUNDS = 5
"""How often a prompt is read and continued; the median counts."""


class Reader(Protocol):
    """What reads tokens and remembers them, such as `runtimes.llamacpp.Reader`."""

    def forget(self) -> None:
        """Forget all tokens."""

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens after those before; the logits (V,) that follow the last."""


@dataclass(frozen=True)
class Speed:
    """Tokens per second, medians of the rounds."""

    prefill: float
    """Of reading a prompt at once."""
    decode: float
    """Of writing one token after the other."""


class TorchReader:
    """A causal language model of Hugging Face as a Reader, with its own cache."""

    def __init__(self, model: nn.Module) -> None:
        """The model must take `past_key_values` and give them back."""
        self._model, self._past = model, cast(Any, None)

    def forget(self) -> None:
        """Forget all tokens."""
        self._past = None

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens after those before; the logits (V,) that follow the last."""
        given = torch.tensor([list(tokens)])
        with torch.inference_mode():
            found = self._model(given, past_key_values=self._past, use_cache=True)
        self._past = found.past_key_values
        logits: NDArray[np.float32] = found.logits[0, -1].float().cpu().numpy()
        return logits


def write(reader: Reader, prompt: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that a model writes after a prompt, each the likeliest; UsageError when the prompt is empty."""
    _check(prompt, count)
    reader.forget()
    logits, written = reader.read(prompt), []
    for _ in range(count):
        written.append(int(logits.argmax()))
        if len(written) < count:
            logits = reader.read(written[-1:])
    return written


def speed(reader: Reader, prompt: Sequence[int], count: int = 32, rounds: int = ROUNDS) -> Speed:
    """How fast a model reads a prompt and writes `count` tokens after it; a first round only warms up.

    Raises UsageError when the prompt is empty, or fewer than one token or round is asked for.
    """
    _check(prompt, count)
    if rounds < 1:
        raise UsageError("rounds must be at least 1", got=str(rounds))
    times = [_round(reader, prompt, count) for _ in range(rounds + 1)][1:]
    reading, writing = (statistics.median(part) for part in zip(*times, strict=True))
    return Speed(prefill=len(prompt) / reading, decode=count / writing)


def _round(reader: Reader, prompt: Sequence[int], count: int) -> tuple[float, float]:
    """Seconds of reading the prompt, and of writing."""
    reader.forget()
    start = time.perf_counter()
    logits = reader.read(prompt)
    middle = time.perf_counter()
    for _ in range(count):
        logits = reader.read([int(logits.argmax())])
    return middle - start, time.perf_counter() - middle


def _check(prompt: Sequence[int], count: int) -> None:
    if not len(prompt) or count < 1:
        raise UsageError("a prompt needs a token, and so does what follows", got=f"{len(prompt)} and {count}")
