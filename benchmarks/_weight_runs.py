"""One run of benchmarks/weight_codes.py: who, at how many bits, on which model; what is done is kept.

All that was measured lies in one JSON file by "case/tool/bits", with the key of what it depends on: settings, versions,
inputs, the model's digest, and of our own tools the digest of the source. A run whose key is there is not run again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks._results import FOLDER
from benchmarks._weight_cases import Case
from benchmarks._weight_ours import NAMES, ours, quantize
from benchmarks.weight_peers import peers
from flyweight.analysis.machine import cores
from flyweight.artifact.atomic import atomic_write_text
from flyweight.errors import FlyweightError, first_line

ROOT = Path(__file__).parent.parent
WORK = ROOT / "out" / "weight_codes"
LIMIT = 4 * 3600
"""Seconds after which a peer's process is ended."""
SOURCES = ("analysis", "codes", "roundings", "transforms")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
Record = dict[str, Any]


class PeerFailed(Exception):
    """A peer's process ended without an answer."""


def tools() -> tuple[str, ...]:
    """Every tool's name, our own first."""
    return (*NAMES, *peers())


def run(case: Case, tool: str, bits: int) -> Record:
    """The record of one run: seconds, bytes, bits and figures, or why it failed."""
    wanted = key(case, tool, bits)
    told = wanted["settings"]
    if isinstance(told, str):
        return {"key": wanted, "failed": told}
    try:
        done = _own(case, told) if tool in NAMES else _peer(case, tool, bits, wanted)
        weights = done.pop("weights")
        figures = case.judge(case.with_weights(weights))
    except (PeerFailed, FlyweightError, OSError) as error:
        return {"key": wanted, "failed": str(error) if isinstance(error, PeerFailed) else first_line(error)}
    return {"key": wanted, **done, "bits": 8 * done["bytes"] / done["entries"], "figures": figures}


def key(case: Case, tool: str, bits: int) -> Record:
    """All that a run's result depends on."""
    found: Record = {"inputs": dict(case.inputs), "model": _digest([case.folder / "model.safetensors"])}
    if tool in NAMES:
        files = sorted(path for name in SOURCES for path in (ROOT / "src" / "flyweight" / name).rglob("*.py"))
        versions = {"torch": torch.__version__}
        return {**found, "settings": ours(tool, bits), "versions": versions, "source": _digest(files)}
    module = peers()[tool]
    settings = module.settings(tool, bits, case.kind)
    return {**found, "settings": settings, "versions": _versions(module.ENVIRONMENT, module.PACKAGES)}


def read(*, quick: bool) -> dict[str, Record]:
    """All records that are kept."""
    path = _file(quick)
    found: dict[str, Record] = json.loads(path.read_text()) if path.exists() else {}
    return found


def keep(name: str, record: Record, *, quick: bool) -> None:
    """Add a record to those that are kept, or replace it."""
    path = _file(quick)
    path.parent.mkdir(parents=True, exist_ok=True)
    records = {**read(quick=quick), name: record}
    atomic_write_text(path, json.dumps(dict(sorted(records.items())), indent=1) + "\n")


def _file(quick: bool) -> Path:
    return (FOLDER / "quick" if quick else FOLDER) / "weight_codes_runs.json"


def _own(case: Case, options: Mapping[str, Any]) -> Record:
    found = quantize(case.task, options)
    weights = {path.removeprefix(case.prefix): weight for path, weight in found.weights.items()}
    entries = sum(weight.numel() for weight in weights.values())
    done = {"seconds": found.seconds, "bytes": found.bytes, "entries": entries, "layers": len(weights)}
    return {**done, "weights": weights}


def _peer(case: Case, tool: str, bits: int, wanted: Record) -> Record:
    """Run a peer's own process; an answer that is there to the same request is taken as it is."""
    python = ROOT / peers()[tool].ENVIRONMENT / "bin" / "python"
    if not python.exists():
        raise PeerFailed(f"there is no {peers()[tool].ENVIRONMENT}: make peers")
    folder = WORK / f"{case.name}-{tool}-{bits}"
    request = folder / "request.json"
    text = json.dumps({"key": wanted}, sort_keys=True)
    marker = folder / "key.json"
    if not (marker.exists() and marker.read_text() == text and (folder / "done.json").exists()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        batches = enumerate(case.batches())
        named = {f"{n}.{name}": t.contiguous() for n, batch in batches for name, t in batch.items()}
        save_file(named, folder / "examples.safetensors")
        asked = {"peer": tool, "kind": case.kind, "bits": bits, "model": str(case.folder)}
        asked |= {"examples": str(folder / "examples.safetensors"), "out": str(folder)}
        request.write_text(json.dumps({**asked, "threads": cores(), "settings": wanted["settings"]}))
        marker.write_text(text)
        _started([str(python), "-m", "benchmarks.weight_peers", str(request)], folder / "log.txt")
    found: Record = json.loads((folder / "done.json").read_text())
    weights = load_file(folder / "weights.safetensors")
    shutil.rmtree(folder)
    return {**found, "weights": weights}


def _started(command: list[str], log: Path) -> None:
    """Run a command to its end; raises PeerFailed with the last line that it said."""
    environment = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": str(cores())}
    with log.open("w") as said:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=said, stderr=said, timeout=LIMIT, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            raise PeerFailed(f"no end within {LIMIT} s") from None
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "error:" in line]
        raise PeerFailed((errors or lines or [f"exit code {code}"])[-1].strip()[:200])


def _versions(environment: str, packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of an environment's packages; none of what is not there."""
    places = [str(path) for path in (ROOT / environment).glob("lib/python3*/site-packages")]
    found = (
        {d.name.lower(): d.version for d in importlib.metadata.distributions(path=places)} if places else {}
    )
    return {name: found[name] for name in packages if name in found}


def _digest(files: list[Path]) -> str:
    """The beginning of the SHA-256 of files' contents."""
    whole = hashlib.sha256()
    for path in files:
        whole.update(_file_digest(path))
    return whole.hexdigest()[:16]


@functools.cache
def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
