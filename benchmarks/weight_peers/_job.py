"""What a peer is asked, what it answers, and what all of them need: the model, the layers, the clock, the bytes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model, one peer, one width."""

    peer: str
    kind: str
    """causal: a language model; encoder: a text encoder."""
    bits: int
    model: str
    """A Hugging Face folder with safetensors weights."""
    examples: str
    """A safetensors file with the tensors of each calibration batch, by "number.name"."""
    out: str
    """The folder that takes weights.safetensors and done.json."""
    threads: int
    settings: Mapping[str, Any]

    @property
    def scratch(self) -> Path:
        """A folder for the tool's own files."""
        path = Path(self.out) / "scratch"
        path.mkdir(parents=True, exist_ok=True)
        return path


@dataclass(frozen=True)
class Done:
    """What came out."""

    weights: Mapping[str, torch.Tensor]
    """Of each quantized layer, by its path in the model: float32, in the layer's own shape."""
    bytes: int
    """What the tool keeps for those: integers, scales, zeros and whatever else belongs to a layer's weight."""
    seconds: float
    """From the loaded model to the quantized one; without imports, loading and saving."""


def read_job(path: Path) -> Job:
    """The job in a JSON file."""
    return Job(**json.loads(path.read_text()))


def write_done(job: Job, done: Done) -> None:
    """Write the weights, then the JSON, which so is there only when all is."""
    out = Path(job.out)
    save_file(
        {name: weight.float().contiguous() for name, weight in done.weights.items()},
        out / "weights.safetensors",
    )
    entries = sum(weight.numel() for weight in done.weights.values())
    found = {"seconds": done.seconds, "bytes": done.bytes, "entries": entries, "layers": len(done.weights)}
    (out / "done.new").write_text(json.dumps(found))
    (out / "done.new").rename(out / "done.json")


def load(job: Job, told: Mapping[str, Any] | None = None, folder: str | Path | None = None) -> Any:
    """The job's model in eval mode and float32, or that of another folder; told: what else from_pretrained is told."""
    import transformers

    causal = job.kind == "causal"
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    asked = {"dtype": torch.float32, **({} if causal else {"add_pooling_layer": False}), **(told or {})}
    model: Any = kind.from_pretrained(folder or job.model, local_files_only=True, **asked).eval()
    if causal:
        model.config.use_cache = False
    return model


def examples(job: Job) -> list[dict[str, torch.Tensor]]:
    """The calibration batches, in order."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(job.examples).items():
        number, _, key = name.partition(".")
        found.setdefault(int(number), {})[key] = tensor
    return [found[number] for number in sorted(found)]


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks, by path: all but the head, which shares the embedding's weight or is `lm_head`."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work returns, and the seconds it took."""
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors' contents."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bytes_in(folder: Path, paths: Iterable[str]) -> int:
    """Bytes of the tensors that safetensors files below a folder hold for the weights of layers, biases left out."""
    starts, total = tuple(f"{path}." for path in paths), 0
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as held:
            kept = [n for n in held.keys() if n.startswith(starts) and not n.endswith(".bias")]  # noqa: SIM118
            total += bytes_of(held.get_tensor(name) for name in kept)
    return total
