"""llm-compressor's GPTQ: layer after layer behind the quantized ones, inputs in the order of their energy.

Groups of 32 with a zero point. The variant `gptq_mse` fits ranges by squared error, which is not its default. Saved in
float16, so that scales take two bytes, and read back as a user of the file reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.weight_peers._job import Done, Job, bytes_in, examples, layers, load, timed

ENVIRONMENT = ".venv-peers-llmcompressor"
PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")
VARIANTS: Mapping[str, Mapping[str, Any]] = {"gptq": {}, "gptq_mse": {"observer": "memoryless_mse"}}


def settings(name: str, bits: int, kind: str) -> dict[str, Any] | str:
    """The quantization of weights; the order and the damping are the tool's own."""
    group = {"strategy": "group", "group_size": 32, "symmetric": False}
    return {"num_bits": bits, "type": "int", **group, **VARIANTS[name]}


def run(job: Job) -> Done:
    """Calibrate and quantize, save, count the file's bytes, and load it again for its weights."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader
    from transformers import CompressedTensorsConfig

    model, batches = load(job), examples(job)
    names = list(layers(model))
    groups = {"group_0": {"targets": ["Linear"], "weights": dict(job.settings)}}
    told = {
        "recipe": GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        "dataset": DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
        "num_calibration_samples": len(batches),
        "shuffle_calibration_samples": False,
        "max_seq_length": max(batch["input_ids"].shape[1] for batch in batches),
    }
    _, seconds = timed(lambda: oneshot(model=model, **told))
    model.to(torch.float16).save_pretrained(job.scratch, save_compressed=True)
    decoded = {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    found = layers(load(job, decoded, job.scratch))
    weights = {name: found[name].get_parameter("weight").detach() for name in names}
    return Done(weights, bytes_in(job.scratch, names), seconds)
