"""What flyweight does at each width of benchmarks/weight_codes.py: options as data, and how they are applied and timed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flyweight import Task, transforms
from flyweight.analysis import fisher, gram
from flyweight.analysis.sites import analyse
from flyweight.records import JSON, Plan, Step
from flyweight.runtimes._files import pack
from flyweight.session import FISHER

NAMES = ("nearest", "flyweight", "flyweight_tuned", "flyweight_entropy")
"""Rounding to nearest in the common format, our own in it, the same tuned block by block, and our own smallest files."""
CLOSE = 0.04
"""Bits by which a file may be smaller than asked."""
SOME = 9
"""One in so many layers tells how large all will be."""
SEEN = 5
"""Examples whose pass tells what layers there are, and how large their inputs."""
Layers = Mapping[str, Any]
"""Quantized layers by their paths."""


@dataclass(frozen=True)
class Ours:
    """What came out, told as a peer's answer is."""

    weights: Mapping[str, torch.Tensor]
    bytes: int
    seconds: float


def file_bits(bits: int) -> float:
    """Bits a weight of integers in groups of 32 with a float16 scale and a zero point of as many bits."""
    return bits + (16 + bits) / 32


def ours(name: str, bits: int) -> dict[str, JSON]:
    """The options at linear layers of the blocks: of `distilled` where they say how long to tune, else of `weight_only`."""
    common: dict[str, JSON] = {"bits": bits, "group": 32, "symmetric": False, "scale": "float16"}
    if name == "nearest":
        return {**common, "range": "minmax"}
    if name == "flyweight_entropy":
        return {"code": "entropy", "rounding": "waterfilling", "bits": min(7.0, file_bits(bits))}
    rounded: dict[str, JSON] = {**common, "rounding": "coordinate", "refit": True, "drift": 0.0, "sweeps": 2}
    return {**rounded, "block_passes": 1.0, "passes": 0.0} if name == "flyweight_tuned" else rounded


def quantize(task: Task, options: Mapping[str, JSON]) -> Ours:
    """The task's model with the options at every site but embeddings; the seconds are those of all that is learned, too."""
    start = time.perf_counter()
    analysis = analyse(task.model, task.examples[:SEEN], 0)
    sites = [s for s in analysis.sites if s.kind != "embedding" and not s.name.endswith("lm_head")]
    paths = [site.name for site in sites]
    context = transforms.Context(
        analysis.statistics,
        gram.lazily(task.model, paths, task.examples),
        rows=fisher.lazily(task.model, paths, task.examples[:FISHER], seed=0),
        examples=task.examples,
    )

    def layers(chosen: Mapping[str, JSON], some: Sequence[str]) -> Layers:
        method = "distilled" if "block_passes" in chosen else "weight_only"
        plan = Plan(tuple(Step(method, path, chosen) for path in some))
        changed = transforms.apply(task.model, plan, sites, context)
        return {path: changed.get_submodule(path) for path in some}

    if "bits" in options and options.get("rounding") == "waterfilling":
        found = on_one_level(layers, options, paths)
    else:
        found = layers(options, paths)
    seconds = time.perf_counter() - start
    return Ours({path: _decoded(layer) for path, layer in found.items()}, stored_bytes(found), seconds)


def on_one_level(
    layers: Callable[[Mapping[str, JSON], Sequence[str]], Layers],
    options: Mapping[str, JSON],
    paths: Sequence[str],
) -> Layers:
    """The layers on the one water level that makes the file as large as if each had the bits that the options say.

    Half the step is one bit more, so that a few tries on some of the layers find the level; what is too large or too small
    in the end is done again once.
    """
    wanted = float(str(options["bits"]))
    level = 1e-4
    found: Layers = {}
    for some in (paths[::SOME],) * 3 + (paths,) * 2:
        chosen = {name: value for name, value in options.items() if name != "bits"}
        found = layers({**chosen, "level": float(f"{level:.4g}")}, some)
        weights = sum(layer.encoded()[0].numel() for layer in found.values())
        over = 8 * stored_bytes(found) / weights - wanted
        if len(some) == len(paths) and -CLOSE <= over <= 0:
            break
        level *= 2 ** (over + CLOSE / 2)
    return found


def stored_bytes(layers: Mapping[str, Any]) -> int:
    """Bytes of the tensors that hold the layers' weights; of a code that is compressed on disk, of their compressed file."""
    tensors = {
        f"{path}.{key}": tensor for path, layer in layers.items() for key, tensor in layer.stored().items()
    }
    if all(layer.code != "entropy" for layer in layers.values()):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = Path(folder, "plain"), Path(folder, "packed")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, plain)
        pack(plain, packed)
        return packed.stat().st_size


def _decoded(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.weight.as_subclass(torch.Tensor)
    return weight.float()
