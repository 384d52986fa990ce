"""Finds the sites of a model and collects, in one streamed pass over the examples, what every method needs of them.

A site is a module whose parameter `weight` is consumed by exactly one linear, convolution or embedding operation in each
forward pass of that module, and by nothing else. Whatever else holds weights is left alone, and a note says why.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from flyweight.analysis.calls import Call, Watch, owners, tensors_in, unfused
from flyweight.errors import DataError
from flyweight.inputs.check import run_example
from flyweight.records import Batch, Site

SAMPLE = 1 << 14
"""Activation values kept per site, drawn at random over all examples."""

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


@dataclass(frozen=True, eq=False)
class Range:
    """The values a tensor took: exact extremes, and a random sample of about SAMPLE values."""

    low: float
    high: float
    sample: torch.Tensor  # (n,) float32


@dataclass(frozen=True)
class SiteStatistics:
    """What one streamed pass over the examples saw at a site."""

    input: Range
    output: Range
    energy: torch.Tensor | None  # (input channels,) mean square of the input; None for embeddings
    calls: int
    """Forward passes of the module in one pass of the model."""
    own_input: bool
    """Whether the operation consumes the module's own input, up to zero padding and reshaping."""


@dataclass(frozen=True)
class Analysis:
    """The sites of a model, in the order in which they run."""

    sites: tuple[Site, ...]
    statistics: Mapping[str, SiteStatistics]
    notes: tuple[str, ...]
    bytes: int
    """Bytes of all parameters and buffers; tied ones once."""
    macs: int
    """Multiply-accumulates of all sites in one pass of the first example."""


@dataclass
class _Seen:
    """Running sums of one site."""

    kind: str
    macs: int = 0
    calls: int = 0
    low: float = math.inf
    high: float = -math.inf
    out_low: float = math.inf
    out_high: float = -math.inf
    samples: list[torch.Tensor] = field(default_factory=list)
    out_samples: list[torch.Tensor] = field(default_factory=list)
    energy: torch.Tensor | None = None
    rows: int = 0
    own_input: bool = True


def analyse(
    model: nn.Module, examples: Sequence[Batch], seed: int = 0, seen: Callable[[int], None] = lambda _: None
) -> Analysis:
    """The sites of a model in eval mode, with their costs and statistics from one pass over the examples.

    seen is told the number of examples done. Raises DataError where an activation is NaN or infinite, or where the model
    refuses an example.
    """
    recorder = _Recorder(model, per_call=max(256, SAMPLE // len(examples)), seed=seed)
    with unfused(), recorder:
        for index in range(len(examples)):
            recorder.first = index == 0
            recorder.output(run_example(model, examples, index))
            seen(index + 1)
    return recorder.analysis()


class _Recorder:
    """Collects the calls of one model while it is entered."""

    def __init__(self, model: nn.Module, per_call: int, seed: int) -> None:
        self._model, self._per_call = model, per_call
        self._random = torch.Generator().manual_seed(seed)
        self._owners = owners(model)
        self._watch = Watch(self._owners, self._call, self._other)
        self._stack = contextlib.ExitStack()
        self._active: dict[str, list[Any]] = {}
        self._seen: dict[str, _Seen] = {}
        self._left: dict[str, str] = _tied(model)
        self._hooks: list[Any] = []
        self.first = True

    def __enter__(self) -> None:
        for path in self._owners.values():
            module = self._model.get_submodule(path)
            self._hooks += [
                module.register_forward_pre_hook(self._begin(path), with_kwargs=True),
                module.register_forward_hook(self._end(path), always_call=True),
            ]
        self._stack.enter_context(self._watch)

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        for hook in self._hooks:
            hook.remove()

    def _begin(self, path: str) -> Callable[..., None]:
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._active[path] = [next(iter((*args, *kwargs.values())), None), 0]

        return begin

    def _end(self, path: str) -> Callable[..., None]:
        def end(module: nn.Module, args: Any, output: Any) -> None:
            self._active.pop(path, None)

        return end

    def output(self, value: Any) -> None:
        """Leave alone what hands its weight out of the model."""
        for tensor in tensors_in([value]):
            if id(tensor) in self._owners:
                self._left.setdefault(self._owners[id(tensor)], "its weight is an output of the model")

    def _other(self, path: str, function: str) -> None:
        self._left.setdefault(path, f"its weight is also used by {function}")

    def _call(self, path: str, call: Call) -> None:
        active = self._active.get(path)
        if active is None:
            self._left.setdefault(path, "its weight is used outside its own forward")
            return
        active[1] += 1
        if active[1] > 1:
            self._left.setdefault(path, "its weight is used more than once in one forward")
        if kind_of(self._model.get_submodule(path)) != ("linear" if call.kind == "addmm" else call.kind):
            self._left.setdefault(path, f"its class does not tell that it computes a {call.kind}")
        if call.weight.ndim < 2:
            self._left.setdefault(path, "its weight is a vector")
        if call.kind == "conv" and call.input.ndim != call.weight.ndim:
            self._left.setdefault(path, "its input has no batch dimension")
        if call.bias is not None and call.bias is not self._model.get_submodule(path)._parameters.get("bias"):
            self._left.setdefault(path, "its bias is computed while it runs")
        if call.layout.get("max_norm") is not None:
            self._left.setdefault(path, "an embedding with max_norm changes its weight while it runs")
        seen = self._seen.setdefault(path, _Seen(call.kind))
        if self.first:
            seen.calls += 1
            seen.macs += _macs(call)
            seen.own_input &= _same_values(active[0], call.input)
        if path not in self._left:
            self._statistics(path, seen, call)

    def _statistics(self, path: str, seen: _Seen, call: Call) -> None:
        if call.kind != "embedding" and call.input.numel():
            seen.low, seen.high = _extremes(path, call.input, seen.low, seen.high)
            seen.samples.append(self._sample(call.input))
            values = call.input.detach().float()
            channels = 1 if call.kind == "conv" else values.ndim - 1
            others = [d for d in range(values.ndim) if d != channels]
            energy = torch.linalg.vector_norm(values, dim=others).square() if others else values.square()
            seen.rows += values.numel() // values.shape[channels]
            seen.energy = energy + (0 if seen.energy is None else seen.energy)
        if call.output.numel():
            seen.out_low, seen.out_high = _extremes(path, call.output, seen.out_low, seen.out_high)
            seen.out_samples.append(self._sample(call.output))

    def _sample(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.detach().flatten()
        if flat.numel() <= self._per_call:
            return flat.float().clone()
        index = torch.randint(flat.numel(), (self._per_call,), generator=self._random)
        return flat[index.to(flat.device)].float().cpu()

    def analysis(self) -> Analysis:
        sites = {path: seen for path, seen in self._seen.items() if path not in self._left}
        left = [
            f"{path} stays as it is: {why}"
            for path, why in self._left.items()
            if path in self._seen or isinstance(self._model.get_submodule(path), _LAYERS)
        ]
        return Analysis(
            sites=tuple(_site(self._model, path, seen) for path, seen in sites.items()),
            statistics={path: _finish(seen) for path, seen in sites.items()},
            notes=(*left, *self._never_run()),
            bytes=model_bytes(self._model),
            macs=sum(seen.macs for seen in self._seen.values()),
        )

    def _never_run(self) -> list[str]:
        idle = [
            path
            for path in self._owners.values()
            if isinstance(self._model.get_submodule(path), _LAYERS)
            and path not in self._seen
            and path not in self._left
        ]
        return [f"{path} stays as it is: no example ran it" for path in idle]


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def kind_of(module: nn.Module) -> Literal["linear", "conv", "embedding"]:
    """What a module that owns a `weight` computes, told by its class or, failing that, by its weight's dimensions."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    weight = module._parameters.get("weight")
    return "conv" if weight is not None and weight.ndim > 2 else "linear"


def plain_site(model: nn.Module, path: str) -> Site:
    """A site by its path alone, without statistics or costs, as rebuilding a stored artifact needs it."""
    return Site(name=path, kind=kind_of(model.get_submodule(path)), parameters=0, bytes=0, macs=0)


def _tied(model: nn.Module) -> dict[str, str]:
    """Modules that share one weight, with the reason to leave them alone."""
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(path)
    return {
        path: f"its weight is tied with {', '.join(p for p in paths if p != path)}"
        for paths in users.values()
        if len(paths) > 1
        for path in paths
    }


def _site(model: nn.Module, path: str, seen: _Seen) -> Site:
    own = list(model.get_submodule(path).parameters(recurse=False))
    return Site(
        name=path,
        kind=kind_of(model.get_submodule(path)),
        parameters=sum(p.numel() for p in own),
        bytes=sum(p.numel() * p.element_size() for p in own),
        macs=seen.macs,
    )


def _finish(seen: _Seen) -> SiteStatistics:
    energy = None if seen.energy is None else (seen.energy / max(seen.rows, 1)).cpu()
    return SiteStatistics(
        input=_range(seen.low, seen.high, seen.samples),
        output=_range(seen.out_low, seen.out_high, seen.out_samples),
        energy=energy,
        calls=seen.calls,
        own_input=seen.own_input,
    )


def _range(low: float, high: float, samples: list[torch.Tensor]) -> Range:
    if not samples:
        return Range(0.0, 0.0, torch.zeros(0))
    return Range(low, high, torch.cat(samples))


def _extremes(path: str, tensor: torch.Tensor, low: float, high: float) -> tuple[float, float]:
    smallest, largest = (float(v) for v in torch.aminmax(tensor.detach()))
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise DataError(
            "activations must be finite",
            got=f"{bad} of {tensor.numel()} values NaN or infinite",
            where=f"layer {path}",
            way_out="check the examples and the model's weights",
        )
    return min(low, smallest), max(high, largest)


def _macs(call: Call) -> int:
    if call.kind == "embedding":
        return 0
    per_output = call.weight.numel() // call.weight.shape[1 if call.kind == "addmm" else 0]
    return int(call.output.numel()) * int(per_output)


def _same_values(module_input: Any, operand: torch.Tensor) -> bool:
    """Whether two tensors hold the same values up to zero padding and reshaping; sums tell them apart well enough."""
    if module_input is operand:
        return True
    if not isinstance(module_input, torch.Tensor) or module_input.dtype != operand.dtype:
        return False
    if not operand.is_floating_point():
        return bool(
            module_input.numel() == operand.numel() and torch.equal(module_input.flatten(), operand.flatten())
        )
    first, second = (t.detach().double() for t in (module_input, operand))
    return torch.allclose(
        first.sum(), second.sum(), rtol=1e-9, atol=1e-9 * float(first.abs().sum()) + 1e-30
    ) and (torch.allclose(first.square().sum(), second.square().sum(), rtol=1e-9, atol=1e-30))
