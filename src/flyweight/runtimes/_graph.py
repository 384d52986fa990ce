"""From a PyTorch model to the ONNX graph and weights on disk that ONNX Runtime and OpenVINO both read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from flyweight.analysis.sites import analyse
from flyweight.records import Batch
from flyweight.runtimes import _structure
from flyweight.runtimes._files import GRAPH, WEIGHTS, Predictor, match, write_weights
from flyweight.transforms import QuantizedLayer

Run = Callable[[dict[str, np.ndarray[Any, Any]]], Sequence[np.ndarray[Any, Any]]]


@dataclass(frozen=True)
class Graph:
    """An ONNX model on disk."""

    folder: Path
    inputs: tuple[tuple[str, str, tuple[int | None, ...]], ...]
    template: Any
    layouts: dict[str, str]
    integer: bool
    """Whether activations are rounded at fixed ranges, so that the runtime's integer rewrites are wanted."""

    def predictor(self, runtime: str, run: Run, session: dict[str, str] | None = None) -> Predictor:
        """A Predictor around a runtime's function from named arrays to arrays."""

        def call(batch: Batch) -> Any:
            values = match(batch, [n for n, _, _ in self.inputs], [s for _, _, s in self.inputs])
            outputs = run({name: _array(v) for (name, _, _), v in zip(self.inputs, values, strict=True)})
            return _structure.rebuild(self.template, map(torch.from_numpy, outputs))

        return Predictor(
            runtime=runtime,
            call=call,
            files=(self.folder / GRAPH, self.folder / WEIGHTS),
            inputs=self.inputs,
            outputs=_structure.describe(self.template),
            layouts=self.layouts,
            session=session or {},
        )


def write_graph(model: nn.Module, examples: Sequence[Batch], where: Path) -> Graph:
    """Write GRAPH and WEIGHTS of a model in eval mode; raises ModelError when it cannot be exported."""
    from onnx import TensorProto

    from flyweight.runtimes._export import names, skeleton, tensors
    from flyweight.runtimes._lower import lower

    paths = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    paths |= {site.name: model.get_submodule(site.name) for site in analyse(model, examples[:1]).sites}
    outline = skeleton(model, paths, examples)
    low = lower(outline, model, paths)
    places = write_weights(low.weights, where / WEIGHTS)
    for name, (key, kind, shape) in low.refers.items():
        item = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        offset, length = places[key]
        for entry, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(length))):
            item.external_data.add(key=entry, value=value)
        low.graph.graph.initializer.append(item)
    (where / GRAPH).write_bytes(low.graph.SerializeToString(deterministic=True))
    dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in zip(names(examples[0]), tensors(examples[0]), strict=True)}
    inputs = tuple((name, dtypes[name], shape) for name, shape in zip(outline.inputs, outline.shapes, strict=True))
    return Graph(where, inputs, outline.template, low.layouts, integer=bool(low.grids))


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().cpu().contiguous().numpy()
    return array
