"""A model's state as it is stored: every tensor once."""

from __future__ import annotations

import torch
from torch import nn


def unique_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict without the second and further names of tied tensors."""
    seen: set[tuple[int, int]] = set()
    state: dict[str, torch.Tensor] = {}
    for key, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() == 0 or place not in seen:
            seen.add(place)
            state[key] = tensor.detach().cpu()
    return state
