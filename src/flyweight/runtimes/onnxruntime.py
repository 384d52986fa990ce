"""ONNX Runtime on the processor: needs the extra flyweight[onnxruntime]."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from flyweight.analysis.machine import cores
from flyweight.records import Batch, Step
from flyweight.runtimes._files import GRAPH, Predictor
from flyweight.runtimes._graph import Run, write_graph

FILE = True
"""Whether it runs from a file alone, without the task's model class."""
SESSION = frozenset({"session.disable_quant_qdq"})
"""Session settings that an artifact may carry."""
_DECODE_AT_LOAD = {"session.disable_quant_qdq": "1"}


def available() -> str | None:
    """None, or why it cannot run and how to get it."""
    missing = [n for n in ("onnxruntime", "onnx", "onnxscript") if importlib.util.find_spec(n) is None]
    return f"{', '.join(missing)} not installed: pip install 'flyweight[onnxruntime]'" if missing else None


def refuse(steps: Collection[Step]) -> str | None:
    """Why a plan with these steps could not be held here or would not pay, or None."""
    return None


def prepare(model: nn.Module, examples: Sequence[Batch], where: Path) -> Predictor:
    """Write the model's files to the folder `where` and load them.

    Weights that are only stored as integers are decoded when the session starts: the file stays small and the
    arithmetic as fast as with floats; linear layers of at most 4 bits in groups are multiplied as they are stored, and
    stay small in memory too. Raises ModelError when the model cannot be exported.
    """
    graph = write_graph(model, examples, where)
    session = {} if graph.integer else dict(_DECODE_AT_LOAD)
    return graph.predictor("onnxruntime", open_file, session)


def open_file(folder: Path, session: Mapping[str, str]) -> Run:
    """A function from named arrays to output arrays that runs the folder's graph on all cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    options.log_severity_level = 4  # what it logs below, it raises too
    for key, value in {"session.force_spinning_stop": "1", **session}.items():
        options.add_session_config_entry(key, value)
    loaded = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in loaded.get_outputs()]

    def call(inputs: dict[str, Any]) -> Sequence[Any]:
        outputs: Sequence[Any] = loaded.run(names, inputs)
        return outputs

    return call
