"""A language model of Hugging Face as the metadata and tensors of a GGUF.

Stored integers go into the smallest of llama.cpp's types that holds them exactly; only their scales are rounded, to half
precision. What is stored for a block of llama.cpp's own goes there as it is. Floats are written as F16 where that loses
nothing, otherwise as F32. A tied head is not written: llama.cpp takes the embedding then.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flyweight.errors import ModelError
from flyweight.runtimes import _gguf
from flyweight.runtimes._gguf import Tensor, Value
from flyweight.runtimes._gguf_super import Layout, layout_of, pack
from flyweight.runtimes._gguf_vocab import no_vocabulary, vocabulary
from flyweight.transforms import QuantizedLayer

MODEL_TYPES = ("llama", "qwen2")
"""Families of models, by the name that Hugging Face and llama.cpp share."""
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_STATIC_ROPES = ("default", "linear", "llama3")
"""Rotary embeddings whose frequencies do not depend on the input."""
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


def save(model: nn.Module, path: Path, tokenizer: Any = None) -> None:
    """Write a causal language model of a family in MODEL_TYPES as a GGUF; it comes whole or not at all.

    Raises what `contents` does.
    """
    _gguf.write(path, *contents(model, tokenizer))


def contents(model: nn.Module, tokenizer: Any = None) -> tuple[dict[str, Value], list[Tensor]]:
    """The metadata and tensors of a model's GGUF.

    tokenizer: a fast byte-level BPE tokenizer of transformers; without one the file has no vocabulary and takes token
    numbers only. Raises ModelError, with the layer, when a GGUF cannot hold the model.
    """
    found = [*_tensors(model), *_rope(model)]
    _check_complete(model, {tensor.name for tensor in found})
    size = _rows(model.get_submodule(_EMBEDDING))
    words = no_vocabulary() if tokenizer is None else vocabulary(tokenizer, size)
    return {**_metadata(cast(Any, model).config, size), **words}, found


def causal(model: nn.Module) -> nn.Module:
    """The causal language model that a model is, or wraps; raises ModelError when there is not exactly one."""
    found = causals(model)
    if len(found) != 1:
        raise ModelError(
            f"llama.cpp runs causal language models of Hugging Face, {' or '.join(MODEL_TYPES)}",
            got=type(model).__name__,
            way_out="choose another runtime",
        )
    return found[0]


def causals(model: nn.Module) -> list[nn.Module]:
    """The causal language models in a model of which llama.cpp knows the family."""
    return [m for m in model.modules() if _family(m) in MODEL_TYPES and hasattr(m, _HEAD)]


def _family(module: nn.Module) -> str:
    return str(getattr(getattr(module, "config", None), "model_type", ""))


def _metadata(config: Any, size: int) -> dict[str, Value]:
    _check_config(config)
    family, heads = config.model_type, int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    said: dict[str, Value] = {
        "block_count": int(config.num_hidden_layers),
        "context_length": int(config.max_position_embeddings),
        "embedding_length": int(config.hidden_size),
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.num_key_value_heads or heads),
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": width,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": size,
    }
    general: dict[str, Value] = {"general.architecture": family, "general.quantization_version": 2}
    return {**general, **{f"{family}.{key}": value for key, value in said.items()}}


def _check_config(config: Any) -> None:
    """Raise ModelError for what llama.cpp computes otherwise than the model."""
    ropes = config.rope_parameters or {}
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    rules = (
        ("hidden_act", config.hidden_act == "silu", "silu", config.hidden_act),
        ("rope_type", ropes.get("rope_type") in _STATIC_ROPES, " or ".join(_STATIC_ROPES), ropes),
        ("layer_types", kinds == {"full_attention"}, "full_attention", sorted(kinds)),
        ("partial_rotary_factor", ropes.get("partial_rotary_factor", 1.0) == 1.0, "1", ropes),
    )
    for name, holds, rule, got in rules:
        if not holds:
            raise ModelError(f"for llama.cpp {name} must be {rule}", got=str(got), where="the model's config")


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a causal language model that a GGUF may hold tensors of, by path; a tied head is left out."""
    quantized = [path for path, m in model.named_modules() if isinstance(m, QuantizedLayer)]
    inside = tuple(f"{path}." for path in quantized) or ("\0",)
    for path, module in model.named_modules():
        if not path.startswith(inside) and not (path == _HEAD and _tied(model)):
            yield path, module


def floats(module: nn.Module) -> dict[str, torch.Tensor]:
    """A layer's own tensors that are stored as floats, by llama.cpp's names for them."""
    if isinstance(module, QuantizedLayer):
        return {} if module.bias is None else {"bias": module.bias}
    return dict(module.named_parameters(recurse=False))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """The layers' tensors in the model's order."""
    for path, module in layers(model):
        if isinstance(module, QuantizedLayer):
            yield _integers(path, module, order(model, path))
        for name, tensor in floats(module).items():
            yield _floats(f"{name_of(path)}.{name}", tensor, order(model, path))


def name_of(path: str) -> str:
    """llama.cpp's name of a layer; raises ModelError when it has none."""
    if path in _OUTER:
        return _OUTER[path]
    parts = path.split(".", 3)
    if parts[:2] == ["model", "layers"] and len(parts) == 4 and parts[3] in _INNER:
        return f"blk.{parts[2]}.{_INNER[parts[3]]}"
    raise ModelError("llama.cpp must know every layer that has parameters", got=path or "the model itself")


def _tied(model: nn.Module) -> bool:
    """Whether head and embedding are one tensor."""
    pair = [model.get_submodule(path) for path in (_EMBEDDING, _HEAD)]
    one, two = (
        next(iter(m.stored().values())) if isinstance(m, QuantizedLayer) else cast(torch.Tensor, m.weight)
        for m in pair
    )
    return pair[0] is pair[1] or (one.data_ptr() == two.data_ptr() and one.shape == two.shape)


def order(model: nn.Module, path: str) -> NDArray[Any] | None:
    """llama.cpp's order of a layer's outputs, as the model's row numbers; None: the model's own.

    Rotary embeddings pair each head's first half with its second; llama.cpp pairs neighbours in models of type llama.
    """
    config = cast(Any, model).config
    if config.model_type != "llama" or not path.endswith(("q_proj", "k_proj")):
        return None
    heads = int(config.num_attention_heads if path.endswith("q_proj") else config.num_key_value_heads)
    rows = np.arange(_rows(model.get_submodule(path)))
    return rows.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _rows(layer: nn.Module) -> int:
    shape = layer.shape if isinstance(layer, QuantizedLayer) else cast(torch.Tensor, layer.weight).shape
    return int(shape[0])


def _floats(name: str, tensor: torch.Tensor, order: NDArray[Any] | None) -> Tensor:
    half = tensor.ndim > 1 and _gguf.lossless_half(_array(tensor))
    kind = _gguf.F16 if half else _gguf.F32

    def make() -> NDArray[Any]:
        values = _array(tensor)
        return _gguf.plain(kind, values if order is None else values[order])

    return Tensor(name, kind, tuple(tensor.shape), make)


def _integers(path: str, layer: QuantizedLayer, order: NDArray[Any] | None) -> Tensor:
    if layer.activations != "float":
        raise ModelError("llama.cpp rounds activations in its own way", got=layer.activations, where=path)
    layout = layout_of(layer.code, layer.options)
    if layout is not None:
        make = functools.partial(_blocks, layout, layer, order)
        return Tensor(f"{name_of(path)}.weight", layout.type, tuple(layer.shape), make)
    integers, grid = layer.encoded()
    if grid.table is not None or grid.columns is not None or grid.mask is not None:
        raise ModelError("a GGUF holds evenly spaced integers", got=f"the code {layer.code}", where=path)
    low, high = (int(end) for end in torch.aminmax(integers))
    kind = _gguf.fitting(low if grid.zeros is None else min(low, 0), high, grid.zeros is not None)
    if kind is None:
        got = f"{low} to {high}{'' if grid.zeros is None else ' with zero points'}"
        raise ModelError("a GGUF must have a type for a layer's integers", got=got, where=path)
    make = functools.partial(_packed, path, layer, kind, order)
    return Tensor(f"{name_of(path)}.weight", kind, tuple(layer.shape), make)


def _blocks(layout: Layout, layer: QuantizedLayer, order: NDArray[Any] | None) -> NDArray[Any]:
    packed = pack(layout, layer.stored(), layer.columns)
    return packed if order is None else packed[order]


def _packed(path: str, layer: QuantizedLayer, kind: _gguf.Type, order: NDArray[Any] | None) -> NDArray[Any]:
    encoded, grid = layer.encoded()
    integers = encoded.cpu().numpy()
    try:
        scales, minima = _gguf.halved(_array(grid.scales)), None
        if grid.zeros is not None:
            low = min(0, int(integers.min()))  # mostly 0: the zero points then come back exactly
            minima = _gguf.halved((low - _array(grid.zeros)) * scales)
            integers = integers - low
        rows = slice(None) if order is None else order
        return _gguf.pack(kind, integers[rows], scales[rows], None if minima is None else minima[rows])
    except ModelError as error:
        raise error.at(path) from None


def _rope(model: nn.Module) -> Iterator[Tensor]:
    """The factors by which the rotary frequencies are stretched, where they are."""
    config, rotary = cast(Any, model).config, cast(Any, model).model.rotary_emb
    inverse = rotary.inv_freq.double().cpu()
    powers = torch.arange(0, 2 * len(inverse), 2, dtype=torch.float64) / (2 * len(inverse))
    factors = (config.rope_parameters["rope_theta"] ** -powers / inverse).float()
    if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5):
        return
    if config.model_type != "llama" or rotary.attention_scaling != 1:
        got = str(config.rope_parameters)
        raise ModelError("llama.cpp stretches rotary embeddings of llama models only", got=got)
    yield _floats("rope_freqs.weight", factors, None)


def _check_complete(model: nn.Module, names: set[str]) -> None:
    """Raise ModelError when a layer of llama.cpp's has no weight: it is stored in a way that is not known here."""
    blocks = range(int(cast(Any, model).config.num_hidden_layers))
    wanted = {"token_embd.weight", "output_norm.weight"} | ({"output.weight"} if not _tied(model) else set())
    wanted |= {f"blk.{block}.{part}.weight" for block in blocks for part in _INNER.values()}
    if wanted - names:
        raise ModelError(
            "every layer must have a weight that a GGUF holds", got=f"none for {min(wanted - names)}"
        )


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return found
