"""How close a language model stays to its original: perplexity, KL divergence, and whether it writes the same.

A low-bit model can keep its perplexity and lose generation, so the three are told apart. All are pure functions of
predictions, window by window: the logits of one window are held at a time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flyweight.inputs.language_model import Judge, likelihoods, of_right_tokens
from flyweight.records import Predict

WINDOWS = 16
"""Windows, evenly spread, on which the recommended model is compared with its original."""
TOKENS = 24
"""Tokens that are generated after each prompt."""
_ROWS = 64
"""Positions whose logits are held in float64 at a time."""

Windows = torch.Tensor | Sequence[torch.Tensor]
"""Token ids, int64: (windows, tokens), or (tokens,) each."""


@dataclass(frozen=True)
class Mean:
    """A mean over windows with its standard error; the error is NaN for a single window."""

    value: float
    error: float


def perplexity(predict: Predict, windows: Windows) -> float:
    """exp of the mean negative log-likelihood of all tokens but each window's first; at least 1, inf when beyond floats."""
    return _exp(-float(torch.cat([likelihoods(predict, window) for window in windows]).mean()))


def kl(original: Predict, predict: Predict, windows: Windows) -> Mean:
    """Mean KL(original || candidate) of the next token's distribution, in nats a token, at every position of the windows."""
    return _mean([_divergence(original(window[None])[0], predict(window[None])[0]) for window in windows])


def agreement(original: Predict, predict: Predict, prompts: Windows, tokens: int = TOKENS) -> float:
    """Share of greedily generated tokens that agree up to the first difference, the mean over prompts, in [0, 1].

    Each token is the most probable one given the prompt and what was generated so far, by a pass over all of it.
    """
    return statistics.fmean(_agreeing(original, predict, prompt, tokens) / tokens for prompt in prompts)


def generate(predict: Predict, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """The most probable tokens after a prompt (length,), one after another: (tokens,) int64; no token ends it early."""
    ids = prompt
    for _ in range(tokens):
        ids = torch.cat((ids, _next(predict, ids)))
    return ids[len(prompt) :]


def further(score: Callable[..., Any], original: Predict, predict: Predict) -> dict[str, float]:
    """Figures about a candidate that are reported and not judged; {} where the score is not a language model's Judge.

    Perplexity of both, KL in nats a token with its standard error, and the share of generated tokens that agree.
    """
    if not isinstance(score, Judge):
        return {}
    windows = score.windows[:: -(-len(score.windows) // WINDOWS)]
    rows = [_compared(window, original(window[None]), predict(window[None])) for window in windows]
    apart, before, after = (_mean(column) for column in zip(*rows, strict=True))
    found = {
        "perplexity_of_original": _exp(before.value),
        "perplexity": _exp(after.value),
        "kl_in_nats_a_token": apart.value,
        "kl_standard_error": apart.error,
        "agreement_of_generated_tokens": agreement(original, predict, score.prompts),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _compared(window: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> tuple[float, float, float]:
    """KL and both mean negative log-likelihoods of one window, from one pass each."""
    before, after = (-float(of_right_tokens(logits[0], window).mean()) for logits in (first, second))
    return _divergence(first[0], second[0]), before, after


def _divergence(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean KL over the positions of two (tokens, vocabulary) logits, in float64, some rows at a time."""
    total = 0.0
    for one, two in zip(first.split(_ROWS), second.split(_ROWS), strict=True):
        p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (one, two))
        total += float(torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum())  # 0 log 0 = 0
    return total / len(first)


def _mean(values: Sequence[float]) -> Mean:
    found = torch.tensor(values, dtype=torch.float64)
    error = float(found.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(float(found.mean()), error)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _agreeing(original: Predict, predict: Predict, prompt: torch.Tensor, tokens: int) -> int:
    """How many generated tokens agree before the first that differs; after it the two go on from different texts."""
    ids = prompt
    for count in range(tokens):
        wanted = _next(original, ids)
        if not torch.equal(wanted, _next(predict, ids)):
            return count
        ids = torch.cat((ids, wanted))
    return tokens


def _next(predict: Predict, ids: torch.Tensor) -> torch.Tensor:
    """The most probable next token, (1,) int64."""
    logits: torch.Tensor = predict(ids[None])[0, -1]
    return logits.argmax().view(1).to(ids.device)
