"""A Llama whose hidden states are turned by a random orthogonal matrix, folded into its weights: it computes the same.

As in Ashkboos et al., QuaRot (arXiv 2404.00456, 2024), without the turns that would have to be computed while it runs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def rotated(model: Any, seed: int = 0) -> Any:
    """A copy of a Llama of transformers, turned; its head is no longer the embedding."""
    found = copy.deepcopy(model)
    inner = next(module for module in found.modules() if hasattr(module, "lm_head"))
    width = inner.config.hidden_size
    noise = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    turn = torch.linalg.qr(noise).Q
    table, head = inner.model.embed_tokens, inner.lm_head
    weight = head.weight.detach().clone()
    _write(table, table.weight.double() @ turn)
    inner.config.tie_word_embeddings = False
    head.weight = nn.Parameter(weight)
    _read_from(inner.model.norm, [head], turn)
    for block in inner.model.layers:
        attention, feed = block.self_attn, block.mlp
        _read_from(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], turn)
        _read_from(block.post_attention_layernorm, [feed.gate_proj, feed.up_proj], turn)
        for layer in (attention.o_proj, feed.down_proj):
            _write(layer, turn.T @ layer.weight.double())
    return found


def _read_from(norm: Any, layers: list[Any], turn: torch.Tensor) -> None:
    """Move a norm's gain, and the turn, into the layers that read what it gives."""
    for layer in layers:
        _write(layer, layer.weight.double() * norm.weight.double() @ turn)
    norm.weight = nn.Parameter(torch.ones_like(norm.weight))


def _write(layer: Any, weight: torch.Tensor) -> None:
    layer.weight = nn.Parameter(weight.float().detach())
