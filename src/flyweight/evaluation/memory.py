"""How much memory loading and running a model adds to a process: measured in a process of its own, on Linux."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from flyweight.records import Batch
from flyweight.runtimes import _memory_probe
from flyweight.runtimes._export import names, tensors
from flyweight.runtimes._files import Predictor
from flyweight.runtimes.torch import caller
from flyweight.transforms import QuantizedLayer, substitute

LIMIT_SECONDS = 60.0
DECODED = frozenset({"transformers"})
"""Runtimes of PyTorch that decode every weight to floats and keep those."""


def peak_memory(predictor: Predictor, model: nn.Module, batch: Batch) -> int | None:
    """Bytes that loading the predictor's files and two predictions add; None where it cannot be measured."""
    if not Path("/proc/self/status").exists():
        return None
    if predictor.runtime in _memory_probe.RUNTIMES:
        return _of_file(predictor, batch)
    return _of_module(_decoded(model) if predictor.runtime in DECODED else model, batch)


def _decoded(model: nn.Module) -> nn.Module:
    layers = {path: m.plain() for path, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    return substitute(model, layers)


def _of_file(predictor: Predictor, batch: Batch) -> int | None:
    """Run the probe, a script without PyTorch, on the files."""
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "inputs.npz"
        given_arrays = {n: t.cpu().numpy() for n, t in zip(names(batch), tensors(batch), strict=True)}
        np.savez(arrays, **given_arrays)  # type: ignore[arg-type]  # the stub takes any name for allow_pickle
        settings = [f"{key}={value}" for key, value in predictor.session.items()]
        command = [sys.executable, "-P", _memory_probe.__file__, predictor.runtime]
        given = [str(predictor.files[0]), str(arrays), *settings]
        try:
            done = subprocess.run(
                [*command, *given], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return None
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else None


def _of_module(model: nn.Module, batch: Batch) -> int | None:
    """Copy and run the module in a forked child with one thread (a forked child has no thread pool)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        _child(model, batch, write)
    os.close(write)
    deadline = time.monotonic() + LIMIT_SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.01)
    with os.fdopen(read) as answer:
        text = answer.read()
    return int(text) if text.isdigit() else None


def _child(model: nn.Module, batch: Batch, write: int) -> None:
    """Never returns: the child must not run anything of the parent's, whatever happens."""
    try:
        torch.set_num_threads(1)
        before, private = _memory_probe.resident(), _memory_probe.private()
        own = copy.deepcopy(model)
        for _ in range(2):
            caller(own)(batch)
        # Memory that the parent had freed is reused without growing: what the child wrote to is private then.
        added = max(_memory_probe.peak() - before, _memory_probe.private() - private)
        os.write(write, str(max(0, added)).encode())
    finally:
        os._exit(0)
