"""Small language models of Hugging Face, and what several tests do with them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from flyweight.codes import integer
from flyweight.transforms import QuantizedLayer, substitute

SIZES = {
    "vocab_size": 90, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "use_cache": False,
}  # fmt: skip
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip


def talker(family: str = "llama", rope: str = "default", **changes: Any) -> nn.Module:
    """A random model whose weights are large enough to matter and no half-precision numbers."""
    import transformers

    torch.manual_seed(0)
    config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[family]
    model = {"llama": transformers.LlamaForCausalLM, "qwen2": transformers.Qwen2ForCausalLM}[family]
    made = model(config(**{**SIZES, "rope_parameters": dict(ROPES[rope]), **changes})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1 if parameter.ndim == 1 else 0))
        made.tie_weights()
    return made


def tokens(texts: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(90, (texts, length), generator=torch.Generator().manual_seed(texts))


def rounded(
    model: nn.Module, bits: int, group: int | None = 32, symmetric: bool = True, scale: str = "float16"
) -> nn.Module:
    """The model with every linear layer inside its blocks stored as integers, which a GGUF holds exactly in float16."""
    options = integer.Options(bits=bits, group=group, symmetric=symmetric, scale=scale)
    layers = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in p}
    return substitute(model, {path: stored(layer, options) for path, layer in layers.items()}).eval()


def stored(layer: nn.Module, options: integer.Options) -> QuantizedLayer:
    """The layer as integers; with zero points, scales are powers of two: their products need no more than half precision."""
    weight = layer.get_parameter("weight").detach()
    grid = integer.fit(weight, options)
    if grid.zeros is not None:
        grid = dataclasses.replace(grid, scales=torch.exp2(grid.scales.log2().round()))
    return QuantizedLayer(layer, "integer", options, (grid.nearest(weight), grid), transposed=False)


class Wrapped(nn.Module):
    """A model whose output is the logits alone, times a factor."""

    def __init__(self, model: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.language, self.factor = model, factor

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.language(input_ids, attention_mask=attention_mask).logits * self.factor


TEXT = "When the 27 ships sailed in 1963, they'd no map;\n\n the captain's   cat knew: 3,000 miles, naïve ☕ and 日本!"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {"llama-bpe": _WORDS % r"\p{N}{1,3}", "qwen2": _WORDS % r"\p{N}", "default": r"\p{L}+"}


def words(split: str = "smollm") -> Any:
    """A small fast tokenizer, trained on TEXT, that splits texts in one of llama.cpp's ways."""
    import tokenizers
    import transformers
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in ("gpt-2", "smollm"))
    steps: list[Any] = [byte_level]
    if split == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    elif split in _PATTERNS:
        pattern = tokenizers.Regex(_PATTERNS[split])
        steps = [pre_tokenizers.Split(pattern, behavior="isolated"), byte_level]
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = steps[0] if split == "gpt-2" else pre_tokenizers.Sequence(steps)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([TEXT] * 3, trainer)
    made.add_tokens(["<user>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
