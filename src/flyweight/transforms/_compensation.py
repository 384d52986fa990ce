"""Layers that read units that went make up for them, by least squares, and biases and norms take over the means.

The new weight is what comes nearest to the original layer's output, given the inputs that the layer gets behind all that
went and changed before it (Hassibi and Stork, 1993; Kurtic et al., "ZipLM", arXiv 2302.04089, 2023; with the original's
output as the aim: He et al., "Channel pruning", arXiv 1707.06168, 2017). It is drawn to the old weight, as strongly as does
best on examples that are kept apart, so that few examples change little.

Shapes: P groups of a convolution (else 1), each of O outputs and I inputs, of which K stay.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from flyweight.analysis.bare import TURNED, Bare, is_bare, layer_at, parameter_path
from flyweight.analysis.gram import Moments
from flyweight.analysis.importance import input_axis
from flyweight.analysis.sites import kind_of
from flyweight.analysis.trace import trace
from flyweight.errors import DataError, ModelError
from flyweight.transforms._contract import Context
from flyweight.transforms._copies import view
from flyweight.transforms._sequential import Changes, Work, in_order, one_by_one

Stay = Mapping[str, Mapping[int, torch.Tensor]]
"""The indices (K,) that stay of each tensor's dimensions, of those from which any goes."""
_RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Of the mean square input, what is added to each input's: how strongly a weight is drawn to the old one."""
_BLIND = 0.01
"""The same, where no examples judge."""


def compensated(
    model: nn.Module, silent: nn.Module, stay: Stay, fitted: Stay, context: Context
) -> dict[str, torch.Tensor]:
    """New values of weights, biases and norms' means by name, in their old shapes, those of what goes being zero.

    silent: the model in which all that goes is zero; fitted: as stay, of the groups that are made up for. Weights that
    several modules hold stay as they are, and so do those of transposed convolutions. Weights that are read rather than
    called make up for their inputs as the original has them.
    """
    layers = {
        one.path: one for one in _layers(model, silent, stay, context) if one.axis in fitted.get(one.name, {})
    }

    def change(path: str, known: Context) -> Changes:
        found = known.moments(path) or _original(known.gram(path))
        return {} if found is None else _changed(silent, layers[path], *found)

    bare = [path for path, one in layers.items() if is_bare(one.module)]
    called = [path for path in layers if path not in bare]
    tied = {path: (one.shifts,) for path, one in layers.items() if one.shifts not in ("", "bias")}
    work = Work(called, bare, set(), context, change, tied, began=silent, moments=True)
    try:
        changes = in_order(model, work)
        if changes is None:
            changes = one_by_one(view(model, {}).eval(), {}, work)
    except (DataError, ModelError) as error:  # such as experts that other tokens are sent to
        context.say(f"layers make up for what they read in the original, not behind other cuts: {error.rule}")
        changes = {path: new for site in layers for path, new in change(site, context).items()}
    return _values(changes, layers)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer that reads what goes, and whose inputs are known."""

    path: str
    name: str
    """Of its weight."""
    original: nn.Module
    module: nn.Module
    """The layer in which all that goes is zero."""
    stay: Mapping[int, torch.Tensor]
    """The indices that stay of its weight's dimensions."""
    shifts: str
    """What takes over means: "bias", or the path of the batch norm behind the layer; empty: nothing does."""

    @property
    def axis(self) -> int:
        """Which dimension of the weight its inputs are."""
        return 0 if input_axis(self.module) == 0 else 1

    def wide(self) -> torch.Tensor:
        """(P, O, I) float64: the original's weight."""
        weight: torch.Tensor = self.original.get_parameter("weight").detach().double()
        if kind_of(self.original) == "conv":
            return weight.flatten(1).view(cast(nn.Conv2d, self.original).groups, -1, weight[0].numel())
        return (weight.T if self.axis == 0 else weight)[None]

    def columns(self, kernel: int) -> torch.Tensor:
        """(K,) the inputs that stay; kernel: how many each channel has."""
        return (self.stay[self.axis][:, None] * kernel + torch.arange(kernel)).flatten()

    def rows(self, shape: torch.Size) -> torch.Tensor:
        """(P, O) bool: which outputs stay."""
        found = torch.ones(shape, dtype=torch.bool)
        if 1 - self.axis in self.stay:
            found.fill_(False).view(-1)[self.stay[1 - self.axis]] = True
        return found


def _layers(model: nn.Module, silent: nn.Module, stay: Stay, context: Context) -> Iterator[_Layer]:
    """The layers whose weight is theirs alone and whose inputs are known."""
    held = collections.Counter(id(one) for _, one in model.named_parameters(remove_duplicate=False))
    norms = trace(model, context.examples[0]).norms
    for path, seen in context.statistics.items():
        layer = layer_at(model, path)
        if seen.mean is None or held[id(layer.weight)] > 1 or not _reads(layer):
            continue
        bias, name = layer._parameters.get("bias"), parameter_path(model, path.removesuffix(TURNED))
        shifts = norms.get(path, "") if bias is None else "bias" if held[id(bias)] == 1 else ""
        yield _Layer(path, name, layer, layer_at(silent, path), stay.get(name, {}), shifts)


def _reads(layer: nn.Module) -> bool:
    """Whether it is known what each output of a layer reads."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return not layer.transposed
    return input_axis(layer) is not None and layer.get_parameter("weight").ndim == 2


def _original(gram: torch.Tensor | None) -> tuple[Moments, Moments | None] | None:
    """What is known where only the original's inputs are."""
    if gram is None or gram.ndim > 2:
        return None
    own, none = gram.double()[None], torch.zeros(1, len(gram), dtype=torch.float64)
    return Moments(own, own, none, none, 1), None


def _changed(silent: nn.Module, layer: _Layer, taught: Moments, judged: Moments | None) -> Changes:
    """The layer that makes up for what it misses, by path, and the norm behind it, where that takes over the means."""
    module, old = view(layer.module, {}), layer.wide()
    weight = module.get_parameter("weight")
    columns, rows = layer.columns(old.shape[2] // weight.shape[layer.axis]), layer.rows(old.shape[:2])
    new, shift = _fitted(old, columns, bool(layer.shifts), taught, judged)
    wide, shift = torch.zeros_like(old), (shift * rows).flatten()
    wide[:, :, columns] = new * rows[..., None]
    _put(module, "weight", wide[0].T if layer.axis == 0 else wide.reshape(weight.shape))
    changes: Changes = {layer.path: module}
    if layer.shifts == "bias":
        _put(module, "bias", module.get_parameter("bias").detach().double() + shift)
    elif layer.shifts:
        norm = changes[layer.shifts] = view(silent.get_submodule(layer.shifts), {})
        mean = norm.get_buffer("running_mean")
        norm._buffers["running_mean"] = (mean.double() - shift).to(mean.dtype)
    return changes


def _put(module: nn.Module, name: str, value: torch.Tensor) -> None:
    old = module.get_parameter(name)
    module._parameters[name] = nn.Parameter(value.to(old.dtype).contiguous(), old.requires_grad)


def _fitted(
    old: torch.Tensor, columns: torch.Tensor, shifts: bool, taught: Moments, judged: Moments | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight (P, O, K) of the inputs that stay, and what the bias (P, O) takes over; shifts: whether there is one."""
    start, ridge = old[:, :, columns], _BLIND
    spread, pull = _around(old, columns, taught, taught if shifts else None)
    every = taught
    if judged is not None:
        ridge = _ridge(spread, pull, *_around(old, columns, judged, taught if shifts else None))
        every = taught.joined(judged)
        spread, pull = _around(old, columns, every, every if shifts else None)
    new = start + _moved(spread, pull, ridge)
    return new, (old @ every.before[..., None] - new @ every.mean[:, columns, None])[..., 0]


def _around(
    old: torch.Tensor, columns: torch.Tensor, seen: Moments, middle: Moments | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """How the inputs that stay go together, (P, K, K), and with what the original gives beyond the old weight, (P, O, K).

    Both around the means of `middle`, or around zero.
    """
    gram, cross = seen.gram, seen.cross
    if middle is not None:
        gram = _centred(gram, seen.mean, seen.mean, middle.mean, middle.mean)
        cross = _centred(cross, seen.before, seen.mean, middle.before, middle.mean)
    spread = gram[:, columns][:, :, columns]
    return spread, old @ cross[:, :, columns] - old[:, :, columns] @ spread


def _centred(
    product: torch.Tensor, left: torch.Tensor, right: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """The mean outer product of two things around a and b, from that around zero and the means of both."""
    return product - left[..., None] * b[:, None] - a[..., None] * (right - b)[:, None]


def _ridge(
    spread: torch.Tensor, pull: torch.Tensor, judged_spread: torch.Tensor, judged_pull: torch.Tensor
) -> float:
    """The first ridge whose next does worse on the examples that judge; infinite where the old weight does best."""
    best, found = 0.0, float("inf")
    for ridge in _RIDGES:
        moved = _moved(spread, pull, ridge)
        error = float((moved @ judged_spread * moved).sum() - 2 * (moved * judged_pull).sum())
        if error >= best and found != float("inf"):
            break
        best, found = (error, ridge) if error < best else (best, found)
    return found


def _moved(spread: torch.Tensor, pull: torch.Tensor, ridge: float) -> torch.Tensor:
    """(P, O, K) how far the weight moves."""
    if ridge == float("inf"):
        return torch.zeros_like(pull)
    inner, size = spread.clone(), spread.diagonal(dim1=1, dim2=2).mean(1)
    inner.diagonal(dim1=1, dim2=2).add_((ridge * torch.where(size > 0, size, 1))[:, None])
    moved: torch.Tensor = torch.linalg.solve(inner, pull.mT).mT
    return moved


def _values(changes: Changes, layers: Mapping[str, _Layer]) -> dict[str, torch.Tensor]:
    """The tensors of changed modules by their names in the model."""
    found: dict[str, torch.Tensor] = {}
    for path, module in changes.items():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            here = isinstance(module, Bare) or path.endswith(TURNED)
            found[layers[path].name if here else f"{path}.{name}".lstrip(".")] = tensor.detach()
    return found
