"""GGUF files: our roundings beside llama.cpp's own quantizer, same types, same bytes, run by the same llama.cpp.

    python -m benchmarks.llamacpp [--quick] [--only TYPE ...] [--again] [--table]
    python -m benchmarks.llamacpp --speed                     # on a calm machine, once the files are there

The model is SmolLM2-135M, de-gridded (examples/smollm2.py). It is 576 wide, which super-blocks of 256 do not divide; for
k-quants zeros make it 768 wide, and it computes the same. llama.cpp's files come from its own `ggml_quantize_chunk`, tensor
after tensor, in the types that its quantizer takes: the tied embedding in Q8_0, the layers in the type asked for; once as it
quantizes by itself, and once with an importance matrix from the windows that calibrate ours. All files are read by llama.cpp
and compared by KL to the original in PyTorch, on held-out windows, in nats a token; by bytes; and, by --speed, by tokens a
second, in turn. What is measured is kept in the results, and measured again only when asked to; files stay in out/llamacpp.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._llamacpp_model import original, padded, smollm2
from benchmarks._llamacpp_report import PEERS, report
from benchmarks._results import FOLDER
from flyweight import Task, transforms
from flyweight.analysis import gram
from flyweight.analysis.machine import cores
from flyweight.analysis.sites import Analysis, analyse
from flyweight.artifact.atomic import atomic_write_text
from flyweight.evaluation import generation, language
from flyweight.records import JSON, Plan, Step
from flyweight.runtimes import _gguf, _llama
from flyweight.runtimes._gguf_model import causal, contents, name_of, save
from flyweight.runtimes._gguf_super import LAYOUTS
from flyweight.runtimes.llamacpp import Reader
from flyweight.runtimes.torch import caller

WORK = Path(__file__).parent.parent / "out" / "llamacpp"
TYPES: Mapping[str, Mapping[str, JSON]] = {
    "Q8_0": {"bits": 8, "group": 32, "scale": "float16"},
    "Q4_1": {"bits": 4, "group": 32, "symmetric": False, "scale": "float16"},
    "Q4_0": {"bits": 4, "group": 32, "full": True, "scale": "float16"},
    "IQ4_NL": {"code": "iq4_nl"},
    "Q6_K": {"code": "super_block", "bits": 6},
    "Q5_K": {"code": "super_block", "bits": 5},
    "Q4_K": {"code": "super_block", "bits": 4},
    "IQ4_XS": {"code": "super_block", "bits": 4, "uneven": True},
    "Q3_K": {"code": "super_block", "bits": 3},
    "Q2_K": {"code": "super_block", "bits": 2},
}
"""The options of weight_only that give a type."""
ROUNDINGS: Mapping[str, Mapping[str, JSON]] = {
    "nearest": {},
    "error feedback": {"rounding": "error_feedback", "drift": 0.0},
    "error feedback, drift": {"rounding": "error_feedback", "drift": 0.5},
}
PROMPT, WRITTEN, TURNS = 128, 32, 9
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model with what was seen of it."""

    task: Task
    analysis: Analysis
    context: Any
    folder: Path


def main() -> None:
    """Make the files that are missing, compare them, and write the figures."""
    given = _parser().parse_args()
    start = time.time()
    torch.set_num_threads(cores())
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for wide in (False, True):
        wanted = [kind for kind in given.only or TYPES if (TYPES[kind].get("code") == "super_block") == wide]
        if wanted and not given.table:
            _measure(wanted, given, wide=wide)
    report(read(given.quick), start, quick=given.quick)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer windows and rounds; writes elsewhere")
    parser.add_argument("--only", nargs="+", choices=TYPES, metavar="TYPE", help=f"of {', '.join(TYPES)}")
    parser.add_argument("--by", nargs="+", choices=[*PEERS, *ROUNDINGS], help="these makers alone")
    parser.add_argument("--again", action="store_true", help="measure what is there already")
    parser.add_argument(
        "--speed", action="store_true", help="time the files, on a machine without other work"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    return parser


def _measure(wanted: Sequence[str], given: argparse.Namespace, *, wide: bool) -> None:
    """Make and judge the files of some types that are not known yet, and time them all if that is asked for."""
    case = _case(wide=wide, quick=given.quick)
    names = [
        f"{kind}, {maker}"
        for kind in wanted
        for maker in _makers(kind)
        if maker in (given.by or _makers(kind))
    ]
    for name in names:
        known = read(given.quick)
        if given.again or name not in known or not _file(case, name).exists():
            print(name, file=sys.stderr, flush=True)
            keep({name: known.get(name, {}) | _made(case, name)}, given.quick)
    if given.speed:
        known = read(given.quick)
        turns = 3 if given.quick else TURNS
        keep(
            {name: known.get(name, {}) | speeds for name, speeds in _speeds(case, names, turns)}, given.quick
        )


def _makers(kind: str) -> list[str]:
    peers = PEERS[:1] if kind == "Q8_0" else PEERS  # an importance matrix changes nothing there
    return [*peers, *ROUNDINGS]


def read(quick: bool) -> dict[str, Record]:
    """What was measured, by "TYPE, MAKER"."""
    path = _results(quick)
    return json.loads(path.read_text())["records"] if path.exists() else {}


def keep(records: Mapping[str, Record], quick: bool) -> None:
    """Add to what was measured."""
    path = _results(quick)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = json.loads(path.read_text()) if path.exists() else {}
    document["records"] = document.get("records", {}) | dict(records)
    atomic_write_text(path, json.dumps(document, indent=1) + "\n")


def _results(quick: bool) -> Path:
    return (FOLDER / "quick" if quick else FOLDER) / "llamacpp.json"


def _case(*, wide: bool, quick: bool) -> Case:
    task = smollm2(quick=quick)
    task = replace(task, model=padded(task.model)) if wide else task
    analysis = analyse(task.model, task.examples, 0)
    paths = [site.name for site in analysis.sites if site.kind != "embedding"]
    context = transforms.Context(
        analysis.statistics, gram.lazily(task.model, paths, task.examples), examples=task.examples
    )
    folder = WORK / ("quick" if quick else "full") / ("wide" if wide else "own")
    folder.mkdir(parents=True, exist_ok=True)
    return Case(task, analysis, context, folder)


def _file(case: Case, name: str) -> Path:
    return case.folder / f"{name.replace(',', '').replace(' ', '_')}.gguf"


def _made(case: Case, name: str) -> Record:
    """Make a file and judge it."""
    kind, maker = name.split(", ", 1)
    path, begin = _file(case, name), time.perf_counter()
    if maker in ROUNDINGS:
        _ours(case, {**TYPES[kind], **ROUNDINGS[maker]}, path)
    else:
        energies = {site: seen.energy for site, seen in case.analysis.statistics.items()}
        _theirs(case.task, kind, energies if maker == PEERS[1] else {}, path)
    seconds = time.perf_counter() - begin
    kl = _losses(case, Reader.open(path, 512))
    print(f"  KL {np.mean(kl):.4g}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return {
        "bytes": path.stat().st_size,
        "seconds": round(seconds, 1),
        "kl": [float(f"{one:.5g}") for one in kl],
    }


def _ours(case: Case, options: Mapping[str, JSON], path: Path) -> None:
    """The options at every linear layer, and the tied embedding in 8 bits to nearest, as in llama.cpp's files."""
    plan = Plan(
        tuple(
            Step("weight_only", site.name, TYPES["Q8_0"] if _is_embedding(site.name) else options)
            for site in case.analysis.sites
        )
    )
    save(causal(transforms.apply(case.task.model, plan, case.analysis.sites, case.context)), path)


def _is_embedding(name: str) -> bool:
    return name.endswith(("embed_tokens", "lm_head"))


def _theirs(task: Task, kind: str, energies: Mapping[str, Any], path: Path) -> None:
    """What llama.cpp's quantizer makes; energies: of the layers' inputs, by site, the importance matrix."""
    known = {t.name: t for t in (*_gguf.INTEGERS, *(layout.type for layout in LAYOUTS.values()))}
    metadata, tensors = contents(causal(task.model))
    importance = {_tensor_name(site): energy for site, energy in energies.items() if energy is not None}

    def quantized(tensor: _gguf.Tensor) -> _gguf.Tensor:
        if len(tensor.shape) == 1:
            return tensor
        into = known["Q8_0" if tensor.name == "token_embd.weight" else kind]
        make = functools.partial(_chunk, tensor, into, importance.get(tensor.name))
        return replace(tensor, type=into, make=make)

    _gguf.write(path, metadata, [quantized(tensor) for tensor in tensors])


def _tensor_name(site: str) -> str:
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


def _losses(case: Case, reader: Reader) -> list[float]:
    """KL to the original in nats a token, of each held-out window."""
    found = []
    for index, window in enumerate(case.task.score.windows):  # type: ignore[attr-defined]
        wanted = _original_logits(case, index, window)
        reader.forget()
        logits = torch.from_numpy(reader.read_all(window.tolist()))[None]
        found.append(language.kl(lambda _: wanted, lambda _: logits, [window]).value)  # noqa: B023
    return found


def _original_logits(case: Case, index: int, window: torch.Tensor) -> torch.Tensor:
    """The logits (1, L, V) of the original in PyTorch for a held-out window; computed once."""
    path = case.folder / f"original_{index}.npy"
    if not path.exists():
        np.save(path, caller(case.task.model)(window[None]).numpy())
    return torch.from_numpy(np.load(path))


def _speeds(case: Case, names: Sequence[str], turns: int) -> Iterator[tuple[str, Record]]:
    """Tokens a second of each file, turn by turn, beside PyTorch's and F16's."""
    floats = case.folder / "F16.gguf"
    if not floats.exists():
        original(causal(case.task.model), floats)
    prompt = case.task.score.windows[0][:PROMPT].tolist()  # type: ignore[attr-defined]
    files = {"F16": floats, **{name: _file(case, name) for name in names if _file(case, name).exists()}}
    racing: dict[str, Any] = {name: Reader.open(file, PROMPT + WRITTEN) for name, file in files.items()}
    racing["PyTorch"] = generation.TorchReader(causal(case.task.model))
    found: dict[str, list[generation.Speed]] = {name: [] for name in racing}
    for _ in range(turns):
        for name, reader in racing.items():
            found[name].append(generation.speed(reader, prompt, WRITTEN, rounds=1))
    ends = {"F16": f"F16, {case.folder.name}", "PyTorch": f"PyTorch, {case.folder.name}"}
    for name, speeds in found.items():
        told = {what: [round(getattr(one, what), 2) for one in speeds] for what in ("decode", "prefill")}
        yield ends.get(name, name), told


if __name__ == "__main__":
    main()
