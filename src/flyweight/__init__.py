"""flyweight fits a model to a budget: say what quality may go and what should get smaller; get a file with the proof."""

from __future__ import annotations

import sys as _sys
from pathlib import Path as _Path
from typing import Any as _Any

try:
    from torch import nn as _nn

    from flyweight.artifact.load import load_module as _load_module
    from flyweight.artifact.load import load_predictor as _load_predictor
    from flyweight.errors import FlyweightError as FlyweightError
    from flyweight.optimize import optimize as optimize
    from flyweight.records import Goal as Goal
    from flyweight.records import Interval as Interval
    from flyweight.records import Measured as Measured
    from flyweight.records import Plan as Plan
    from flyweight.records import Result as Result
    from flyweight.records import Step as Step
    from flyweight.records import Task as Task
except KeyboardInterrupt:  # PyTorch takes seconds to import: the command answers meanwhile as it does later
    if _Path(_sys.argv[0]).stem != "flyweight":
        raise
    print("flyweight: interrupted before the work began", file=_sys.stderr)
    raise SystemExit(130) from None

__version__ = "0.1.0"


def load(folder: str | _Path, model: _nn.Module | None = None) -> _Any:
    """Load an artifact: `load(folder)` gives a function that runs its file, `load(folder, model)` a PyTorch module.

    `model` is what the task's file builds; it is not changed. Raises ArtifactError when the artifact is damaged, changed or
    of another model, UsageError when it runs in PyTorch only and no model is given.
    """
    return _load_predictor(folder) if model is None else _load_module(folder, model)
