"""Run as a script, without PyTorch: prints the bytes that loading and running a graph file adds to this process.

Usage: python _memory_probe.py RUNTIME GRAPH INPUTS.npz [KEY=VALUE ...]
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np

RUNTIMES = ("onnxruntime", "openvino", "llamacpp")


def resident() -> int:
    """Bytes this process holds in memory now; the peak is reset to it."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most bytes this process has held in memory since `resident`."""
    return _status("VmHWM")


def private() -> int:
    """Bytes that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _llama() -> ModuleType:
    """The file beside this one that calls llama.cpp, ready: loading the package itself would load PyTorch."""
    spec = importlib.util.spec_from_file_location("_llama", Path(__file__).with_name("_llama.py"))
    if spec is None or spec.loader is None:
        raise ImportError("_llama.py must lie beside this file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.load()
    return module


def _main(runtime: str, graph: str, inputs: str, *settings: str) -> None:
    module = _llama() if runtime == "llamacpp" else importlib.import_module(runtime)
    arrays = dict(np.load(inputs, allow_pickle=False))
    session = dict(item.split("=", 1) for item in settings)
    before = resident()
    if runtime == "onnxruntime":
        options = module.SessionOptions()
        for key, value in session.items():
            options.add_session_config_entry(key, value)
        loaded = module.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for _ in range(2):
            loaded.run(None, arrays)
    elif runtime == "llamacpp":
        texts = next(iter(arrays.values()))
        llama = module.Model(Path(graph), max(512, texts.shape[1]), len(os.sched_getaffinity(0)))
        for text in (*texts.tolist(), *texts.tolist()):
            llama.forget()
            llama.read(text, every=True)
    else:
        core = module.Core()
        compiled = core.compile_model(core.read_model(graph), "CPU", session)
        for _ in range(2):
            compiled(arrays)
    print(max(0, peak() - before))


if __name__ == "__main__":
    _main(*sys.argv[1:])
