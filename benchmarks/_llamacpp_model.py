"""SmolLM2 for benchmarks/llamacpp.py: as it is, and made wider by zeros without changing what it computes."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flyweight import Task
from flyweight.inputs.language_model import language_task
from flyweight.runtimes import _gguf
from flyweight.runtimes._gguf_model import causal, contents

EXAMPLES = Path(__file__).parent.parent / "examples"
WIDTH = 256
"""Of a super-block."""


def smollm2(*, quick: bool) -> Task:
    """The model with its windows of text."""
    sys.path.insert(0, str(EXAMPLES))
    import smollm2

    folder = smollm2.prepared()
    counts = {"calibrating": 16, "judging": 8} if quick else {}
    return language_task(folder / "model", folder / "speeches.txt", **counts)


def padded(model: Any) -> Any:
    """The same function on hidden states that super-blocks divide: zeros, and heads that are zeros, fill them up.

    A norm of a Llama divides by the root of the mean square, which falls with the width, so its gain falls as well.
    """
    found = copy.deepcopy(model)
    inner = causal(found)
    config = inner.config
    width, heads = config.hidden_size, config.num_attention_heads
    size, shared = config.head_dim or width // heads, heads // config.num_key_value_heads
    wide = -(-width // WIDTH) * WIDTH
    attending = -(-heads * size // (WIDTH * shared)) * WIDTH * shared
    changed = {
        "hidden_size": wide, "head_dim": size, "num_attention_heads": attending // size,
        "num_key_value_heads": attending // size // shared, "rms_norm_eps": config.rms_norm_eps * width / wide,
    }  # fmt: skip
    larger = type(inner)(type(config)(**{**config.to_dict(), **changed})).eval()
    state = {key: torch.zeros_like(tensor) for key, tensor in larger.state_dict().items()}
    for key, tensor in inner.state_dict().items():
        gain = (width / wide) ** 0.5 if tensor.ndim == 1 else 1.0
        state[key][tuple(slice(0, length) for length in tensor.shape)] = tensor * gain
    larger.load_state_dict(state)
    larger.tie_weights()
    if inner is found:
        return larger
    found.model = larger
    return found


def original(model: Any, path: Path) -> None:
    """The model in half-precision floats."""
    metadata, tensors = contents(model)
    _gguf.write(path, metadata, [t if len(t.shape) == 1 else _halves(t) for t in tensors])


def _halves(tensor: _gguf.Tensor) -> _gguf.Tensor:
    def make() -> Any:
        return _gguf.plain(_gguf.F16, tensor.make().astype(np.float32))

    return dataclasses.replace(tensor, type=_gguf.F16, make=make)
