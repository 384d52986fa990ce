"""Brings stored weights back from the runtime file's layout to the PyTorch model's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from flyweight.errors import ArtifactError
from flyweight.runtimes._state import unique_state
from flyweight.transforms import QuantizedLayer
from flyweight.transforms._grid import pack, unpack

TRANSPOSED = "transposed"
ONNX_ONLY = "onnx."
"""Prefix of stored constants that only the graph needs."""


def load_state(model: nn.Module, stored: Mapping[str, torch.Tensor], layouts: Mapping[str, str]) -> None:
    """Put stored weights into a model that a plan was applied to.

    Raises ArtifactError with the first differences when they belong to another model.
    """
    state = {key: tensor for key, tensor in stored.items() if not key.startswith(ONNX_ONLY)}
    wanted = unique_state(model)
    modules = dict(model.named_modules())
    state = {
        key: _restored(modules.get(key.rpartition(".")[0]), key, tensor)
        if layouts.get(key) == TRANSPOSED
        else tensor
        for key, tensor in state.items()
    }
    differences = [f"{key} missing" for key in wanted if key not in state]
    differences += [f"{key} unexpected" for key in state if key not in model.state_dict()]
    differences += [
        f"{key} has shape {tuple(state[key].shape)}, the model {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ArtifactError(
            "the artifact must belong to the model",
            got="; ".join(differences[:5]) + more,
            way_out="give the model that the task's file builds",
        )
    model.load_state_dict(state, strict=False)


def _restored(module: nn.Module | None, key: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim == 2:
        return tensor.T.contiguous()
    if not isinstance(module, QuantizedLayer):
        return tensor
    if key.endswith(".zeros"):
        groups = module.scales.shape[1]
        return (
            unpack(tensor[None], groups * module.scales.shape[0], symmetric=False)
            .reshape(groups, -1)
            .T.contiguous()
        )
    codes = unpack(tensor[None], module.inputs * module.scales.shape[0], symmetric=False)
    return pack(codes.reshape(module.inputs, -1).T)
