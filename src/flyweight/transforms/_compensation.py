"""Layers that read fewer inputs than before take over what the missing ones gave, by least squares, and biases the means.

The new weight is what comes nearest to the old layer's output on the examples' own inputs (Hassibi and Stork, 1993; Kurtic et
al., "ZipLM", arXiv 2302.04089, 2023).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from flyweight.analysis.importance import DAMPING, input_axis, outputs_first
from flyweight.transforms._contract import Context


def compensated(
    model: nn.Module, kept: Mapping[str, Mapping[int, torch.Tensor]], context: Context
) -> dict[str, torch.Tensor]:
    """New values of weights and biases by name, in their old shapes; kept: the indices that stay, by name and axis.

    Columns of missing inputs are as they were. Layers of whose inputs nothing is known are left out, and so are weights that
    several modules hold.
    """
    holders: dict[int, int] = {}
    for parameter in dict(model.named_parameters(remove_duplicate=False)).values():
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    found: dict[str, torch.Tensor] = {}
    for path, layer in model.named_modules():
        axis, name = input_axis(layer), f"{path}.weight".lstrip(".")
        stay = kept.get(name, {}).get(-1 if axis is None else axis)
        if stay is not None and holders[id(layer.weight)] == 1:
            gram, seen = context.gram(path), context.statistics.get(path)
            bias = layer._parameters.get("bias")
            mean = seen.mean if seen is not None and bias is not None and holders[id(bias)] == 1 else None
            found |= _taken_over(layer, name, stay, gram, mean)
    return found


def _taken_over(
    layer: nn.Module, name: str, stay: torch.Tensor, gram: torch.Tensor | None, mean: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """A layer's new weight and bias: gram (I, I) and mean (1, I) of its inputs, stay (K,) along its weight's dimension."""
    own, wide = layer.get_parameter("weight"), outputs_first(layer).double()
    if gram is None or gram.shape != (wide.shape[1],) * 2:
        return {}
    kernel = wide.shape[1] // own.shape[input_axis(layer) or 0]
    columns = (stay[:, None] * kernel + torch.arange(kernel)).flatten()
    mask = torch.ones(wide.shape[1], dtype=torch.bool)
    mask[columns] = False
    middle = torch.zeros(wide.shape[1], dtype=torch.float64) if mean is None else mean.flatten().double()
    spread = gram.double() - torch.outer(middle, middle)
    shares = _shares(spread, mask)  # (missing, kept)
    new = wide.clone()
    new[:, ~mask] += wide[:, mask] @ shares
    shaped = new.T if input_axis(layer) == 0 else new.view(own.shape)
    found = {name: shaped.to(own.dtype)}
    if mean is not None:
        bias = layer.get_parameter("bias")
        lost = wide[:, mask] @ (middle[mask] - shares @ middle[~mask])
        found[f"{name.removesuffix('weight')}bias"] = (bias.detach().double() + lost).to(bias.dtype)
    return found


def _shares(spread: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """How the missing inputs follow from those that stay: (missing, kept)."""
    inner = spread[~gone][:, ~gone].clone()
    inner.diagonal().add_(DAMPING * float(spread.diagonal().mean()) or 1.0)
    shares: torch.Tensor = torch.linalg.solve(inner, spread[~gone][:, gone])
    return shares.T
