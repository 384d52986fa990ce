"""Models with other modules at some paths: as copies of their own, or as views that share all tensors with the model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

from torch import nn


def substitute(model: nn.Module, changes: Mapping[str, nn.Module]) -> nn.Module:
    """A deep copy of a model with other modules at some paths; shared modules and tied parameters stay shared."""
    return copy.deepcopy(model, _planted(model, changes))


def view(model: nn.Module, changes: Mapping[str, nn.Module]) -> nn.Module:
    """As `substitute`, but parameters and buffers are the model's own: to look through, not to keep or to change."""
    own = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, {**own, **_planted(model, changes)})


def _planted(model: nn.Module, changes: Mapping[str, nn.Module]) -> dict[int, Any]:
    return {id(model.get_submodule(path)): new for path, new in changes.items()}
