"""OpenVINO on the processor, from the same ONNX file: needs the extra flyweight[openvino].

It keeps evenly spaced integer weights of linear layers as they are, 4 or 8 bits, and decodes them block by block while it
multiplies: small in memory too, and faster where few rows are multiplied. Tables are decoded once, when it loads the model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from flyweight.analysis.machine import cores
from flyweight.records import Batch, Step
from flyweight.runtimes import methods
from flyweight.runtimes._files import GRAPH, Predictor
from flyweight.runtimes._graph import Run, write_graph

FILE = True
"""Whether it runs from a file alone, without the task's model class."""
SESSION: frozenset[str] = frozenset()
"""Session settings that an artifact may carry."""


def available() -> str | None:
    """None, or why it cannot run and how to get it."""
    missing = [n for n in ("openvino", "onnx", "onnxscript") if importlib.util.find_spec(n) is None]
    return f"{', '.join(missing)} not installed: pip install 'flyweight[openvino]'" if missing else None


def refuse(steps: Collection[Step]) -> str | None:
    """Why a plan with these steps could not be held here or would not pay, or None."""
    used = methods(steps)
    if "block_int8" in used:
        return "OpenVINO multiplies blocks of integers by float inputs; store weights as integers only"
    if "dynamic_int8" in used:
        return (
            "OpenVINO decodes dynamically quantized layers to floats, which is slower than leaving them alone"
        )
    return None


def prepare(model: nn.Module, examples: Sequence[Batch], where: Path) -> Predictor:
    """Write the model's files to the folder `where` and load them; ModelError when it cannot be exported."""
    return write_graph(model, examples, where).predictor("openvino", open_file)


def open_file(folder: Path, session: Mapping[str, str]) -> Run:
    """A function from named arrays to output arrays that runs the folder's graph on all cores."""
    return compiled(folder / GRAPH, session)


def compiled(file: Path, session: Mapping[str, str]) -> Run:
    """The same for a file of any format that OpenVINO reads."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": cores(),
        "INFERENCE_PRECISION_HINT": "f32",
        **session,
    }
    core = openvino.Core()
    model = core.compile_model(core.read_model(file), "CPU", settings)
    request = model.create_infer_request()

    def call(inputs: dict[str, Any]) -> Sequence[Any]:
        found = request.infer(inputs)
        return [np.array(found[port]) for port in model.outputs]

    return call
