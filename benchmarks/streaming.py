"""Language models larger than memory: seconds and memory of `flyweight stream` by the size of the model.

    python -m benchmarks.streaming [--quick] [--sizes 1,2,4,8] [--type float32|bfloat16] [--keep FOLDER]

Makes Llamas of random weights that differ in depth alone, 1 to 8 GB of them, and puts each through 4 bits by error feedback
in a process of its own, which is given 2 GB of address space (RLIMIT_AS): what needs more ends there. Rows: the peak of
resident memory against the limit, and the seconds for a GB against those of the smallest model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import _results
from benchmarks._results import Row

GB = 10**9
LIMIT = 2 * 2**30
"""Bytes of address space."""
HIDDEN, INNER, HEADS, GROUPS = 2048, 2816, 16, 4
QUICK_HIDDEN, QUICK_INNER = 512, 1024
VOCABULARY = 259
SHARD = "1GB"
WINDOWS = 8
"""Of 256 tokens each: enough for the time and memory of a size, not for the best rounding."""


def main() -> None:
    """Make the models one after another, put each through, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models, a minute each")
    parser.add_argument("--sizes", help="GB, with commas between")
    parser.add_argument("--type", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--keep", type=Path, help="a folder for the models; without it they go")
    given = parser.parse_args()
    sizes = [float(size) for size in (given.sizes or ("0.05,0.1" if given.quick else "1,2,4,8")).split(",")]
    start = time.time()
    with tempfile.TemporaryDirectory(prefix="flyweight-streaming-") as made:
        root = given.keep or Path(made)
        found = {size: measured(root, size, given.type, quick=given.quick) for size in sizes}
    extra = {
        "limit_bytes": LIMIT,
        "type": given.type,
        "runs": {str(size): one for size, one in found.items()},
    }
    _results.write("streaming", rows(found), start, quick=given.quick, extra=extra)


def rows(found: dict[float, dict[str, Any]]) -> list[Row]:
    """The figures of each size: its memory against the limit, its time for a GB against the smallest model's."""
    least = min(found)
    pace = found[least]["processor_seconds"] / found[least]["gb"]
    result = []
    for size, one in found.items():
        case = f"{size:g} GB"
        peak = one["peak_bytes"]
        result.append(
            Row(
                case=case, metric="peak memory under the limit", unit="GB", better="lower", ours=peak / GB,
                reference=LIMIT / GB, aim=1.0,
            )
        )  # fmt: skip
        result.append(
            Row(
                case=case, metric="processor seconds per GB", unit="s/GB", better="lower",
                ours=one["processor_seconds"] / one["gb"], reference=pace, aim=1.25,
            )
        )  # fmt: skip
    return result


def measured(root: Path, size: float, kind: str, *, quick: bool) -> dict[str, Any]:
    """One model made and put through in a process of its own: {gb, seconds, peak_bytes, peak_address_bytes, layers}."""
    folder, out = root / f"model-{size:g}", root / f"out-{size:g}"
    if not (folder / "config.json").exists():
        make(folder, int(size * GB), kind, quick=quick)
    text = root / "text.txt"
    text.write_text(prose(400_000))
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.streaming", "--child", str(folder), str(text), str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{size:g} GB under {LIMIT / GB:.2f} GB of address space ended with {done.returncode}"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(out)
    print(f"{size:g} GB: {found}", flush=True)
    return found


def child(folder: Path, text: Path, out: Path) -> None:
    """Put one model through under the limit, and print its figures as JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    from flyweight.streaming import Options, stream

    done = stream(folder, text, out, Options(windows=WINDOWS), progress=True)
    said = Path("/proc/self/status").read_text().splitlines()
    figures = {
        line.split(":")[0]: 1024 * int(line.split()[1])
        for line in said
        if line.startswith(("VmHWM", "VmPeak"))
    }
    print(
        json.dumps(
            {
                "gb": done.bytes_before / GB, "seconds": done.seconds, "processor_seconds": time.process_time(),
                "peak_bytes": figures["VmHWM"],
                "peak_address_bytes": figures["VmPeak"], "blocks": done.blocks, "layers": done.layers,
                "bytes_after": done.bytes_after, "threads": os.environ.get("OMP_NUM_THREADS", ""),
            }
        )
    )  # fmt: skip


def make(folder: Path, nbytes: int, kind: str, *, quick: bool) -> None:
    """A Llama of about so many bytes of random weights, with a tokenizer of bytes; never more than a block in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner = (QUICK_HIDDEN, QUICK_INNER) if quick else (HIDDEN, INNER)
    dtype = getattr(torch, kind)
    given: dict[str, Any] = {
        "vocab_size": VOCABULARY + 1, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS, "max_position_embeddings": 1024, "tie_word_embeddings": False,
    }  # fmt: skip
    with torch.device("meta"):
        one = LlamaForCausalLM(LlamaConfig(**given, num_hidden_layers=1))
    shapes = {name: tuple(tensor.shape) for name, tensor in one.state_dict().items()}
    inside = {name: shape for name, shape in shapes.items() if ".layers.0." in name}
    block = sum(torch.Size(shape).numel() for shape in inside.values()) * dtype.itemsize
    depth = max(2, round(nbytes / block))
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    placed: dict[str, str] = {}

    def write(shard: str, wanted: dict[str, tuple[int, ...]]) -> None:
        tensors = {name: _random(shape, dtype) for name, shape in wanted.items()}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        placed.update(dict.fromkeys(tensors, shard))

    write("model-rest.safetensors", {name: shape for name, shape in shapes.items() if name not in inside})
    for index in range(depth):
        here = {name.replace(".layers.0.", f".layers.{index}."): shape for name, shape in inside.items()}
        write(f"model-block-{index:04d}.safetensors", here)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    byte_tokenizer().save_pretrained(folder)
    LlamaConfig(
        **given, num_hidden_layers=depth, architectures=["LlamaForCausalLM"], dtype=kind
    ).save_pretrained(folder)


def _random(shape: tuple[int, ...], dtype: Any) -> Any:
    """Weights that keep the size of what passes them; norms of ones."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return (torch.randn(shape) * (0.5 / shape[1] ** 0.5)).to(dtype)


def byte_tokenizer() -> Any:
    """A tokenizer with one token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={sign: place for place, sign in enumerate(signs)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def prose(length: int) -> str:
    """So many characters of words drawn at random, the same each time."""
    source = random.Random(0)
    words = [
        "the",
        "of",
        "and",
        "nation",
        "people",
        "shall",
        "government",
        "congress",
        "war",
        "peace",
        "public",
        "law",
    ]
    return " ".join(source.choice(words) for _ in range(length // 3))[:length]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*map(Path, sys.argv[2:]))
    else:
        main()
