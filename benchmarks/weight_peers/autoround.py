"""AutoRound: rounding and ranges learned block after block by signed gradient descent.

Groups of 32 with a zero point, at 8 bits without, which it demands; saved in its own format, at 4 bits in AWQ's, which that
stands for there. Its own 200 steps of 8 windows take long on two cores; 50 steps of 4, at the rate it derives from that, are
for a comparison in minutes. `autoround_light` is its recipe of that name, `autoround_200` its default, `autoround_ext` adds
its extended algorithm, which it offers for 2 bits. It takes samples of one width: sentences are padded, with their masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.weight_peers._job import Done, Job, bytes_in, examples, layers, load, timed

ENVIRONMENT = ".venv-peers-autoround"
PACKAGES = ("auto-round", "torch", "transformers")
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "autoround": {"iters": 50, "batch_size": 4},
    "autoround_light": {"iters": 50, "batch_size": 8, "lr": 5e-3},
    "autoround_ext": {"iters": 50, "batch_size": 4, "enable_alg_ext": True},
    "autoround_200": {"iters": 200, "batch_size": 8},
}


def settings(name: str, bits: int, kind: str) -> dict[str, Any] | str:
    """All that is told to AutoRound besides the data."""
    return {"bits": bits, "group_size": 32, "sym": bits == 8, "data_type": "int", "seed": 0, **VARIANTS[name]}


def run(job: Job) -> Done:
    """Learn the rounding, take the weights as it leaves them, and save it to count the bytes."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    model, batches = load(job), _padded(examples(job))
    tokenizer = AutoTokenizer.from_pretrained(job.model, local_files_only=True)
    rounder, start = timed(
        lambda: AutoRound(
            model,
            tokenizer=tokenizer,
            dataset=batches,
            nsamples=sum(len(batch["input_ids"]) for batch in batches),
            seqlen=batches[0]["input_ids"].shape[1],
            device_map="cpu",
            enable_torch_compile=False,
            **job.settings,
        )
    )
    (quantized, _), seconds = timed(rounder.quantize)
    weights = {name: layer.weight.detach().clone() for name, layer in layers(quantized).items()}
    # 0.16.1 names AWQ's layer under "auto_round" at 4 bits, too, and then fails to pack it
    kind = "auto_awq" if job.bits == 4 else "auto_round"
    rounder.save_quantized(str(job.scratch), format=kind, inplace=True)
    return Done(weights, bytes_in(job.scratch, weights), start + seconds)


def _padded(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The batches, all as wide as the widest: zeros on the right."""
    width = max(batch["input_ids"].shape[1] for batch in batches)
    return [
        {name: nn.functional.pad(tensor, (0, width - tensor.shape[1])) for name, tensor in batch.items()}
        for batch in batches
    ]
