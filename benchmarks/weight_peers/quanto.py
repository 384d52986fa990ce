"""optimum-quanto: rounding with the range of each group of inputs; 8 bits per channel, none of 3 bits.

Of a model in float16, so that scales take two bytes. Its own kernel that unpacks is built by a compiler when it is first
called, which can hang; a line of PyTorch stands in for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.weight_peers._job import Done, Job, bytes_of, layers, load, timed

ENVIRONMENT = ".venv-peers"
PACKAGES = ("optimum-quanto", "torch", "transformers")
VARIANTS: Mapping[str, Mapping[str, Any]] = {"quanto": {}}
_KINDS = {8: "qint8", 4: "qint4", 2: "qint2"}


def settings(name: str, bits: int, kind: str) -> dict[str, Any] | str:
    """What is told to quantize; the size of groups is quanto's own choice."""
    return {"weights": _KINDS[bits]} if bits in _KINDS else f"quanto has no {bits}-bit integers"


def run(job: Job) -> Done:
    """Quantize and freeze the layers, decode them, and count what is inside them."""
    from optimum import quanto
    from optimum.quanto.library.extensions.cpp import ext

    ext._lib = SimpleNamespace(unpack=_unpacked)
    model = load(job, {"dtype": torch.float16})
    names = list(layers(model))

    def quantized() -> None:
        quanto.quantize(model, weights=getattr(quanto, job.settings["weights"]), include=names)
        quanto.freeze(model)

    _, seconds = timed(quantized)
    changed = {name: model.get_submodule(name).get_parameter("weight") for name in names}
    stored = sum(bytes_of(_parts(weight)) for weight in changed.values())
    return Done({name: weight.dequantize().detach() for name, weight in changed.items()}, stored, seconds)


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The integers in bytes, those in the lowest bits of all first."""
    return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)])


def _parts(weight: Any) -> list[Any]:
    """The plain tensors inside a quantized one."""
    names, _ = weight.__tensor_flatten__() if hasattr(weight, "__tensor_flatten__") else ((), None)
    return [part for name in names for part in _parts(getattr(weight, name))] if names else [weight]
