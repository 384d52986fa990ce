"""Perplexity, KL and agreement against plain loops, and where they are 0, 1 or infinite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.evaluation import language
from flyweight.evaluation.language import agreement, further, generate, kl, perplexity
from flyweight.inputs.language_model import Judge

SIZE = 7
Predict = Callable[[Any], torch.Tensor]


def table(seed: int, spread: float = 2.0) -> Predict:
    """A model whose next-token logits depend on the last two tokens; it counts its calls."""
    logits = spread * torch.randn(SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))

    def predict(ids: torch.Tensor) -> torch.Tensor:
        before = torch.cat((torch.zeros_like(ids[:, :1]), ids[:, :-1]), dim=1)
        return logits[before, ids]

    return predict


def texts(seed: int, count: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(SIZE, (count, length), generator=torch.Generator().manual_seed(seed))


def probabilities(predict: Predict, window: torch.Tensor) -> list[list[float]]:
    """Next-token distributions at each position, by plain loops."""
    rows = []
    for logits in predict(window[None])[0].double().tolist():
        total = sum(math.exp(value) for value in logits)
        rows.append([math.exp(value) / total for value in logits])
    return rows


@given(st.integers(0, 10**6), st.integers(2, 70))
@settings(max_examples=30, deadline=None)
def test_perplexity_and_kl_agree_with_plain_loops(seed: int, length: int) -> None:
    one, two, windows = table(seed), table(seed + 1), texts(seed, length=length)
    losses: list[float] = []
    means: list[float] = []
    for window in windows:
        first, second = probabilities(one, window), probabilities(two, window)
        losses += [-math.log(first[place][int(window[place + 1])]) for place in range(length - 1)]
        apart = [
            sum(p * math.log(p / q) for p, q in zip(a, b, strict=True))
            for a, b in zip(first, second, strict=True)
        ]
        means.append(sum(apart) / length)
    assert perplexity(one, windows) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    found = kl(one, two, windows)
    middle = sum(means) / 3
    assert found.value == pytest.approx(middle, rel=1e-9)
    error = math.sqrt(sum((value - middle) ** 2 for value in means) / 2 / 3)
    assert found.error == pytest.approx(error, rel=1e-6, abs=1e-12)
    assert found.value >= 0


def test_a_model_is_its_own_equal() -> None:
    one, windows = table(0), texts(0)
    assert kl(one, one, windows) == language.Mean(0.0, 0.0)
    assert agreement(one, one, windows[:, :3], 6) == 1.0
    assert math.isnan(kl(one, one, windows[:1]).error)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    assert perplexity(table(0, spread=0.0), texts(0)) == pytest.approx(SIZE)
    assert perplexity(lambda ids: torch.full((1, ids.shape[1], SIZE), 1e30) * ids[..., None], texts(0)) >= 1


def test_a_certain_and_wrong_model_has_an_infinite_perplexity() -> None:
    def wrong(ids: torch.Tensor) -> torch.Tensor:
        return 1e6 * torch.nn.functional.one_hot(ids, SIZE).float()

    assert perplexity(wrong, torch.tensor([[0, 1, 2]])) == math.inf


def test_a_token_that_cannot_come_adds_nothing() -> None:
    def masked(ids: torch.Tensor) -> torch.Tensor:
        logits = table(0)(ids).clone()
        logits[..., 3] = -math.inf
        return logits

    windows = texts(1) % 3
    assert kl(masked, masked, windows).value == 0.0
    assert 0 < kl(masked, table(0), windows).value < math.inf
    assert kl(table(0), masked, windows).value == math.inf


def test_generation_takes_the_most_probable_token_each_time() -> None:
    one, prompt = table(3), torch.tensor([1, 4])
    found = generate(one, prompt, 10)
    ids = prompt.tolist()
    for token in found.tolist():
        row = one(torch.tensor([ids]))[0, -1].tolist()
        assert token == row.index(max(row))
        ids.append(token)
    assert found.shape == (10,)
    assert prompt.tolist() == [1, 4]


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_agreement_counts_up_to_the_first_difference(seed: int) -> None:
    one, near = table(seed), table(seed)

    def two(ids: torch.Tensor) -> torch.Tensor:
        return near(ids) + 0.7 * table(seed + 1)(ids)

    prompts = texts(seed, 4, 3)
    shares = []
    for prompt in prompts:
        first, second = (generate(predict, prompt, 8).tolist() for predict in (one, two))
        same = [a == b for a, b in zip(first, second, strict=True)]
        shares.append((same.index(False) if False in same else 8) / 8)
    assert agreement(one, two, prompts, 8) == pytest.approx(sum(shares) / 4)


def test_what_differs_at_once_agrees_nowhere() -> None:
    def fixed(token: int) -> Predict:
        return lambda ids: torch.nn.functional.one_hot(torch.full_like(ids, token), SIZE).float()

    assert agreement(fixed(1), fixed(2), texts(0)) == 0.0


def test_a_language_model_has_further_figures_and_others_have_none() -> None:
    windows = texts(5, 40, 12)
    judge = Judge(windows, windows[:2, :4])
    calls = [0, 0]

    def counted(index: int) -> Predict:
        def predict(ids: torch.Tensor) -> torch.Tensor:
            calls[index] += 1
            return table(index)(ids)

        return predict

    found = further(judge, counted(0), counted(1))
    some = windows[::3]
    assert found["perplexity_of_original"] == pytest.approx(perplexity(table(0), some))
    assert found["perplexity"] == pytest.approx(perplexity(table(1), some))
    assert found["kl_in_nats_a_token"] == pytest.approx(kl(table(0), table(1), some).value)
    assert found["kl_standard_error"] == pytest.approx(kl(table(0), table(1), some).error)
    assert found["agreement_of_generated_tokens"] == agreement(table(0), table(1), windows[:2, :4])
    assert calls[0] == calls[1] <= len(some) + 2 * language.TOKENS
    assert len(some) <= language.WINDOWS
    assert further(lambda predict: 1.0, table(0), table(1)) == {}


def test_a_figure_that_is_not_finite_is_left_out() -> None:
    windows = texts(5, 8, 6)
    found = further(Judge(windows, windows[:1, :2]), table(0), lambda ids: table(0)(ids) * math.inf)
    assert "perplexity" not in found
    assert all(math.isfinite(value) for value in found.values())
