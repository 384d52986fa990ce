"""Reads the JSON files of a Hugging Face folder strictly: they describe a model and a tokenizer, and nothing else.

What could make a reader run or fetch something is refused by its key, wherever it stands: classes outside of transformers,
kernels, chat templates, which are programs, and names of other files.
"""

from __future__ import annotations

from typing import Any

from flyweight.artifact._strict import damaged, parse, shown
from flyweight.runtimes._compressed_tensors import METHOD
from flyweight.runtimes._files import CONFIG
from flyweight.runtimes._hugging_face import names_code

MAX_JSON = 2**26
"""Bytes; a tokenizer of 256,000 tokens takes thirty million."""
_QUANTIZATION = frozenset(
    ("quant_method", "format", "quantization_status", "ignore", "config_groups", "dequantize")
)


def check(name: str, content: bytes) -> None:
    """Raise ArtifactError when a file beside the weights is no strict JSON object or says what it may not."""
    document = parse(content, name)
    if not isinstance(document, dict):
        raise damaged("the file must hold an object", got=shown(document), where=name)
    if name == "tokenizer.json":
        return  # words are keys there; the reader, a parser in Rust, knows no names of code or files
    for key in _keys(document):
        if names_code(key):
            raise damaged(
                "the file must not name code, kernels, templates or files", got=shown(key), where=name
            )
    if name == CONFIG and "quantization_config" in document:
        _check_quantization(document["quantization_config"])


def _check_quantization(said: Any) -> None:
    if not isinstance(said, dict) or said.get("quant_method") != METHOD or set(said) - _QUANTIZATION:
        got = shown(sorted(said) if isinstance(said, dict) else said)
        place = f"{CONFIG}, quantization_config"
        raise damaged(f"quantization is of the method {METHOD}", got=got, where=place)


def _keys(value: Any) -> list[str]:
    """Every key in a JSON value, however deep: `parse` has bounded that."""
    found: list[str] = []
    layer = [value]
    while layer:
        item = layer.pop()
        if isinstance(item, dict):
            found += item
            layer += item.values()
        elif isinstance(item, list):
            layer += item
    return found
