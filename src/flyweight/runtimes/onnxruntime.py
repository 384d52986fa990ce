"""ONNX Runtime on the processor: needs the extra flyweight[onnxruntime]."""

from __future__ import annotations

import importlib.util
import statistics
import time
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
ONE_THREAD = "one_thread"
"""Session setting "1": of one thread, which need not be woken, instead of all cores."""
SESSION = frozenset({"session.disable_quant_qdq", ONE_THREAD})
"""Session settings that an artifact may carry."""
SHORT = 0.002
"""Seconds of a prediction up to which one thread is tried."""
_ROUNDS, _TELLING = 31, 1.03
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
    stay small in memory too. Where a prediction is so short that waking threads tells, it runs on one thread if that is
    faster. Raises ModelError when the model cannot be exported.
    """
    graph = write_graph(model, examples, where)
    session = {} if graph.integer else dict(_DECODE_AT_LOAD)
    found = graph.predictor("onnxruntime", open_file, session)
    if cores() == 1 or min(_seconds(found, examples[0]) for _ in range(3)) > SHORT:
        return found
    alone = graph.predictor("onnxruntime", open_file, {**session, ONE_THREAD: "1"})
    ratios = [_seconds(found, examples[0]) / _seconds(alone, examples[0]) for _ in range(_ROUNDS)]
    return alone if statistics.median(ratios) > _TELLING else found


def _seconds(predict: Predictor, batch: Batch) -> float:
    """The median time of a call, after one that is not counted."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        predict(batch)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def open_file(folder: Path, session: Mapping[str, str]) -> Run:
    """A function from named arrays to output arrays that runs the folder's graph on all cores, or on one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    one = session.get(ONE_THREAD) == "1"
    options.intra_op_num_threads = 1 if one else cores()
    options.log_severity_level = 4  # what it logs below, it raises too
    for key, value in {"session.force_spinning_stop": "1", **session}.items() - {(ONE_THREAD, "1")}:
        options.add_session_config_entry(key, value)
    loaded = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in loaded.get_outputs()]

    def call(inputs: dict[str, Any]) -> Sequence[Any]:
        outputs: Sequence[Any] = loaded.run(names, inputs)
        return outputs

    return call
