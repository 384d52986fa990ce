"""From a PyTorch model to the ONNX graph and weights on disk that ONNX Runtime and OpenVINO both read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from flyweight.analysis.bare import layer_at
from flyweight.analysis.sites import analyse
from flyweight.errors import ModelError, foreign
from flyweight.records import Batch
from flyweight.runtimes import _structure
from flyweight.runtimes._files import GRAPH, WEIGHTS, Predictor, kept_weights, match, write_weights
from flyweight.transforms import QuantizedLayer

Run = Callable[[dict[str, np.ndarray[Any, Any]]], Sequence[np.ndarray[Any, Any]]]
Load = Callable[[Path, Mapping[str, str]], Run]
"""A runtime's function from the folder of a graph and session settings to what runs it."""


@dataclass(frozen=True)
class Graph:
    """An ONNX model on disk."""

    folder: Path
    weights: Path
    """The file of weights to keep."""
    inputs: tuple[tuple[str, str, tuple[int | None, ...]], ...]
    template: Any
    layouts: dict[str, str]
    integer: bool
    """Whether activations are rounded at fixed ranges, so that the runtime's integer rewrites are wanted."""

    def predictor(self, runtime: str, load: Load, session: dict[str, str] | None = None) -> Predictor:
        """A Predictor around a runtime's function `load`; raises ModelError when it does not take the graph."""
        with foreign(ModelError, f"{runtime} must be able to load the graph", quoted=_reason):
            run = load(self.folder, session or {})

        names, shapes = [name for name, _, _ in self.inputs], [shape for _, _, shape in self.inputs]

        def call(batch: Batch) -> Any:
            outputs = run(dict(zip(names, map(_array, match(batch, names, shapes)), strict=True)))
            return _structure.rebuild(self.template, map(torch.from_numpy, outputs))

        return Predictor(
            runtime=runtime,
            call=call,
            files=(self.folder / GRAPH, self.weights),
            inputs=self.inputs,
            outputs=_structure.describe(self.template),
            layouts=self.layouts,
            session=session or {},
        )


def write_graph(model: nn.Module, examples: Sequence[Batch], where: Path) -> Graph:
    """Write GRAPH and WEIGHTS of a model in eval mode; raises ModelError when it cannot be exported."""
    _check_dtypes(model, examples[0])
    from onnx import TensorProto

    from flyweight.runtimes._export import names, skeleton, tensors
    from flyweight.runtimes._lower import lower

    paths: dict[str, nn.Module] = {
        path: m for path, m in model.named_modules() if isinstance(m, QuantizedLayer)
    }
    sites = analyse(model, examples[:1]).sites
    paths |= {path: layer_at(model, path) for site in sites for path in site.paths}
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
    given = zip(names(examples[0]), tensors(examples[0]), strict=True)
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in given}
    inputs = tuple(
        (name, dtypes[name], shape) for name, shape in zip(outline.inputs, outline.shapes, strict=True)
    )
    weights = kept_weights(model, where)
    return Graph(where, weights, inputs, outline.template, low.layouts, integer=bool(low.grids))


def _check_dtypes(model: nn.Module, batch: Batch) -> None:
    """Graphs compute in float32: the runtimes' processors lack kernels for most half-precision operations."""
    from flyweight.runtimes._export import names, tensors

    half = [(name, p.dtype) for name, p in model.named_parameters() if p.is_floating_point()]
    half += [(name, m.dtype) for name, m in model.named_modules() if isinstance(m, QuantizedLayer)]
    half += [
        (name, t.dtype) for name, t in zip(names(batch), tensors(batch), strict=True) if t.is_floating_point()
    ]
    for name, dtype in half:
        if dtype != torch.float32:
            raise ModelError(
                "a model must be in float32 to run here",
                got=str(dtype).removeprefix("torch."),
                where=name,
                way_out="give model.float() and examples in float32; integer weights are as small either way",
            )


def _reason(error: BaseException) -> str:
    """The line of a runtime's message that says what it lacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '", "FrontEnd API"))]
    return f"{type(error).__name__}: {' '.join(telling)[:300]}"


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().cpu().contiguous().numpy()
    return array
