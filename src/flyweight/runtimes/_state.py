"""A model's state as it is stored: every tensor once."""

from __future__ import annotations

import torch
from torch import nn


def unique_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict without the second and further names of tied tensors."""
    state = model.state_dict()
    return {key: state[key].detach().cpu() for key in dict.fromkeys(stored_keys(model).values())}


def stored_keys(model: nn.Module) -> dict[str, str]:
    """Every key of the model's state dict -> the key under which its tensor is stored: the first of a tied tensor's."""
    first: dict[tuple[int, int], str] = {}
    keys: dict[str, str] = {}
    for key, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.numel())
        keys[key] = first.setdefault(place, key) if tensor.numel() else key
    return keys
