"""A layer in training for a code: it keeps a float master weight and computes with the value that the code would store.

Gradients pass rounding in one of two ways. "lsq": Esser et al., "Learned step size quantization" (arXiv 1902.08153, 2020);
zero points as in Bhalgat et al., "LSQ+" (arXiv 2004.09576, 2020). "ste": Bengio et al., "Estimating or propagating gradients
through stochastic neurons" (arXiv 1308.3432, 2013): the grid stays, and gradients pass as if nothing were rounded.

Shapes: a weight is (O, I), output channels by inputs of one of them; G groups of n inputs share a step.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call

from flyweight.codes import Grid, _stored
from flyweight.errors import ModelError
from flyweight.transforms._copies import substitute
from flyweight.transforms._int8 import affine
from flyweight.transforms._quantized import Decoded, QuantizedLayer, map_first, round_to, shell

LEAST = 1e-30
"""The smallest step: training may drive one towards 0, and nothing is divided by less."""
_SMOOTH = 0.05
"""How much of an output's range each batch in training replaces."""
_ROOM = 2.0**30
"""Half of what a bias may be in units of input step times weight scale, which runtimes keep in 32-bit integers."""


class LearningLayer(nn.Module):
    """The layer `inner` in training for a code.

    Parameters: master, the weight in its own shape and dtype; steps (O, G) or (1, 1), in units of where they started; zeros
    as steps, in units of steps, where the code has them; input_step and input_zero () where inputs are rounded. With fixed
    grids all but the master are buffers. Buffers: started and input_started, as steps and input_step; output_range (2,), the
    ends of what came out, where inputs are rounded. All of them are float32.

    Gradient descent moves steps and zero points as the papers say. So that optimizers that level gradients, as Adam, move
    them in proportion too, whatever their size, the parameters are relative and their gradients scaled to fit.
    """

    master: torch.Tensor
    steps: torch.Tensor
    started: torch.Tensor
    zeros: torch.Tensor | None
    input_step: torch.Tensor
    input_started: torch.Tensor
    input_zero: torch.Tensor
    output_range: torch.Tensor

    def __init__(
        self, inner: nn.Module, code: str, options: Any, grid: Grid, *, transposed: bool, learns: bool
    ) -> None:
        """inner: the layer, which is copied; grid: where the steps start; learns: steps are trained too."""
        super().__init__()
        weight = inner.get_parameter("weight")
        self.code, self.options, self.transposed, self.learns = code, options, transposed, learns
        self.low, self.high, self.group = grid.low, grid.high, grid.group
        self.top = 0
        self.inner = shell(inner)
        if isinstance(self.inner, nn.Embedding):
            self.inner.sparse = False  # steps are shared: their gradients need those of all rows
        self.master = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        shared = options.group == "tensor"
        self.register_buffer("started", (grid.scales[:1] if shared else grid.scales).clone())
        self._keep("steps", torch.ones_like(self.started))
        self._keep("zeros", None if grid.zeros is None else grid.zeros[:1] if shared else grid.zeros)

    def static(self, input_grid: tuple[float, int], output: tuple[float, float], top: int) -> LearningLayer:
        """Round inputs too, starting from the unsigned grid (scale, zero point) of integers from 0 to top.

        output: the ends of what comes out, followed in training.
        """
        self.top = top
        self.register_buffer("input_started", torch.tensor(input_grid[0]))
        self._keep("input_step", torch.tensor(1.0))
        self._keep("input_zero", torch.tensor(float(input_grid[1])))
        self.register_buffer("output_range", torch.tensor(output, dtype=torch.float32))
        return self

    def _keep(self, name: str, value: torch.Tensor | None) -> None:
        if value is None or not self.learns:
            self.register_buffer(name, None if value is None else value.clone())
        else:
            self.register_parameter(
                name, nn.Parameter(value.clone(), requires_grad=self.master.requires_grad)
            )

    @property
    def weight(self) -> torch.Tensor:
        """The rounded weight in the layer's own shape and dtype; gradients reach the master through it."""
        return self._rounded().as_subclass(Decoded)

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's bias; None if it has none."""
        return getattr(self.inner, "bias", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the inner layer computes with the rounded weight and, where asked for, the rounded input."""
        if self.top:
            args, kwargs = map_first(self._round, args, kwargs)
        output = functional_call(self.inner, {"weight": self._rounded()}, args, kwargs)
        if self.top and self.training:
            self._follow(output.detach())
        return output

    def frozen(self) -> QuantizedLayer:
        """The layer as it is stored: same integers, same output to the bit; raises ModelError for what is not finite."""
        kept = ("what is stored of steps", self._grid().scales)
        for name, tensor in (*self.named_parameters(), *self.named_buffers(), kept):
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(
                    "what was trained must be finite", got=f"NaN or infinite values in {name}",
                    way_out="train again with a smaller learning rate",
                )  # fmt: skip
        with torch.no_grad():
            layer, grid = copy.deepcopy(self.inner), self._grid()
            layer.register_parameter(
                "weight", nn.Parameter(self.master.detach().clone(), requires_grad=False)
            )
            encoded = (grid.nearest(self._rows()), grid)
            found = QuantizedLayer(layer, self.code, self.options, encoded, transposed=self.transposed)
            if self.top:
                low, high = self.output_range.tolist()
                step, zero = self._input_grid()
                found.static((float(step), int(zero)), affine(low, high), self.top)
        return found.train(self.training)

    def _rows(self) -> torch.Tensor:
        return self.master.T if self.transposed else self.master.flatten(1)

    def _grid(self) -> Grid:
        """The grid as it will be stored; gradients reach steps and zeros through it."""
        rows, columns = self._rows().shape
        share = rows * columns / self.started.numel()
        scales, zeros = self._scales(rows, share), None
        if self.zeros is not None:
            raw = _slowed(self.zeros.float(), self.started, self.high * share, 2)
            zeros = _passed(raw.detach().round().clamp(self.low, self.high), raw).expand(rows, -1)
        return Grid(self.low, self.high, self.group, scales, zeros)

    def _scales(self, rows: int, share: float) -> torch.Tensor:
        """(O, G): steps that are at least what is safe, rounded as they are stored; share: entries of one step."""
        started = self.started.float()
        raw = _passed(
            started * self.steps.detach().float(), _slowed(self.steps.float(), started, self.high * share, 1)
        )
        if self.low >= -self.high:  # as many integers below 0 as above, or a zero point: a sign says nothing
            raw = raw * torch.where(raw < 0, -1.0, 1.0)
        least = torch.full_like(raw, LEAST)
        if self.top and self.bias is not None:
            floor = self.bias.detach().float().abs() / (self._input_grid()[0].detach() * _ROOM)
            least = torch.maximum(least.expand(rows, -1), floor[:, None])
            least = least.amax(0, keepdim=True) if len(raw) == 1 else least
        safe = torch.where(raw < 0, torch.minimum(raw, -least), torch.maximum(raw, least)).detach()
        kept = _stored.kept(
            safe, self.options.scale
        )  # as the code's `storable`, which compilers do not follow
        return _passed(kept, raw).expand(rows, -1)

    def _rounded(self) -> torch.Tensor:
        grid, rows = self._grid(), self._rows()
        if self.learns:
            form = (self.low, self.high, self.group)
            found = _Rounded.apply(rows, grid.scales, grid.zeros, form)  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad():
                found = grid.values(grid.nearest(rows))
            found = _passed(found, rows.float())
        found = found.to(self.master.dtype)
        return cast(torch.Tensor, (found.T if self.transposed else found).reshape(self.master.shape))

    def _input_grid(self, features: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Step and zero point () as they will be stored; features: numbers of one sample that they round."""
        started, share = self.input_started.float(), float(self.top * features)
        step = _passed(
            started * self.input_step.detach().float(), _slowed(self.input_step.float(), started, share, 1)
        )
        step = step * torch.where(step < 0, -1.0, 1.0)
        zero = _slowed(self.input_zero.float(), started, share, 2)
        return (
            _passed(step.detach().clamp(min=LEAST), step),
            _passed(zero.detach().round().clamp(0, self.top), zero),
        )

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        step, zero = self._input_grid(max(1, x[:1].numel()))
        if self.learns:
            found = _RoundedInput.apply(x, step, zero, self.top)  # type: ignore[no-untyped-call]
            return cast(torch.Tensor, found)
        return _passed(round_to(x.detach(), step, zero, self.top), x)

    def _follow(self, output: torch.Tensor) -> None:
        if not output.numel():
            return
        low, high = torch.aminmax(output.float())
        found = torch.stack((low.clamp(max=0), high.clamp(min=0)))
        self.output_range.lerp_(found.to(self.output_range.dtype), _SMOOTH)


class _Rounded(torch.autograd.Function):
    """The values of a weight's nearest integers, with the gradients of LSQ's equations 3 and 5."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        form: tuple[int, int, int],
    ) -> torch.Tensor:
        grid = Grid(*form, scales, zeros)
        ctx.form = form
        ctx.save_for_backward(weight, scales, zeros)
        return grid.values(grid.nearest(weight))

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> Any:
        weight, scales, zeros = ctx.saved_tensors
        low, high, group = ctx.form
        passed = given[0].unflatten(1, (-1, group))
        ratios = weight.float().unflatten(1, (-1, group)) / scales[..., None]
        zero = torch.zeros_like(scales) if zeros is None else zeros
        levels = ratios + zero[..., None]
        inside = (levels > low) & (levels < high)
        along = levels.round().clamp(low, high) - zero[..., None] - ratios * inside
        return (
            (passed * inside).flatten(1).to(weight.dtype),
            (passed * along).sum(-1),
            None if zeros is None else -(passed * ~inside).sum(-1) * scales,
            None,
        )


class _RoundedInput(torch.autograd.Function):
    """An input's nearest points of an unsigned grid, with LSQ's gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
        ctx.top = top
        ctx.save_for_backward(x, step, zero)
        return round_to(x, step, zero, top)

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> Any:
        x, step, zero = ctx.saved_tensors
        passed, ratios = given[0].float(), x.float() / step
        levels = ratios + zero
        inside = (levels > 0) & (levels < ctx.top)
        along = (ratios.round() + zero).clamp(0, ctx.top) - zero - ratios * inside
        return (
            (passed * inside).to(x.dtype),
            (passed * along).sum(),
            -(passed * ~inside).sum() * step,
            None,
        )


def frozen(model: nn.Module) -> nn.Module:
    """A copy of a model in which every layer in training is as it will be stored; the given model is not changed.

    Outputs in eval mode are equal to the bit. Raises ModelError that names the layer whose training left numbers that are
    not finite.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LearningLayer)}
    return substitute(model, {path: _frozen(path, layer) for path, layer in layers.items()})


def _frozen(path: str, layer: LearningLayer) -> QuantizedLayer:
    try:
        return layer.frozen()
    except ModelError as error:
        raise error.at(path) from None


def _passed(value: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The value, to the bit up to the sign of 0; its gradient goes to the source."""
    return value + (source - source.detach())


def _slowed(raw: torch.Tensor, started: torch.Tensor, share: float, power: int) -> torch.Tensor:
    """The same numbers, with the gradient that LSQ scales by 1 / sqrt(share), over a power of the steps' start.

    share: entries of one step times the highest integer. A relative step moves by 1 / start of what the step does in plain
    gradient descent, and its gradient is start times that of the step; a zero point likewise, but both by a step.
    """
    least = torch.where(started < 0, -1.0, 1.0) * started.abs().clamp(min=1e-12)
    return _passed(raw.detach(), raw * (share**-0.5 / least**power))
