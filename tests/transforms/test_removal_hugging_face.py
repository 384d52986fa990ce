"""Heads and neurons taken out of tiny transformers of many makes: what is left computes what it should, and trains."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from flyweight.analysis.answers import answer, vocabularies_of
from flyweight.analysis.coupling import couple
from flyweight.inputs.check import call
from flyweight.transforms._removal import proven, refuted, removed

pytestmark = pytest.mark.heavy

COMMON = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 67,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CAUSAL = {**COMMON, "use_cache": False}
GQA = {**CAUSAL, "num_key_value_heads": 2}
GPT = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 67,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, dict[str, object], set[str]]] = {
    "llama": ("LlamaForCausalLM", GQA, {"heads", "neurons"}),
    "mistral": ("MistralForCausalLM", GQA, {"heads", "neurons"}),
    "qwen2": ("Qwen2ForCausalLM", GQA, {"heads", "neurons"}),
    "gemma3": ("Gemma3ForCausalLM", {**GQA, "head_dim": 8}, {"heads", "neurons"}),
    "phi": ("PhiForCausalLM", CAUSAL, {"heads", "neurons"}),
    "gpt2": ("GPT2LMHeadModel", GPT, {"heads", "neurons"}),
    "gpt_neox": ("GPTNeoXForCausalLM", CAUSAL, {"heads", "neurons"}),
    "opt": ("OPTForCausalLM", {**CAUSAL, "ffn_dim": 64, "word_embed_proj_dim": 32}, {"heads", "neurons"}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 67, "use_cache": False},
              {"neurons"}),  # its positions are spread over the number of heads
    "mixtral": ("MixtralForCausalLM", {**GQA, "num_local_experts": 4}, {"heads"}),
    "bert": ("BertModel", COMMON, {"heads", "neurons"}),
    "roberta": ("RobertaModel", COMMON, {"heads", "neurons"}),
    "electra": ("ElectraModel", {**COMMON, "embedding_size": 32}, {"heads", "neurons"}),
    "albert": ("AlbertModel", {**COMMON, "embedding_size": 16}, {"heads", "neurons"}),
    "distilbert": ("DistilBertModel", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 67},
                   {"heads", "neurons"}),
    "deberta_v2": ("DebertaV2Model", COMMON, {"heads", "neurons"}),
    "t5": ("T5EncoderModel", {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 67},
           {"heads", "neurons"}),
}  # fmt: skip


def built(name: str) -> nn.Module:
    kind, sizes, _ = MODELS[name]
    transformers = importlib.import_module("transformers")
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**sizes)).eval()
    for (
        parameter
    ) in model.parameters():  # as they come, they are so small that attention looks everywhere alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_parts_of_transformers_go(name: str) -> None:
    model, wanted = built(name), MODELS[name][2]
    batch = {"input_ids": torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))}
    coupling = proven(model, couple(model, batch), batch)
    assert coupling.reason == ""
    assert wanted <= {group.kind for group in coupling.groups}
    half = {group.name: range(0, group.units, 2) for group in coupling.groups}
    assert refuted(model, coupling.groups, half, batch) == ""
    small = removed(model, coupling.groups, half).train()
    loss = answer(call(small, batch), vocabularies_of(small)).tensors[0].square().mean()
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in small.parameters() if p.grad is not None)
    assert not couple(small.eval(), batch).reason
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
