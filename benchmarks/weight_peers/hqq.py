"""HQQ: scales and zeros by half-quadratic splitting, without any data; zeros are float16, as its scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.weight_peers._job import Done, Job, bytes_of, layers, load, timed

ENVIRONMENT = ".venv-peers"
PACKAGES = ("hqq", "torch", "transformers")
VARIANTS: Mapping[str, Mapping[str, Any]] = {"hqq": {"group_size": 32}, "hqq_64": {"group_size": 64}}


def settings(name: str, bits: int, kind: str) -> dict[str, Any] | str:
    """What is told to BaseQuantizeConfig."""
    return {"nbits": bits, "axis": 1, **VARIANTS[name]}


def run(job: Job) -> Done:
    """Quantize each layer, decode it, and count what its state holds."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    found = layers(load(job))
    config = BaseQuantizeConfig(**job.settings)

    def quantized() -> dict[str, Any]:
        return {
            name: HQQLinear(layer, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
            for name, layer in found.items()
        }

    changed, seconds = timed(quantized)
    weights = {name: layer.dequantize().view_as(found[name].weight) for name, layer in changed.items()}
    stored = sum(bytes_of([layer.W_q, layer.meta["scale"], layer.meta["zero"]]) for layer in changed.values())
    return Done(weights, stored, seconds)
