"""GGUF files: our roundings beside llama.cpp's own quantizer, same types, same bytes, run by the same llama.cpp.

    python -m benchmarks.llamacpp [--quick] [--keep FOLDER]

The model is SmolLM2-135M, de-gridded (examples/smollm2.py). llama.cpp's files come from its own `ggml_quantize_chunk`,
tensor after tensor, in the types that its quantizer takes: the tied embedding in Q8_0, the layers in the type asked for; once
as it quantizes by itself, and once with an importance matrix from the windows that calibrate ours. All files are read by
llama.cpp and compared by KL to the original in PyTorch, on held-out windows, in nats a token; by bytes; and by tokens a
second, all of them and PyTorch in turn.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._results import Row, write
from flyweight import Task, transforms
from flyweight.analysis import gram
from flyweight.analysis.machine import cores
from flyweight.analysis.sites import Analysis, analyse
from flyweight.evaluation import generation, language
from flyweight.inputs.language_model import language_task
from flyweight.records import JSON, Plan, Step
from flyweight.runtimes import _gguf, _llama
from flyweight.runtimes._gguf_model import causal, contents, save
from flyweight.runtimes.llamacpp import Reader
from flyweight.runtimes.torch import caller

EXAMPLES = Path(__file__).parent.parent / "examples"
TYPES: Mapping[str, Mapping[str, JSON]] = {
    "Q8_0": {"bits": 8, "group": 32, "scale": "float16"},
    "Q4_1": {"bits": 4, "group": 32, "symmetric": False, "scale": "float16"},
    "Q4_0": {"bits": 4, "group": 32, "full": True, "scale": "float16"},
}
"""The options of weight_only that give a type."""
ROUNDINGS: Mapping[str, Mapping[str, JSON]] = {
    "nearest": {},
    "error feedback": {"rounding": "error_feedback", "drift": 0.0},
    "error feedback, drift": {"rounding": "error_feedback", "drift": 0.5},
}
BEST = "error feedback, drift"
PEERS = ("llama.cpp", "llama.cpp, importance")
KL_AIM, SPEED_AIM = 0.7, 0.97
PROMPT, WRITTEN = 128, 32
RESAMPLES = 2000


def main() -> None:
    """Make all files, compare them, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer windows and rounds; writes elsewhere")
    parser.add_argument("--keep", type=Path, help="a folder for the files; without it they go")
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    given = parser.parse_args()
    start = time.time()
    torch.set_num_threads(cores())
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    task = _task(quick=given.quick)
    with tempfile.TemporaryDirectory(prefix="flyweight-llamacpp-") as made:
        files, seconds = _files(task, given.keep or Path(made))
        readers = {name: Reader.open(file, 512) for name, file in files.items()}
        losses = _losses(task, readers)
        speeds = _speeds(task, readers, 3 if given.quick else 9)
        bytes_ = {name: file.stat().st_size for name, file in files.items()}
    rows = [row for kind in TYPES for row in _rows(kind, bytes_, losses, speeds)]
    details = {name: _details(name, bytes_, losses, speeds, seconds) for name in speeds}
    write("llamacpp", rows, start, quick=given.quick, extra={"details": details})


def _task(*, quick: bool) -> Task:
    sys.path.insert(0, str(EXAMPLES))
    import smollm2

    folder = smollm2.prepared()
    counts = {"calibrating": 16, "judging": 8} if quick else {}
    return language_task(folder / "model", folder / "speeches.txt", **counts)


def _files(task: Task, folder: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """Every file by its name, "F32" or type and who made it, and the seconds that making it took."""
    folder.mkdir(parents=True, exist_ok=True)
    analysis = analyse(task.model, task.examples, 0)
    energies = {site: seen.energy for site, seen in analysis.statistics.items()}
    paths = [site.name for site in analysis.sites if site.kind != "embedding"]
    context = transforms.Context(
        analysis.statistics, gram.lazily(task.model, paths, task.examples), examples=task.examples
    )
    jobs: dict[str, Callable[[Path], None]] = {
        name: functools.partial(_original, causal(task.model), kind=kind)
        for name, kind in (("F32", _gguf.F32), ("F16", _gguf.F16))
    }
    for kind, options in TYPES.items():
        jobs[f"{kind} {PEERS[0]}"] = functools.partial(_theirs, task, kind, {})
        if kind != "Q8_0":  # an importance matrix changes nothing there
            jobs[f"{kind} {PEERS[1]}"] = functools.partial(_theirs, task, kind, energies)
        for name, rounding in ROUNDINGS.items():
            given = {**options, **rounding}
            jobs[f"{kind} {name}"] = functools.partial(_ours, task, analysis, context, given)
    found, seconds = {}, {}
    for name, job in jobs.items():
        print(f"making {name}", file=sys.stderr, flush=True)
        found[name], begin = folder / f"{name.replace(' ', '_')}.gguf", time.perf_counter()
        job(found[name])
        seconds[name] = time.perf_counter() - begin
    return found, seconds


def _original(model: Any, path: Path, kind: _gguf.Type) -> None:
    """The model in floats."""
    metadata, tensors = contents(model)
    _gguf.write(path, metadata, [t if len(t.shape) == 1 else _as_floats(t, kind) for t in tensors])


def _as_floats(tensor: _gguf.Tensor, kind: _gguf.Type) -> _gguf.Tensor:
    def make() -> Any:
        return _gguf.plain(kind, tensor.make().astype(np.float32))

    return dataclasses.replace(tensor, type=kind, make=make)


def _ours(task: Task, analysis: Analysis, context: Any, options: Mapping[str, JSON], path: Path) -> None:
    """The options at every linear layer, and the tied embedding in 8 bits to nearest, as in llama.cpp's files."""
    plan = Plan(
        tuple(
            Step("weight_only", site.name, TYPES["Q8_0"] if _is_embedding(site.name) else options)
            for site in analysis.sites
        )
    )
    save(causal(transforms.apply(task.model, plan, analysis.sites, context)), path)


def _is_embedding(name: str) -> bool:
    return name.endswith(("embed_tokens", "lm_head"))


def _theirs(task: Task, kind: str, energies: Mapping[str, Any], path: Path) -> None:
    """What llama.cpp's quantizer makes; energies: of the layers' inputs, by site, the importance matrix."""
    known = {t.name: t for t in (*_gguf.INTEGERS, _gguf.F32)}
    metadata, tensors = contents(causal(task.model))
    importance = {_tensor_name(site): energy for site, energy in energies.items() if energy is not None}

    def quantized(tensor: _gguf.Tensor) -> _gguf.Tensor:
        if len(tensor.shape) == 1:
            return tensor
        into = known["Q8_0" if tensor.name == "token_embd.weight" else kind]
        make = functools.partial(_chunk, tensor, into, importance.get(tensor.name))
        return dataclasses.replace(tensor, type=into, make=make)

    _gguf.write(path, metadata, [quantized(tensor) for tensor in tensors])


def _tensor_name(site: str) -> str:
    from flyweight.runtimes._gguf_model import name_of

    return f"{name_of(site.removeprefix('model.'))}.weight"


def _chunk(tensor: _gguf.Tensor, kind: _gguf.Type, importance: torch.Tensor | None) -> Any:
    """The rows of a tensor as llama.cpp quantizes them."""
    quantize = _llama.load().ggml_quantize_chunk
    pointers = [ctypes.c_void_p] * 2
    quantize.argtypes = [ctypes.c_int, *pointers, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    quantize.restype = ctypes.c_size_t
    rows, columns = tensor.shape
    values = np.ascontiguousarray(tensor.make(), np.float32)
    found = np.empty((rows, columns // kind.length * kind.bytes), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance.numpy(), np.float32)
    place = None if weights is None else weights.ctypes.data
    written = quantize(kind.number, values.ctypes.data, found.ctypes.data, 0, rows, columns, place)
    if written != found.nbytes:
        raise ValueError(f"llama.cpp wrote {written} bytes of {tensor.name}, not {found.nbytes}")
    return found


def _losses(task: Task, readers: Mapping[str, Reader]) -> dict[str, np.ndarray[Any, Any]]:
    """KL to the original in nats a token, of each held-out window, by file."""
    original, windows = caller(task.model), task.score.windows  # type: ignore[attr-defined]
    found: dict[str, list[float]] = {name: [] for name in readers}
    for window in windows:
        wanted = original(window[None])
        for name, reader in readers.items():
            reader.forget()
            logits = torch.from_numpy(reader.read_all(window.tolist()))[None]
            found[name].append(language.kl(lambda _: wanted, lambda _: logits, [window]).value)  # noqa: B023
    return {name: np.array(values) for name, values in found.items()}


def _speeds(task: Task, readers: Mapping[str, Reader], turns: int) -> dict[str, list[generation.Speed]]:
    """Each file's speed and PyTorch's, turn by turn."""
    prompt = task.score.windows[0][:PROMPT].tolist()  # type: ignore[attr-defined]
    racing = {"PyTorch": generation.TorchReader(causal(task.model)), **readers}
    found: dict[str, list[generation.Speed]] = {name: [] for name in racing}
    for _ in range(turns):
        for name, reader in racing.items():
            found[name].append(generation.speed(reader, prompt, WRITTEN, rounds=1))
    return found


def _rows(
    kind: str,
    bytes_: Mapping[str, int],
    losses: Mapping[str, np.ndarray[Any, Any]],
    speeds: Mapping[str, Sequence[generation.Speed]],
) -> list[Row]:
    ours = f"{kind} {BEST}"
    peers = {name: f"{kind} {name}" for name in PEERS if f"{kind} {name}" in bytes_}
    case = {"case": f"SmolLM2 {kind}"}
    low, high = _bootstrap(losses[ours])
    kl = {name: float(losses[file].mean()) for name, file in peers.items()}
    size: dict[str, float | None] = {name: float(bytes_[file]) for name, file in peers.items()}
    rows = [
        Row(
            **case, metric="KL to the original", unit="nats a token", better="lower", ours=float(losses[ours].mean()),
            ours_interval=(low, high), peers=dict(kl), aim=KL_AIM,
        ),
        Row(
            **case, metric="file", unit="bytes", better="lower", ours=float(bytes_[ours]), peers=size, aim=1.0
        ),
    ]  # fmt: skip
    for what in ("decode", "prefill"):
        own = f"{kind} {PEERS[0]}"
        ratio = _paired(speeds[ours], speeds[own], what)
        rows.append(
            Row(
                **case, metric=f"{what}, llama.cpp's own file = 1", unit="x", better="higher", ours=ratio[1],
                ours_interval=(ratio[0], ratio[2]), reference=1.0, aim=SPEED_AIM,
            )
        )  # fmt: skip
        ratio = _paired(speeds[ours], speeds["PyTorch"], what)
        rows.append(
            Row(
                **case, metric=f"{what}, PyTorch = 1", unit="x", better="higher", ours=ratio[1],
                ours_interval=(ratio[0], ratio[2]), reference=1.0,
            )
        )  # fmt: skip
    return rows


def _paired(
    ours: Sequence[generation.Speed], others: Sequence[generation.Speed], what: str
) -> tuple[float, float, float]:
    """The ratio of two speeds, turn by turn: quarter, median, three quarters."""
    ratios = [getattr(a, what) / getattr(b, what) for a, b in zip(ours, others, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def _bootstrap(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The 95 % interval of a mean over windows, by drawing windows anew."""
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _details(
    name: str,
    bytes_: Mapping[str, int],
    losses: Mapping[str, np.ndarray[Any, Any]],
    speeds: Mapping[str, Sequence[generation.Speed]],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    said: dict[str, Any] = {
        what: statistics.median(getattr(speed, what) for speed in speeds[name])
        for what in ("decode", "prefill")
    }
    if name in bytes_:
        kl = losses[name]
        said |= {"bytes": bytes_[name], "kl": float(kl.mean()), "kl_interval": _bootstrap(kl)}
        said |= {"seconds_to_make": seconds[name]}
    return said


if __name__ == "__main__":
    main()
