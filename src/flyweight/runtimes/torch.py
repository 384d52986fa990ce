"""PyTorch as it is, eager, on the processor."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flyweight.inputs.check import call
from flyweight.records import Batch, Step
from flyweight.runtimes import ROUNDING, methods
from flyweight.runtimes._files import WEIGHTS, Predictor, kept_weights, write_weights
from flyweight.runtimes._state import unique_state

FILE = False
"""Whether it runs from a file alone, without the task's model class."""


def available() -> str | None:
    """None, or why it cannot run and how to get it."""
    return None


def refuse(steps: Collection[Step]) -> str | None:
    """Why a plan with these steps could not be held here or would not pay, or None."""
    if methods(steps) & ROUNDING:
        return "PyTorch decodes integer layers to floats, which is slower than leaving them alone"
    return None


def prepare(model: nn.Module, examples: Sequence[Batch], where: Path) -> Predictor:
    """Write the model's weights to the folder `where` and run it as it is."""
    write_weights(unique_state(model), where / WEIGHTS)
    return Predictor(runtime="torch", call=caller(model), files=(kept_weights(model, where),))


def caller(model: nn.Module) -> Any:
    """A function from a batch to the model's output, without gradients."""

    def predict(batch: Batch) -> Any:
        with torch.inference_mode():
            return call(model, batch)

    return predict
