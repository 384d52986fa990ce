"""PyTorch compiled by TorchInductor: needs a C++ compiler."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn

from flyweight.records import Batch
from flyweight.runtimes._files import WEIGHTS, Predictor, kept_weights, write_weights
from flyweight.runtimes._state import unique_state
from flyweight.runtimes.torch import caller
from flyweight.runtimes.torch import refuse as refuse

FILE = False
"""Whether it runs from a file alone, without the task's model class."""


def available() -> str | None:
    """None, or why it cannot run and how to get it."""
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"no C++ compiler named {compiler}: install g++ or set CXX"


def prepare(model: nn.Module, examples: Sequence[Batch], where: Path) -> Predictor:
    """Write the model's weights to the folder `where` and compile it on the first call."""
    write_weights(unique_state(model), where / WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler warns of its own parts
        call = caller(cast(nn.Module, torch.compile(model)))
        call(examples[0])
    return Predictor(runtime="torch_compile", call=call, files=(kept_weights(model, where),))
