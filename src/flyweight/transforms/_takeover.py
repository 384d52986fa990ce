"""What a block gave is taken over by a layer before it, by least squares, where adding there is the same as adding behind it.

As in Shopkhoev et al., "ReplaceMe" (arXiv 2505.02819, 2025), but for any layer of which this can be shown on an example: a
linear layer or convolution gets the weight whose outputs come nearest to what is missing, a norm other factors. Strengths
of the penalty are tried on held-out examples; where none helps there, nothing is changed.

Shapes: N places, I inputs of the layer, a 1 for its bias among them, and O channels.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import pad, unfold

from flyweight.analysis.answers import floats_of
from flyweight.analysis.blocks import Arguments, hooked
from flyweight.analysis.importance import input_axis, outputs_first
from flyweight.analysis.influence import leading
from flyweight.errors import ModelError, foreign
from flyweight.inputs.check import run
from flyweight.records import Batch

_TRIED = 8
"""Layers before a block that are asked whether they could take over, the last first."""
_SAME = 1e-3
"""Of a change of the output, by what two ways to make it may differ."""
_ROUNDING = 2e-6
"""Of the output itself, what rounding may account for."""
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Shares of the mean square input that are added to each input's."""
_MOST = 8192
"""Inputs of a layer up to which a least-squares problem is solved."""


@dataclass
class _Sums:
    """Sums over places of one half of the examples."""

    gram: torch.Tensor  # (I, I) float64, or (2, O) of a norm: squares and sums of its outputs
    cross: torch.Tensor  # (I, O) float64, or (2, O): their products with what is missing, and what is missing
    count: int = 0


def taken_over(
    original: nn.Module, model: nn.Module, path: str, examples: Sequence[Batch]
) -> Mapping[str, torch.Tensor]:
    """New values of a layer's parameters, by name, that bring a model without its module at `path` nearer to the original.

    Both in float32 and eval mode, neither is changed. Empty where no layer before can take over, or where it would not help.
    """
    layer = _taker(model, path, examples[0])
    if layer is None:
        return {}
    module = model.get_submodule(layer)
    if not _proportional(module, *_seen(model, (layer,), examples[0])[layer]):
        return {}
    sums = _sums(original, model, path, layer, examples)
    return {f"{layer}.{name}": value for name, value in _fitted(module, sums).items()}


def _taker(model: nn.Module, path: str, batch: Batch) -> str | None:
    """The last layer before a module of which it does not matter whether one adds to its output or to the module's."""
    leaves = [name for name, module in model.named_modules() if name and not list(module.children())]
    order, shapes = list[str](), dict[str, Any]()

    def end(name: str, output: Any) -> None:
        order.append(name)
        shapes[name] = getattr(leading(output)[0], "shape", None)

    with hooked(model, {*leaves, path}, lambda name, given: None, end):
        base = floats_of(run(model, batch))
    if order.count(path) != 1:
        return None
    before = order[: order.index(path)]
    fit = [name for name in reversed(before) if order.count(name) == 1 and shapes[name] == shapes[path]]
    able = [name for name in fit if _able(model, name)][:_TRIED]
    if not able:
        return None
    delta = torch.randn(shapes[path], generator=torch.Generator().manual_seed(0))
    wanted = _moved(model, path, delta, batch)
    change = _distance(wanted, base)
    room = _SAME * change + _ROUNDING * _distance(base, None)
    fits = (one for one in able if _distance(_moved(model, one, delta, batch), wanted) <= room)
    return next(fits, None) if change > room else None


def _able(model: nn.Module, path: str) -> bool:
    """Whether a layer's parameters can be fitted, and are its own."""
    module = model.get_submodule(path)
    held = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    own = list(module._parameters.values())
    if "weight" not in module._parameters or any(p is not None and held.count(id(p)) > 1 for p in own):
        return False
    weight = module.get_parameter("weight")
    return _is_norm(module) or (_rows_of(module) is not None and weight[0].numel() <= _MOST)


def _rows_of(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What makes the rows (N, I) that a layer's weight multiplies with of its input; None for a layer that has none."""
    axis = input_axis(module)
    if axis is None:
        return None
    if not isinstance(module, nn.modules.conv._ConvNd):
        return lambda x: x.flatten(0, -2)
    plain = isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and module.padding != "same"
    if not plain:
        return None
    sizes: dict[str, Any] = {name: getattr(module, name) for name in ("padding", "dilation", "stride")}
    sizes["padding"] = 0 if sizes["padding"] == "valid" else sizes["padding"]
    return lambda x: unfold(x, module.kernel_size, **sizes).movedim(1, -1).flatten(0, -2)


@contextlib.contextmanager
def _adding(module: nn.Module, delta: torch.Tensor) -> Iterator[None]:
    def add(module: nn.Module, args: Any, output: Any) -> Any:
        first, elements = leading(output)
        moved = first + delta.to(first) if first is not None else first
        return (moved, *output[1:]) if elements else moved

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _moved(model: nn.Module, path: str, delta: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    """The model's output where something is added to that of one of its modules."""
    with _adding(model.get_submodule(path), delta):
        return floats_of(run(model, batch))


def _distance(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor] | None) -> float:
    """The root of the summed squares of a difference, or of the first alone."""
    gaps = one if other is None else [a - b for a, b in zip(one, other, strict=True)]
    return math.sqrt(sum(float(gap.double().square().sum()) for gap in gaps))


def _sums(
    original: nn.Module, model: nn.Module, path: str, layer: str, examples: Sequence[Batch]
) -> list[_Sums]:
    """What both halves of the examples, every other one, or of the one example, tell."""
    module = model.get_submodule(layer)
    found: list[_Sums] = []
    for index, batch in enumerate(examples):
        wanted = _seen(original, (path,), batch)[path][1]
        seen = _seen(model, (path, layer), batch)
        missing = _channels_last(wanted.double() - seen[path][1].double())
        inputs, output = seen[layer]
        rows = _channels_last(output) if _is_norm(module) else _rows(module, inputs)
        halves = rows.chunk(2), missing.chunk(2)
        pairs = zip(*halves, strict=True) if len(examples) == 1 else [(rows, missing)]
        for place, (some, gone) in enumerate(pairs, index):
            _add(found, place % 2, _design(module, some.double()), gone, norm=_is_norm(module))
    return found


def _seen(model: nn.Module, paths: Sequence[str], batch: Batch) -> dict[str, tuple[Any, torch.Tensor]]:
    """What some modules are given first, and give first, in a pass; each runs once."""
    given: dict[str, Any] = {}
    found: dict[str, tuple[Any, torch.Tensor]] = {}

    def begin(path: str, args: Arguments) -> None:
        given[path] = next(itertools.chain(args.args, args.kwargs.values()), None)

    def end(path: str, output: Any) -> None:
        first, _ = leading(output)
        if first is not None:
            found[path] = given.pop(path), first.clone()

    with hooked(model, paths, begin, end):
        run(model, batch)
    return found


def _rows(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    make = _rows_of(module)
    return inputs if make is None else make(inputs)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """(N, O), where the channels of pictures stand second."""
    return (tensor.movedim(1, -1) if tensor.ndim > 3 else tensor).flatten(0, -2)


def _design(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """What the fitted factors multiply with: rows (N, I) with a 1 for a bias, or a norm's outputs without theirs."""
    bias = module._parameters.get("bias")
    if _is_norm(module):
        return rows if bias is None else rows - bias.detach().double()
    return rows if bias is None else pad(rows, (0, 1), value=1.0)


def _add(found: list[_Sums], half: int, design: torch.Tensor, missing: torch.Tensor, *, norm: bool) -> None:
    if norm:
        gram = torch.stack([design.square().sum(0), design.sum(0)])
        cross = torch.stack([(design * missing).sum(0), missing.sum(0)])
    else:
        gram, cross = design.T @ design, design.T @ missing
    while len(found) <= half:
        found.append(_Sums(torch.zeros_like(gram), torch.zeros_like(cross)))
    found[half].gram += gram
    found[half].cross += cross
    found[half].count += len(design)


def _fitted(module: nn.Module, halves: Sequence[_Sums]) -> dict[str, torch.Tensor]:
    """The layer's new parameters; none where what one half tells does not help the other."""
    if len(halves) < 2:
        return {}
    norm, has_bias = _is_norm(module), module._parameters.get("bias") is not None
    solve, error = (_scaled, _norm_error) if norm else (_solved, _error)
    tried = {
        penalty: error(halves[1], solve(halves[0], penalty, has_bias))
        + error(halves[0], solve(halves[1], penalty, has_bias))
        for penalty in _PENALTIES
    }
    best = min(tried, key=lambda penalty: tried[penalty])
    if not tried[best] < 0:
        return {}
    both = _Sums(*(sum(getattr(one, name) for one in halves) for name in ("gram", "cross", "count")))
    change = solve(both, best, has_bias)
    weight = module.get_parameter("weight").detach()
    if norm:
        found = {"weight": weight * (1 + change[0])}
    else:
        whole = outputs_first(module).double() + change[: len(change) - has_bias].T
        found = {"weight": whole.T if input_axis(module) == 0 else whole.reshape(weight.shape)}
    if has_bias:
        found["bias"] = module.get_parameter("bias").detach() + change[-1]
    return {name: value.to(weight.dtype) for name, value in found.items()}


def _solved(sums: _Sums, penalty: float, has_bias: bool) -> torch.Tensor:
    """The change (I, O) of a layer's weight, its bias last, that gives most of what is missing; no penalty is on the bias."""
    gram = sums.gram.clone()
    free = gram.diagonal()[: len(gram) - has_bias]
    free += penalty * float(free.mean()) or 1.0
    return torch.cholesky_solve(sums.cross, torch.linalg.cholesky(gram))


def _error(sums: _Sums, change: torch.Tensor) -> float:
    """The squared error with a change, less that without it."""
    return float((change * (sums.gram @ change - 2 * sums.cross)).sum())


def _scaled(sums: _Sums, penalty: float, has_bias: bool) -> torch.Tensor:
    """The change (2, O) of a norm's factors, as a share of them, and of its bias, that gives most of what is missing."""
    squares, total = sums.gram / sums.count
    products, missing = sums.cross / sums.count
    middle = total if has_bias else torch.zeros_like(total)
    spread = squares - middle.square()
    share = (products - middle * missing) / (spread + penalty * float(spread.mean()) + 1e-300)
    return torch.stack([share, missing - share * total if has_bias else torch.zeros_like(share)])


def _norm_error(sums: _Sums, change: torch.Tensor) -> float:
    share, shift = change
    squares, total = sums.gram
    products, missing = sums.cross
    gained = share.square() * squares + 2 * share * shift * total + shift.square() * sums.count
    return float((gained - 2 * (share * products + shift * missing)).sum())


def _is_norm(module: nn.Module) -> bool:
    """Whether a layer has one factor for each channel."""
    return module.get_parameter("weight").ndim == 1


def _proportional(module: nn.Module, given: Any, output: torch.Tensor) -> bool:
    """Whether twice a norm's weight is twice what it gives, its bias apart; with linear layers that is so."""
    if not _is_norm(module):
        return True
    bias = module._parameters.get("bias")
    with foreign(ModelError, "a norm must run by itself"), torch.no_grad():
        twice = functional_call(module, {"weight": 2 * module.get_parameter("weight")}, (given,))
    shape = (1, -1, *[1] * (output.ndim - 2)) if output.ndim > 3 else (-1,)
    zero = torch.zeros(1) if bias is None else bias.detach().view(shape)
    return torch.allclose(twice - zero, 2 * (output - zero), rtol=1e-3, atol=1e-5)
