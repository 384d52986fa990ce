"""The vocabulary of a tokenizer as a GGUF's metadata, as llama.cpp's own converter writes it."""

from __future__ import annotations

import json
from typing import Any

from flyweight.errors import ModelError
from flyweight.runtimes._gguf import Value

_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_WORDS % r"\p{N}{1,3}", "ByteLevel"): "llama-bpe",
    (_WORDS % r"\p{N}", "ByteLevel"): "qwen2",
}
"""llama.cpp's names of the ways to split a text into words."""
_IDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unk_token_id": "unknown_token_id",
    "pad_token_id": "padding_token_id",
}


def no_vocabulary() -> dict[str, Value]:
    """The metadata of a file that takes token numbers only."""
    return {"tokenizer.ggml.model": "no_vocab"}


def vocabulary(tokenizer: Any, size: int) -> dict[str, Value]:
    """The metadata of a fast byte-level BPE tokenizer of transformers, for a model with `size` tokens.

    Raises ModelError for other tokenizers, and when there are more words than the model has.
    """
    said = _description(tokenizer)
    added = {entry["id"]: entry for entry in said["added_tokens"]}
    words = {number: word for word, number in said["model"]["vocab"].items()}
    words |= {number: entry["content"] for number, entry in added.items()}
    if max(words, default=-1) >= size:
        rule = "the tokenizer must belong to the model"
        raise ModelError(rule, got=f"token {max(words)}, and a model of {size} tokens")
    kinds = [_kind(number, words, added) for number in range(size)]
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _split(said["pre_tokenizer"]),
        "tokenizer.ggml.tokens": [words.get(number, f"[PAD{number}]") for number in range(size)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [_merge(pair) for pair in said["model"]["merges"]],
    }
    return {**metadata, **_special(tokenizer)}


def _description(tokenizer: Any) -> Any:
    """The tokenizer's own JSON; raises ModelError when it is no byte-level BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = None if backend is None else json.loads(backend.to_str())
    if said is None or said["model"]["type"] != "BPE" or "ByteLevel" not in _parts(said["pre_tokenizer"]):
        raise ModelError(
            "a tokenizer must be a fast byte-level BPE to be written into a GGUF",
            got=type(tokenizer).__name__,
            way_out="leave it out: the file then takes token numbers",
        )
    return said


def _kind(number: int, words: dict[int, str], added: dict[int, Any]) -> int:
    if number not in words:
        return _UNUSED
    if number not in added:
        return _NORMAL
    return _CONTROL if added[number]["special"] else _USER


def _merge(pair: str | list[str]) -> str:
    """A merge's two parts with a space between; spaces within are written as the byte-level alphabet does."""
    return pair if isinstance(pair, str) else " ".join(part.replace(" ", "Ġ") for part in pair)


def _split(pre_tokenizer: Any) -> str:
    return _SPLITS.get(_parts(pre_tokenizer), "default")


def _parts(pre_tokenizer: Any) -> tuple[str, ...]:
    """The steps of a pre-tokenizer: the pattern of a split by pattern, the type's name of any other."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer] if pre_tokenizer else [])
    return tuple(str(step.get("pattern", {}).get("Regex", step["type"])) for step in steps)


def _special(tokenizer: Any) -> dict[str, Value]:
    """Numbers of the special tokens, whether the first and last are added to a text, and the chat template."""
    found: dict[str, Value] = {
        f"tokenizer.ggml.{name}": int(getattr(tokenizer, attribute))
        for attribute, name in _IDS.items()
        if getattr(tokenizer, attribute, None) is not None
    }
    ends = tokenizer("a")["input_ids"]
    found["tokenizer.ggml.add_bos_token"] = ends[0] == tokenizer.bos_token_id
    found["tokenizer.ggml.add_eos_token"] = ends[-1] == tokenizer.eos_token_id
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found
