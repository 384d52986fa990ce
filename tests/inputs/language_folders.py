"""Small Hugging Face folders made on the spot: a random Llama or BERT with a tokenizer whose tokens are bytes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 260
WORDS = (
    "the",
    "of",
    "and",
    "nation",
    "people",
    "shall",
    "government",
    "congress",
    "war",
    "peace",
    "public",
    "law",
)


def written(folder: Path, **changes: Any) -> Path:
    """A folder with a tied Llama of two layers and the tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    given: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**{**given, **changes})).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def encoder(folder: Path) -> Path:
    """A folder with a BERT, which sees what it predicts."""
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertLMHeadModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer(first: bool = False) -> Any:
    """A tokenizer with one token for each byte; first: it puts a mark in front of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {sign: place for place, sign in enumerate(signs)} | {"<s>": len(signs)}
    made = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if first:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", len(signs))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


def prose(length: int) -> str:
    """So many characters of words drawn at random, the same each time."""
    source = random.Random(0)
    return " ".join(source.choice(WORDS) for _ in range(length // 3))[:length]
