"""Reading and writing are timed apart; greedy writing is what it says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flyweight.errors import UsageError
from flyweight.evaluation.generation import Speed, TorchReader, speed, write

pytestmark = pytest.mark.usefixtures("one_thread")


class Counter:
    """Says the number of tokens that it has read, modulo 10; reading takes 1 ms a call and 0.1 ms a token."""

    def __init__(self) -> None:
        self.read_so_far = 0
        self.calls: list[int] = []

    def forget(self) -> None:
        self.read_so_far = 0

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.calls.append(len(tokens))
        time.sleep(0.001 + 0.0001 * len(tokens))
        self.read_so_far += len(tokens)
        return np.eye(10, dtype=np.float32)[self.read_so_far % 10]


def test_each_token_is_the_likeliest() -> None:
    reader = Counter()
    assert write(reader, [5, 5, 5], 4) == [3, 4, 5, 6]
    assert reader.calls == [3, 1, 1, 1]
    assert write(reader, [5, 5], 1) == [2]


def test_reading_and_writing_are_told_apart() -> None:
    reader = Counter()
    found = speed(reader, [1] * 100, count=5, rounds=3)
    assert reader.calls == 4 * [100, 1, 1, 1, 1, 1]
    assert 100 / 0.1 < found.prefill <= 100 / 0.011
    assert 5 / 0.1 < found.decode <= 1 / 0.0011


def test_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 9, 99, 0, 1, 3, 0, 2, 6, 0, 4, 5])  # a round's start, middle and end; the first warms up
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert speed(Counter(), [1] * 8, count=2, rounds=3) == Speed(prefill=8 / 2, decode=2 / 2)


@pytest.mark.parametrize(("prompt", "count", "rounds"), [([], 1, 1), ([1], 0, 1), ([1], 1, 0)])
def test_nothing_to_measure_is_refused(prompt: list[int], count: int, rounds: int) -> None:
    with pytest.raises(UsageError):
        speed(Counter(), prompt, count, rounds)


def test_a_model_with_its_cache_writes_what_it_writes_without() -> None:
    pytest.importorskip("transformers")
    from runtimes.talkers import talker

    model, prompt = talker(), [3, 1, 4, 1, 5]
    found, text = write(TorchReader(model), prompt, 6), list(prompt)
    for _ in range(6):
        with torch.no_grad():
            output: Any = model(torch.tensor([text]))
        text.append(int(output.logits[0, -1].argmax()))
    assert found == text[5:]
