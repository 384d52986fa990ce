"""Finds the sites of a model and collects, in one streamed pass over the examples, what every method needs of them.

A site is a module whose parameter `weight` is consumed by exactly one linear, convolution or embedding operation in each
forward pass of that module, and by nothing else. Modules that hold one weight are one site, which has the name of the first
that multiplies with it. Any other parameter that is only multiplied with, by a linear operation, a product or a convolution,
is a site that has the parameter's name (`analysis.bare`). Whatever else holds weights is left alone, and a note says why.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from flyweight.analysis._patches import input_sums, row_count, same_values
from flyweight.analysis.bare import TURNED, is_bare, layer_at, parameter_path
from flyweight.analysis.calls import Call, Watch, owners, sharers, tensors_in, unfused
from flyweight.errors import DataError
from flyweight.inputs.check import run_example
from flyweight.records import Batch, Site

SAMPLE = 1 << 14
"""Activation values kept per site, drawn at random over all examples."""

_COLUMNS = "columns"
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TABLES)


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
    mean: torch.Tensor | None = None
    """(P, I) float32: the mean of what each weight of an output channel is multiplied with, in the weight's order, for each
    of P groups of a convolution (else 1), padding included; None for embeddings and where nothing ran."""


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
    """Running sums of one use of a weight: by lookups, or by all products together."""

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
    sums: torch.Tensor | None = None
    summed: int = 0
    own_input: bool = True


def analyse(model: nn.Module, examples: Sequence[Batch], seed: int = 0) -> Analysis:
    """The sites of a model in eval mode, with their costs and statistics from one pass over the examples.

    Raises DataError where an activation is NaN or infinite, or where the model refuses an example.
    """
    recorder = _Recorder(model, per_call=max(256, SAMPLE // len(examples)), seed=seed)
    with unfused(), recorder:
        for index in range(len(examples)):
            recorder.first = index == 0
            recorder.output(run_example(model, examples, index))
    return recorder.analysis()


class _Recorder:
    """Collects the calls of one model while it is entered."""

    def __init__(self, model: nn.Module, per_call: int, seed: int) -> None:
        self._model, self._per_call = model, per_call
        self._random = torch.Generator().manual_seed(seed)
        self._owners, self._sharers = owners(model), sharers(model)
        self._watch = Watch(self._owners, self._call, self._other)
        self._stack = contextlib.ExitStack()
        self._active: dict[str, list[Any]] = {}
        self._seen: dict[tuple[str, bool], _Seen] = {}
        """By the weight's first holder, and whether rows are looked up."""
        self._uses: dict[str, str] = {}
        """How each module that ran reads its weight, and how each weight that is read from elsewhere is read."""
        self._read: set[str] = set()
        """The first holders of weights that are read other than by their own layer's forward."""
        self._left: dict[str, str] = {}
        self._hooks: list[Any] = []
        self.first = True

    def __enter__(self) -> None:
        modules = dict(self._model.named_modules())
        for path in (path for paths in self._sharers.values() for path in paths if path in modules):
            module = modules[path]
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

    def _call(self, owner: str, call: Call) -> None:
        inside = [path for path in self._active if path in self._sharers[owner]]
        path = inside[-1] if inside else owner
        if not inside or not _is_layer(self._model.get_submodule(path), call):
            self._read.add(owner)
            path = owner
        active = self._active.get(path, [None, 0])
        active[1] += 1
        self._uses.setdefault(path, _use(call))
        reason = self._unread(owner, call) if owner in self._read else self._unfit(path, call)
        if reason or self._mixed(owner):
            self._left.setdefault(owner, reason or self._mixed(owner) or "")
        seen = self._seen.setdefault((owner, call.kind == "embedding"), _Seen())
        if self.first:
            seen.calls = 1 if owner in self._read else seen.calls + 1
            seen.macs += _macs(call)
            seen.own_input &= owner not in self._read and same_values(active[0], call.input)
        if owner not in self._left:
            self._statistics(path, seen, call)

    def _unread(self, owner: str, call: Call) -> str | None:
        """Why a weight that is read from elsewhere is no site, or None."""
        if call.kind == "embedding":
            return "its rows are looked up by no embedding layer"
        if call.weight.ndim < 2 or (call.kind != "conv" and call.weight.ndim > 2):
            return f"it has {call.weight.ndim} dimensions"
        if self._uses[owner] != _use(call):
            return "it is read in different ways"
        return None

    def _unfit(self, path: str, call: Call) -> str | None:
        """Why a call does not make its module a site, or None."""
        module = self._model.get_submodule(path)
        if self._active[path][1] > 1:
            return "its weight is used more than once in one forward"
        if kind_of(module) != ("linear" if call.kind == "addmm" else call.kind):
            return f"its class does not tell that it computes a {call.kind}"
        if call.weight.ndim < 2:
            return "its weight is a vector"
        if call.kind == "conv" and call.input.ndim != call.weight.ndim:
            return "its input has no batch dimension"
        if call.bias is not None and call.bias is not module._parameters.get("bias"):
            return "its bias is computed while it runs"
        if call.layout.get("max_norm") is not None:
            return "an embedding with max_norm changes its weight while it runs"
        return None

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
            seen.sums = input_sums(call) + (0 if seen.sums is None else seen.sums)
            seen.summed += row_count(call)
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
        ran = [owner for owner, _ in self._seen]
        for owner in ran:
            reason = self._untied(owner)
            if reason:
                self._left.setdefault(owner, reason)
        groups = {self._named(owner): owner for owner in dict.fromkeys(ran) if owner not in self._left}
        first = list(self._uses)
        order = sorted(groups, key=lambda path: first.index(path if path in self._uses else groups[path]))
        merged = {
            path: self._seen.get((owner, False)) or self._seen[owner, True] for path, owner in groups.items()
        }
        sites = [self._site(path, groups[path], merged[path]) for path in order]
        return Analysis(
            sites=tuple(sites),
            statistics={path: _finish(merged[path]) for path in order},
            notes=(*self._notes(), *self._never_run(), *(_together(site) for site in sites if site.tied)),
            bytes=model_bytes(self._model),
            macs=sum(seen.macs for seen in self._seen.values()),
        )

    def _named(self, owner: str) -> str:
        """The module that a site is named by: the first to multiply with the weight, or else to look up its rows."""
        if owner in self._read:
            turned = TURNED if self._uses[owner] == _COLUMNS else ""
            return parameter_path(self._model, owner) + turned
        paths = [path for path in self._uses if path in self._sharers[owner]]
        return next((path for path in paths if self._uses[path] != "rows"), paths[0])

    def _untied(self, owner: str) -> str | None:
        """Why modules that hold one weight cannot be one site, or None."""
        if owner in self._read:
            return None
        idle = [path for path in self._sharers[owner] if path not in self._uses]
        columns = "columns" in {self._uses[path] for path in self._sharers[owner] if path in self._uses}
        for path in idle:  # a shared table that is itself never called, as in T5, is what its class says
            if columns or type(self._model.get_submodule(path)) not in (nn.Linear, *_TABLES):
                return f"its weight is tied with that of {path}, which no example ran"
        return None

    def _mixed(self, owner: str) -> str | None:
        """Why one code cannot serve the modules that hold a weight, as far as they ran, or None."""
        paths = [path for path in self._sharers[owner] if path in self._uses]
        uses = {self._uses[path] for path in paths}
        mixed = len(uses - {"rows"}) > 1 or {"rows", "columns"} <= uses
        return f"its weight is tied, and {' and '.join(paths)} read it in different ways" if mixed else None

    def _site(self, path: str, owner: str, seen: _Seen) -> Site:
        paths = (path,) if owner in self._read else self._sharers[owner]
        modules = [layer_at(self._model, one) for one in paths]
        own = {id(p): p for module in modules for p in module.parameters(recurse=False)}.values()
        return Site(
            name=path,
            kind=kind_of(layer_at(self._model, path)),
            parameters=sum(p.numel() for p in own),
            bytes=sum(p.numel() * p.element_size() for p in own),
            macs=seen.macs,
            tied=tuple(other for other in paths if other != path),
        )

    def _notes(self) -> list[str]:
        """What is left alone, and why."""
        return [
            f"{path} stays as it is: {why}"
            for owner, why in self._left.items()
            for path in self._sharers[owner]
            if path in self._uses or isinstance(layer_at(self._model, path), _LAYERS)
        ]

    def _never_run(self) -> list[str]:
        """Layers that are left alone since nothing ran them."""
        return [
            f"{path} stays as it is: no example ran it"
            for owner, paths in self._sharers.items()
            for path in paths
            if owner not in self._left
            and not any(other in self._uses for other in paths)
            and isinstance(layer_at(self._model, path), _LAYERS)
        ]


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def kind_of(module: nn.Module) -> Literal["linear", "conv", "embedding"]:
    """What a module that owns a `weight` computes, told by its class or, failing that, by its weight's dimensions."""
    if isinstance(module, _TABLES):
        return "embedding"
    weight = module._parameters.get("weight")
    return "conv" if weight is not None and weight.ndim > 2 else "linear"


def plain_site(model: nn.Module, path: str) -> Site:
    """A site by its path alone, without statistics or costs, as rebuilding a stored artifact needs it."""
    layer = layer_at(model, path)
    kind = kind_of(layer)
    if is_bare(layer):
        return Site(name=path, kind=kind, parameters=0, bytes=0, macs=0)
    together = next((paths for paths in sharers(model).values() if path in paths), (path,))
    tied = tuple(other for other in together if other != path)
    return Site(name=path, kind=kind, parameters=0, bytes=0, macs=0, tied=tied)


def _use(call: Call) -> str:
    """How a call reads its weight: "rows" are looked up; other words are equal where one code serves both calls."""
    if call.kind == "conv":
        return f"conv in {call.layout['groups']} groups"
    return {"embedding": "rows", "addmm": _COLUMNS}.get(call.kind, call.kind)


def _is_layer(module: nn.Module, call: Call) -> bool:
    """Whether a module's class tells which way round a call in its forward reads its weight."""
    return call.kind not in ("linear", "addmm") or isinstance(module, nn.Linear) == (call.kind == "linear")


def _together(site: Site) -> str:
    return f"{site.name} and {' and '.join(site.tied)} hold one weight: it is changed once, and stays tied"


def _finish(seen: _Seen) -> SiteStatistics:
    energy = None if seen.energy is None else (seen.energy / max(seen.rows, 1)).cpu()
    return SiteStatistics(
        input=_range(seen.low, seen.high, seen.samples),
        output=_range(seen.out_low, seen.out_high, seen.out_samples),
        energy=energy,
        calls=seen.calls,
        own_input=seen.own_input,
        mean=None if seen.sums is None else (seen.sums / max(seen.summed, 1)).float().cpu(),
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
