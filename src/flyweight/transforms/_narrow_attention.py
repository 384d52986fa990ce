"""PyTorch's attention with fewer heads, or smaller ones, than its inputs are wide for.

`nn.MultiheadAttention` takes the width of its heads from that of its input, and so cannot lose a head by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ASKED = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
"""The arguments of nn.MultiheadAttention behind query, key and value, in their order."""


class NarrowAttention(nn.MultiheadAttention):
    """As nn.MultiheadAttention, but widths are those of the weights; queries are divided by what they were before."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
        """What the base class gives: values (L, B, E), or by `batch_first` and rank, and weights (B, L, S) or None."""
        asked = dict(zip(_ASKED, rest, strict=False)) | named
        last = self.out_proj.weight
        q, k, v = map(self._heads, self._longer(*self._projected(query, key, value, last.shape[1])))
        masks = self._masks(asked, k)
        chance, scale = self.dropout * self.training, self.head_dim**-0.5
        weights = None
        if asked.get("need_weights", True):
            weights = torch.softmax(sum(masks, q * scale @ k.transpose(-2, -1)), -1)
            mixed = F.dropout(weights, chance, self.training) @ v
            weights = weights.mean(1) if asked.get("average_attn_weights", True) else weights
            weights = weights if query.ndim == 3 else weights[0]
        else:
            mask = sum(masks[1:], masks[0]) if masks else None
            mixed = F.scaled_dot_product_attention(q, k, v, mask, chance, scale=scale)
        found = F.linear(mixed.transpose(1, 2).flatten(2), last, self.out_proj.bias)
        found = found if self.batch_first else found.transpose(0, 1)
        return found if query.ndim == 3 else found.squeeze(0 if self.batch_first else 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, mixed: int) -> Iterator[Tensor]:
        """Queries, keys and values (B, places, heads * width), the values `mixed` wide."""
        packed, own = self.in_proj_weight, (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        widths = _widths(self, mixed)
        if packed is not None and query is key is value:
            parts = F.linear(query, packed, self.in_proj_bias).split(widths, -1)
        else:
            weights = own if packed is None else packed.split(widths)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(widths)
            parts = tuple(map(F.linear, (query, key, value), weights, biases))
        for part in parts:
            batched = part if part.ndim == 3 else part.unsqueeze(0 if self.batch_first else 1)
            yield batched if self.batch_first else batched.transpose(0, 1)

    def _longer(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values with the places that belong to no input."""
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, more.expand(len(x), 1, -1)], 1)
                for x, more in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        found: Tensor = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return found

    def _masks(self, asked: dict[str, Any], k: Tensor) -> list[Tensor]:
        """What is added to the scores (B, heads, L, S): of each mask that there is, at the inputs' places."""
        found, given = [], [asked.get(name) for name in ("attn_mask", "key_padding_mask")]
        for mask, is_padding in zip(given, (False, True), strict=True):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=k.dtype).masked_fill(mask, float("-inf"))
            if is_padding:
                mask = mask.reshape(len(k), 1, 1, -1)
            elif mask.ndim == 3:
                mask = mask.unflatten(0, (len(k), self.num_heads))
            found.append(F.pad(mask, (0, k.shape[2] - mask.shape[-1])))
        return found


def narrow(model: nn.Module) -> None:
    """Let the attention of PyTorch in a model work with the widths that its weights now have."""
    for module in model.modules():
        if type(module) is nn.MultiheadAttention and not _is_as_made(module):
            module.__class__ = NarrowAttention
            module._qkv_same_embed_dim = (
                False  # keeps PyTorch from calls that read the weights by the old rule
            )
        if isinstance(module, NarrowAttention):
            module.embed_dim = len(module.out_proj.weight)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor &= not any(isinstance(m, NarrowAttention) for m in module.modules())


def _widths(attention: nn.MultiheadAttention, mixed: int) -> list[int]:
    """Of all heads' queries, keys and values, where those of the values are known."""
    packed, apart = attention.in_proj_weight, (attention.q_proj_weight, attention.k_proj_weight)
    asked = [(len(packed) - mixed) // 2] * 2 if packed is not None else [len(one) for one in apart]
    return [*asked, mixed]


def _is_as_made(attention: nn.MultiheadAttention) -> bool:
    """Whether the heads are as wide as the class believes."""
    packed, heads = attention.in_proj_weight, attention.num_heads * attention.head_dim
    queried = (attention.q_proj_weight if packed is None else packed).shape[1]
    given, mixed = attention.out_proj.weight.shape
    return {queried, given, attention.embed_dim} == {heads} and _widths(attention, mixed) == [heads] * 3
