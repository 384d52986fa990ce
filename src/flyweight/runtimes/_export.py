"""Exports a model to ONNX once per structure, with every site left open.

Each linear, convolution and embedding becomes one node `flyweight.Site` that says only where it is; so does a weight that is
read by other operations. `_lower.py` fills the sites in, as floats or integers, so hundreds of candidates cost one export.
Needs onnx and onnxscript.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from flyweight import transforms
from flyweight.analysis.calls import OPERATIONS, Functions, operands, unfused
from flyweight.errors import ModelError, first_line, foreign
from flyweight.inputs.check import run
from flyweight.records import Batch, canonical
from flyweight.runtimes import _attention, _pools, _repeated, _structure
from flyweight.runtimes._bags import bags
from flyweight.runtimes._identity import identity, tensor_digest

DOMAIN, OPSET = "flyweight", 23
_SKELETONS: dict[str, Skeleton] = {}


@dataclass(frozen=True)
class Skeleton:
    """An ONNX graph whose sites are open."""

    graph: bytes
    """A serialized ModelProto."""
    inputs: tuple[str, ...]
    """Names of the graph's inputs, in the order of `tensors(batch)`."""
    shapes: tuple[tuple[int | None, ...], ...]
    """Their shapes; None: any."""
    template: Any
    """The model's own output on the first example."""


def tensors(batch: Batch) -> list[torch.Tensor]:
    """A batch's tensors, in order."""
    if isinstance(batch, torch.Tensor):
        return [batch]
    return list(batch.values()) if isinstance(batch, dict) else list(batch)


def names(batch: Batch) -> tuple[str, ...]:
    """A name for each of a batch's tensors: the dict's keys, or input, input_1, ..."""
    if isinstance(batch, dict):
        return tuple(batch)
    return tuple(f"input_{index}" if index else "input" for index in range(len(tensors(batch))))


def skeleton(model: nn.Module, paths: Mapping[str, nn.Module], examples: Sequence[Batch]) -> Skeleton:
    """The model's graph with the given sites open; kept in this process, since candidates share structures.

    Raises ModelError when the exporter cannot follow the model.
    """
    twin = transforms.substitute(model, {path: _OpenSite(path, module) for path, module in paths.items()})
    key = _key(twin, examples)
    if key not in _SKELETONS:
        template = run(model, examples[0])
        found = _repeated.equal(model, twin, list(paths), examples[0])
        _SKELETONS[key] = _export(twin.eval(), examples, template, found)
    return _SKELETONS[key]


class _OpenSite(nn.Module):
    """A layer without its weight, whose operation is exported as one open node."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__()
        weight = cast(torch.Tensor, module.weight)
        inner = getattr(module, "inner", module)
        shell = transforms.shell(inner)
        self.path, self.shell = path, shell
        self.shape, self.dtype = tuple(weight.shape), weight.dtype

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's bias, for code that asks for it."""
        return getattr(self.shell, "bias", None)

    @property
    def weight(self) -> torch.Tensor:
        """An open node that gives the weight, for code that asks for it."""
        attributes: dict[str, Any] = {"path": self.path, "kind": "weight", "bias": 0}
        found: torch.Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Site", [], attributes, dtype=self.dtype, shape=self.shape, version=1
        )
        return found

    def __getattr__(self, name: str) -> Any:
        """What else the model's code asks of the layer, a convolution's stride for example."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("shell"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Open(self.path):
            stand_in = torch.empty(self.shape, dtype=self.dtype)
            return functional_call(self.shell, {"weight": stand_in}, args, kwargs)


class _Open(Functions):
    """Turns the one operation that consumes the weight into an open node."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def instead(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = OPERATIONS.get(func)
        if kind is None:
            return func(*args, **kwargs)
        x, weight, bias, layout = operands(kind, args, kwargs)
        if func is F.embedding_bag:
            return bags(functools.partial(self._rows, weight), args, kwargs)
        if kind == "embedding":
            return self._rows(weight, x)
        attributes: dict[str, Any] = {"path": self._path, "kind": kind, "bias": int(bias is not None)}
        attributes["rank"] = x.ndim
        dtype = weight.dtype
        if kind == "conv":
            attributes |= _conv_attributes(layout, weight.shape[2:])
            shape = [*x.shape[: -len(weight.shape[2:])], *_conv_sizes(x, weight, attributes)]
            shape[-len(weight.shape[2:]) - 1] = weight.shape[0]
        else:
            width = weight.shape[0] if kind == "linear" else weight.shape[1]
            shape = [*x.shape[:-1], width]
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Site", [x], attributes, dtype=dtype, shape=shape, version=1
        )

    def _rows(self, weight: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """An open node that looks up rows."""
        attributes: dict[str, Any] = {"path": self._path, "kind": "embedding", "bias": 0}
        shape = [*numbers.shape, weight.shape[1]]
        found: torch.Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Site", [numbers], attributes, dtype=weight.dtype, shape=shape, version=1
        )
        return found


def _conv_attributes(layout: Mapping[str, Any], kernel: Sequence[int]) -> dict[str, Any]:
    rank = len(kernel)
    spread = {name: _each(layout[name], rank) for name in ("stride", "dilation")}
    if layout["padding"] == "same":
        total = [d * (k - 1) for d, k in zip(spread["dilation"], kernel, strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = 2 * (_each(0 if layout["padding"] == "valid" else layout["padding"], rank))
    return {
        "strides": spread["stride"],
        "dilations": spread["dilation"],
        "pads": pads,
        "group": int(layout["groups"]),
    }


def _each(value: Any, rank: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, Sequence) else [int(value)]
    return values * rank if len(values) == 1 else values


def _conv_sizes(x: torch.Tensor, weight: torch.Tensor, at: Mapping[str, Any]) -> list[Any]:
    rank = weight.ndim - 2
    sizes = zip(x.shape[-rank:], weight.shape[2:], at["strides"], at["dilations"], strict=True)
    pads = [first + last for first, last in zip(at["pads"][:rank], at["pads"][rank:], strict=True)]
    return [(n + p - d * (k - 1) - 1) // s + 1 for (n, k, s, d), p in zip(sizes, pads, strict=True)]


class _Flat(nn.Module):
    """The model as a function from tensors to a tuple of tensors."""

    def __init__(self, model: nn.Module, like: Batch) -> None:
        super().__init__()
        self.model, self.like = model, like

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with _attention.FourDimensional():
            if isinstance(self.like, dict):
                output = self.model(**dict(zip(self.like, inputs, strict=True)))
            else:
                output = self.model(*inputs)
        return tuple(_structure.leaves(output))


def _export(
    twin: nn.Module, examples: Sequence[Batch], template: Any, equal: _repeated.Equal | None
) -> Skeleton:
    """The model's graph: with blocks that are equal exported once if there are any, then whole, then of fixed shape."""
    rule = "the model must be exportable to ONNX to run here"
    way_out = "use --runtime torch, or remove what the message names from forward"
    sample, free = _example(examples)
    failed = []
    fixed: list[dict[int, Any]] = [{} for _ in free]
    ways = [(sample, free, equal)] if equal is not None else []
    for batch, dims, once in [*ways, (sample, free, None), (examples[0], fixed, None)]:
        whole = functools.partial(_whole, batch=batch, dims=dims)
        try:
            with foreign(_Failed, rule, way_out=way_out, quoted=lambda e: first_line(e.__cause__ or e)):
                proto = whole(twin) if once is None else _repeated.export(twin, once, DOMAIN, whole, _program)
                return _skeleton(proto, batch, template)
        except _Failed as error:
            failed.append(error)
    raise failed[-1]


class _Failed(ModelError):
    """The exporter fell over a model's own forward; another way may do."""


def _whole(twin: nn.Module, batch: Batch, dims: Sequence[dict[int, Any]]) -> Any:
    return _program(_Flat(twin, batch), tensors(batch), dims, names(batch))


def _program(
    module: nn.Module, values: Sequence[torch.Tensor], dims: Sequence[dict[int, Any]], called: Sequence[str]
) -> Any:
    """The ModelProto of a module that takes tensors, of which some dimensions are free."""
    with warnings.catch_warnings(), torch.no_grad(), unfused(), _quiet():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            module.eval(),
            tuple(values),
            dynamo=True,
            input_names=list(called),
            dynamic_shapes=(tuple(dims),) if any(dims) else None,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
        _simplify(program.model)
    proto = program.model_proto
    _attention.by_rows(proto.graph)
    _pools.pooled(proto.graph)
    return proto


def _simplify(model: Any) -> None:
    """Fold constants and drop what does nothing; inputs keep their names, also where an output is one of them.

    The exporter's own way also writes RotaryEmbedding nodes, which take no angles that a batch shares.
    """
    import onnxscript.optimizer

    names = [value.name for value in model.graph.inputs]
    onnxscript.optimizer.optimize_ir(model)
    for value, name in zip(model.graph.inputs, names, strict=True):
        for output in model.graph.outputs:
            if output.name == name and output is not value:
                output.name = f"{name}_given"
        value.name = name


def _skeleton(proto: Any, batch: Batch, template: Any) -> Skeleton:
    shapes = [
        tuple(None if d.dim_param else d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in proto.graph.input
    ]
    if len(shapes) != len(tensors(batch)):
        kept = {value.name for value in proto.graph.input}
        raise ModelError(
            "every input must reach the output", got=", ".join(set(names(batch)) - kept) + " unused"
        )
    inputs = tuple(value.name for value in proto.graph.input)
    return Skeleton(proto.SerializeToString(), inputs, tuple(shapes), template)


def _example(examples: Sequence[Batch]) -> tuple[Batch, list[dict[int, Any]]]:
    """A batch to trace, of at least two samples, and the dimensions that may vary, per tensor.

    The batch dimension may always vary; so may every dimension that differs among the examples, and the length of
    integer sequences (tokens). The tracer fixes dimensions of size 1, hence the doubling.
    """
    auto = torch.export.Dim.AUTO
    every = [tensors(batch) for batch in examples if names(batch) == names(examples[0])]
    first = every[0]
    lengths = {t.shape[1] for t in first if t.ndim == 2 and not t.is_floating_point()}
    free: list[dict[int, Any]] = []
    for index, tensor in enumerate(first):
        same_rank = [batch[index] for batch in every if batch[index].ndim == tensor.ndim]
        dims = {d for d in range(tensor.ndim) if len({t.shape[d] for t in same_rank}) > 1}
        dims |= {0} if tensor.ndim else set()
        dims |= {1} if tensor.ndim >= 2 and tensor.shape[1] in lengths else set()
        free.append(dict.fromkeys(sorted(dims), auto))
    batched = {t.shape[0] for t in first if t.ndim}
    if len(batched) == 1 and all(t.ndim for t in first):
        first = [torch.cat((t, t)) for t in first]
    return _like(examples[0], first), free


def _like(batch: Batch, values: Sequence[torch.Tensor]) -> Batch:
    if isinstance(batch, torch.Tensor):
        return values[0]
    return dict(zip(batch, values, strict=True)) if isinstance(batch, dict) else tuple(values)


def _key(twin: nn.Module, examples: Sequence[Batch]) -> str:
    """Equal for models that export to the same skeleton: same structure, same values outside the sites."""
    digest = hashlib.sha256()
    for path, module in twin.named_modules(remove_duplicate=False):
        digest.update(canonical([path, identity(module)]))
    inside = tuple(f"{path}." for path, m in twin.named_modules() if isinstance(m, _OpenSite))
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        if not name.startswith(inside or ("\0",)):
            digest.update(canonical([name, str(tensor.dtype), list(tensor.shape), tensor_digest(tensor)]))
    for batch in examples:
        for name, tensor in zip(names(batch), tensors(batch), strict=True):
            digest.update(canonical([name, str(tensor.dtype), list(tensor.shape)]))
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and its graphs of what it cannot follow off the terminal."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "torch.export")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
