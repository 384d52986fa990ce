"""Small models of many makes with an example each: 28 architectures of transformers and some more, random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from flyweight.records import Batch

_VOCABULARY = 97
_ENCODER: dict[str, Any] = {
    "hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 10,
    "vocab_size": _VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_CAUSAL = {**_ENCODER, "use_cache": False}
_GROUPED = {**_CAUSAL, "hidden_size": 80, "num_attention_heads": 20, "num_key_value_heads": 10}
_GPT = {
    "n_embd": 40, "n_layer": 2, "n_head": 10, "vocab_size": _VOCABULARY, "use_cache": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_BART = {
    "d_model": 40, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 10, "decoder_attention_heads": 10,
    "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "use_cache": False,
}  # fmt: skip
_ROTATED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
MAKES: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "GPT2": ("GPT2LMHeadModel", _GPT),
        "Llama": ("LlamaForCausalLM", _GROUPED),
        "Mistral": ("MistralForCausalLM", _GROUPED),
        "Qwen2": ("Qwen2ForCausalLM", _GROUPED),
        "Qwen3": ("Qwen3ForCausalLM", {**_GROUPED, "head_dim": 4}),
        "Gemma3": ("Gemma3ForCausalLM", {**_GROUPED, "head_dim": 4}),
        "Phi": ("PhiForCausalLM", _CAUSAL),
        "Phi3": ("Phi3ForCausalLM", _GROUPED),
        "OPT": ("OPTForCausalLM", {**_CAUSAL, "ffn_dim": 80, "word_embed_proj_dim": 40}),
        "GPTNeoX": ("GPTNeoXForCausalLM", {**_CAUSAL, "num_attention_heads": 5}),
        "Bloom": (
            "BloomForCausalLM",
            {"hidden_size": 40, "n_layer": 2, "n_head": 10, "vocab_size": _VOCABULARY, "use_cache": False},
        ),
        "Mixtral": ("MixtralForCausalLM", {**_GROUPED, "num_local_experts": 10}),
        "Mamba": (
            "MambaForCausalLM",
            {"hidden_size": 20, "state_size": 10, "num_hidden_layers": 2, "vocab_size": _VOCABULARY, "use_cache": False},
        ),
        "RWKV": (
            "RwkvForCausalLM",
            {
                "hidden_size": 20, "attention_hidden_size": 20, "num_hidden_layers": 2, "vocab_size": _VOCABULARY,
                "context_length": 16, "use_cache": False,
            },
        ),
        "BERT": ("BertModel", _ENCODER),
        "RoBERTa": ("RobertaModel", _ENCODER),
        "DistilBERT": (
            "DistilBertModel",
            {"dim": 40, "hidden_dim": 80, "n_layers": 2, "n_heads": 10, "vocab_size": _VOCABULARY},
        ),
        "ELECTRA": ("ElectraModel", {**_ENCODER, "embedding_size": 40}),
        "ALBERT": ("AlbertModel", {**_ENCODER, "embedding_size": 20}),
        "DeBERTa-v2": (
            "DebertaV2Model",
            {**_ENCODER, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["c2p", "p2c"]},
        ),
        "ModernBERT": ("ModernBertModel", {**_ENCODER, "cls_token_id": 3, "sep_token_id": 4}),
        "BART": ("BartModel", {**_BART, "vocab_size": _VOCABULARY}),
        "T5": (
            "T5ForConditionalGeneration",
            {
                "d_model": 40, "d_ff": 80, "num_layers": 2, "num_heads": 10, "d_kv": 4, "vocab_size": _VOCABULARY,
                "use_cache": False,
            },
        ),
        "Whisper": (
            "WhisperForConditionalGeneration",
            {
                **_BART, "vocab_size": _VOCABULARY, "num_mel_bins": 10, "max_source_positions": 20,
                "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                "decoder_start_token_id": 3,
                "suppress_tokens": None, "begin_suppress_tokens": None,
            },
        ),
        "ViT": (
            "ViTForImageClassification",
            {
                "hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 10,
                "image_size": 32, "patch_size": 8,
            },
        ),
        "Swin": (
            "SwinForImageClassification",
            {"image_size": 32, "patch_size": 2, "embed_dim": 20, "depths": [2, 2], "num_heads": [5, 10], "window_size": 4},
        ),
        "ResNet": (
            "ResNetForImageClassification",
            {"embedding_size": 20, "hidden_sizes": [20, 40, 40, 40], "depths": [1, 2, 1, 1], "layer_type": "basic"},
        ),
        "ConvNext": ("ConvNextForImageClassification", {"hidden_sizes": [20, 40, 40, 40], "depths": [1, 2, 1, 1]}),
        "MobileNetV2": (
            "MobileNetV2ForImageClassification",
            {"image_size": 32, "depth_multiplier": 0.35, "finegrained_output": True},
        ),
        "EfficientNet": (
            "EfficientNetForImageClassification",
            {
                "image_size": 32, "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640,
                "dropout_rate": 0.0,
            },
        ),
    }
)  # fmt: skip
"""The class of transformers and its sizes, by name."""


def built(name: str) -> nn.Module:
    """A new model of MAKES in eval mode, the same at each call; KeyError for an unknown name."""
    kind, sizes = MAKES[name]
    cls = getattr(importlib.import_module("transformers"), kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = cls(cls.config_class(**sizes)).eval()
        with torch.no_grad():  # as they come, weights are so small that attention looks everywhere alike
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
                else:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model


def example(name: str) -> Batch:
    """Two samples for a model of MAKES, the same at each call."""
    source = torch.Generator().manual_seed(1)
    if name == "Whisper":
        sound = torch.randn(2, 10, 40, generator=source)
        return {"input_features": sound, "decoder_input_ids": torch.randint(4, 90, (2, 7), generator=source)}
    if "ForImageClassification" in MAKES[name][0]:
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=source)}
    tokens = torch.randint(5, 90, (2, 7), generator=source)
    return {"input_ids": tokens, **({"decoder_input_ids": tokens[:, :5]} if name in ("BART", "T5") else {})}


def cases() -> Mapping[str, Callable[[], tuple[nn.Module, Batch]]]:
    """Every model with its example: those of MAKES, of the convolutional families and of the zoo."""
    from flyweight.testing import families, zoo

    found: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {}
    for name in MAKES:
        found[name] = lambda name=name: (built(name), example(name))  # type: ignore[misc]
    for name in families.FAMILIES:
        found[f"family {name}"] = lambda name=name: (families.family(name), families.pictures(2))  # type: ignore[misc]
    for entry in zoo.ZOO:
        found[f"zoo {entry.name}"] = lambda entry=entry: (entry.build().eval(), entry.examples()[1])  # type: ignore[misc]
    return found
