"""What every code promises, one function each: it raises when the promise is broken."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any

import torch

from flyweight.codes import Grid
from flyweight.errors import ArtifactError, DataError, ModelError, UsageError
from flyweight.testing._cases import Broken, NotApplicable, require
from flyweight.transforms import _options


def _normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) / 8


def _with(place: Any, value: float) -> torch.Tensor:
    weight = _normal(8, 256)
    weight[place] = value
    return weight


WEIGHTS: Mapping[str, Callable[[], torch.Tensor]] = MappingProxyType(
    {
        "normal": lambda: _normal(48, 256),
        "one row": lambda: _normal(1, 512),
        "one column": lambda: _normal(512, 1),
        "odd": lambda: _normal(21, 255),
        "tiny": lambda: _normal(2, 3),
        "zeros": lambda: torch.zeros(8, 256),
        "constant": lambda: torch.full((8, 256), -0.7),
        "zero channel": lambda: _with(3, 0.0),
        "zero group": lambda: _with((slice(None), slice(64, 128)), 0.0),
        "outlier": lambda: _with((2, 5), 1e4),
        "all positive": lambda: _normal(8, 256).abs() + 3,
        "denormal": lambda: torch.full((8, 256), 1e-40),
        "large": lambda: _normal(8, 256) * 1e5,
        "bfloat16": lambda: _normal(8, 256).bfloat16(),
        "float64": lambda: _normal(8, 256).double(),
        "not contiguous": lambda: _normal(256, 16).t()[::2],
    }
)


@dataclass(frozen=True, eq=False)
class CodeCase:
    """One setting of one code, on one weight."""

    name: str
    code: ModuleType
    options: Any
    weight_name: str
    weight: torch.Tensor
    energy: torch.Tensor

    @property
    def setting(self) -> str:
        """The options in a few words."""
        return (
            ", ".join(f"{name} {value}" for name, value in _options.plain(self.options).items()) or "defaults"
        )

    @functools.cached_property
    def grid(self) -> Grid:
        """The grid, fitted once for all checks; they must not change it."""
        found = self.code.fit(self.weight, self.options, self.energy)
        return _as_grid(found)

    @functools.cached_property
    def integers(self) -> torch.Tensor:
        """The integers of the nearest values."""
        return self.grid.nearest(self.weight, energy=self.energy)

    def fit(self, weight: torch.Tensor, energy: torch.Tensor | None = None) -> torch.Tensor:
        """The values nearest to a weight on a grid fitted to it."""
        grid = _as_grid(self.code.fit(weight, self.options, energy))
        return grid.values(grid.nearest(weight, energy=energy))


def cases(name: str, code: ModuleType, levels: Sequence[Any]) -> Iterator[CodeCase]:
    """Every one of some settings of a code, on every weight."""
    for options in levels:
        for weight_name, build in WEIGHTS.items():
            weight = build()
            energy = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)) + 0.1
            yield CodeCase(name, code, options, weight_name, weight, energy)


def refusal_truthful(case: CodeCase) -> None:
    """Where `refuse` gives no reason `fit` works; where it gives one `fit` raises it."""
    reason = case.code.refuse(*case.weight.shape, case.options)
    try:
        case.code.fit(case.weight, case.options)
    except UsageError as error:
        beyond_half = "float16" in str(error)
        require(beyond_half or reason is not None, f"it was not refused, but {error}")
        require(beyond_half or str(reason) in str(error), f"the reason is missing: {error}")
        return
    require(reason is None, f"it was refused, but fitted all the same: {reason}")


def grid_well_formed(case: CodeCase) -> None:
    """Scales are finite and not 0 if a level is, zeros integers of the grid, tables ascending; all have the right shapes."""
    grid, (rows, columns) = case.grid, case.weight.shape
    require(grid.scales.shape == (rows, columns // grid.group), f"scales of shape {tuple(grid.scales.shape)}")
    usable = bool((grid.scales != 0).all()) or (grid.table is not None and bool((grid.table != 0).all()))
    require(bool(torch.isfinite(grid.scales).all()) and usable, "a scale is 0 or not finite")
    require(grid.low < grid.high, "there is one integer at most")
    if grid.zeros is not None:
        require(grid.zeros.shape == grid.scales.shape, "zeros and scales differ in shape")
        require(
            torch.equal(grid.zeros, grid.zeros.round().clamp(grid.low, grid.high)), "zeros are not integers"
        )
    if grid.offsets is not None:
        require(grid.offsets.shape == grid.scales.shape, "offsets and scales differ in shape")
        require(bool(torch.isfinite(grid.offsets).all()), "an offset is not finite")
    if grid.table is not None:
        require(rows % len(grid.table) == 0, "tables do not divide the channels")
        require(grid.table.shape[1] == grid.high - grid.low + 1, "a table of another length")
        ascends = grid.width > 1 or bool((grid.table.diff(dim=1) >= 0).all())
        require(ascends, "a table does not ascend")


def finite(case: CodeCase) -> None:
    """Values are finite float32 of the weight's shape."""
    values = case.grid.values(case.integers)
    require(values.dtype == torch.float32 and values.shape == case.weight.shape, "another form")
    require(bool(torch.isfinite(values).all()), "not finite")


def round_trip(case: CodeCase) -> None:
    """What is stored comes back bit for bit: integers, scales, zeros, tables."""
    stored = case.code.store(case.integers, case.grid, case.options)
    integers, grid = case.code.restore(stored, case.weight.shape[1], case.options)
    require(integers.dtype == torch.int16 and torch.equal(integers, case.integers), "other integers")
    _require_same(_as_grid(grid), case.grid)


def extremes_round_trip(case: CodeCase) -> None:
    """Every integer of the grid can be stored, also where the weight does not need it."""
    shape = case.integers.shape
    whole = torch.arange(case.integers.numel()).view(shape) % (case.grid.high - case.grid.low + 1)
    integers = (whole + case.grid.low).to(torch.int16)
    integers = integers if case.grid.mask is None else integers * case.grid.mask
    stored = case.code.store(integers, case.grid, case.options)
    require(
        torch.equal(case.code.restore(stored, case.weight.shape[1], case.options)[0], integers),
        "other integers",
    )
    for beyond in (case.grid.low - 1, case.grid.high + 1):
        wrong = integers.clone()
        wrong[-1, -1] = beyond
        _require_raises(UsageError, lambda w=wrong: case.code.store(w, case.grid, case.options))  # type: ignore[misc]


def honest_bytes(case: CodeCase) -> None:
    """`nbytes` is what the stored tensors take, and less than float32 takes."""
    stored = case.code.store(case.integers, case.grid, case.options)
    taken = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    told = case.code.nbytes(*case.weight.shape, case.options)
    require(taken == told, f"{taken} bytes, but nbytes says {told}")
    require(taken < 4 * case.weight.numel(), f"{taken} bytes for {case.weight.numel()} entries")
    held = [tensor.untyped_storage().nbytes() for tensor in stored.values()]
    require(sum(held) == taken, "a stored tensor is a view of a larger one")


def zeros_stay(case: CodeCase) -> None:
    """Channels of zeros decode to exact zeros."""
    empty = (case.weight == 0).all(1)
    if not bool(empty.any()):
        raise NotApplicable("no channel is zero")
    require(not bool(case.grid.values(case.integers)[empty].any()), "a channel of zeros is not zero")


def storable_already(case: CodeCase) -> None:
    """What was fitted is stored as it is; other scales become so by `storable`, and are refused without it."""
    _require_same(_as_grid(case.code.storable(case.grid, case.options)), case.grid)
    other = dataclasses.replace(case.grid, scales=case.grid.scales * 1.0001)
    nearest = _as_grid(case.code.storable(other, case.options))
    if torch.equal(nearest.scales, other.scales):
        raise NotApplicable("any scales can be stored")
    _require_raises(UsageError, lambda: case.code.store(case.integers, other, case.options))


def pure(case: CodeCase) -> None:
    """Twice the same, bit for bit; no input is changed, and nothing shares memory with one."""
    before = case.weight.clone(), case.energy.clone(), case.integers.clone()
    grid = _as_grid(case.code.fit(case.weight, case.options, case.energy))
    _require_same(grid, case.grid)
    stored = case.code.store(case.integers, grid, case.options)
    after = case.weight, case.energy, case.integers
    require(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input changed")
    own = {tensor.untyped_storage().data_ptr() for tensor in after}
    shared = [name for name, tensor in stored.items() if tensor.untyped_storage().data_ptr() in own]
    require(not shared, f"{shared} share memory with an input")


def layout_free(case: CodeCase) -> None:
    """A weight that lies otherwise in memory has the same grid."""
    other = case.weight.t().contiguous().t()
    _require_same(_as_grid(case.code.fit(other, case.options, case.energy)), case.grid)


def rows_in_any_order(case: CodeCase) -> None:
    """Channels in another order have the same values, in that order."""
    if _reference(case) is None:
        raise NotApplicable("said of ordinary weights")
    order = torch.randperm(len(case.weight), generator=torch.Generator().manual_seed(2))
    if getattr(case.options, "rows", None) is not None:
        raise NotApplicable("neighbouring channels share a table")
    if case.grid.pattern is not None and case.grid.pattern.height > 1:
        raise NotApplicable("neighbouring channels stay or go together")
    if getattr(case.options, "group", None) == "tensor":
        raise NotApplicable("one scale for all is a sum over all, whose last bit depends on the order")
    values = case.fit(case.weight, case.energy)[order]
    require(torch.equal(case.fit(case.weight[order], case.energy), values), "other values")


def scale_free(case: CodeCase) -> None:
    """A weight times a power of two has its values times that, exactly; and so has the energy."""
    if _reference(case) is None:
        raise NotApplicable("said of ordinary weights")
    values = case.fit(case.weight, case.energy)
    require(torch.equal(case.fit(case.weight * 4, case.energy * 2), values * 4), "other values")


def energy_helps(case: CodeCase) -> None:
    """With energy the error where the energy is is no larger than without; an energy of zeros says nothing."""
    if _reference(case) is None:
        raise NotApplicable("said of ordinary weights")
    energy = torch.ones(case.weight.shape[1]) * 0.01
    energy[::7] = 10.0
    weight = case.weight.float()
    errors = [
        float(((case.fit(case.weight, one) - weight).square() * energy).sum()) for one in (energy, None)
    ]
    require(errors[0] <= errors[1] * 1.001, f"{errors[0]:.4g} with energy, {errors[1]:.4g} without")
    none = case.fit(case.weight, torch.zeros_like(energy))
    require(torch.equal(none, case.fit(case.weight)), "an energy of zeros changes the values")


def bad_input_refused(case: CodeCase) -> None:
    """NaN, infinities, other shapes and damaged tensors are refused in words."""
    for value in (float("nan"), float("inf"), -float("inf"), 3e30):
        weight = case.weight.float().clone()
        weight[0, -1] = value
        _require_raises(ModelError, lambda w=weight: case.code.fit(w, case.options))  # type: ignore[misc]
    _require_raises(ModelError, lambda: case.code.fit(case.weight[None], case.options))
    for energy in (case.energy[:-1], -case.energy, case.energy * float("nan"), case.energy[None]):
        _require_raises(DataError, lambda e=energy: case.code.fit(case.weight, case.options, e))  # type: ignore[misc]
    stored = case.code.store(case.integers, case.grid, case.options)
    for name, tensor in stored.items():
        for damaged in (
            {**stored, name: tensor[:, :-1]},
            {**stored, name: tensor.double()},
            {key: other for key, other in stored.items() if key != name},
        ):
            _require_raises(
                ArtifactError,
                lambda d=damaged: case.code.restore(d, case.weight.shape[1], case.options),  # type: ignore[misc]
            )


CHECKS = (
    grid_well_formed, finite, round_trip, extremes_round_trip, honest_bytes, zeros_stay, storable_already,
    pure, layout_free, rows_in_any_order, scale_free, energy_helps, bad_input_refused,
)  # fmt: skip


def levels_ordered(code: ModuleType) -> None:
    """From the gentlest to the smallest: bytes fall, and the error of a normal weight rises."""
    weight = _normal(64, 512)
    sizes = [code.nbytes(*weight.shape, options) for options in code.LEVELS]
    grids = [_as_grid(code.fit(weight, options)) for options in code.LEVELS]
    errors = [float((grid.values(grid.nearest(weight)) - weight).square().sum()) for grid in grids]
    require(sizes == sorted(sizes, reverse=True), f"bytes do not fall: {sizes}")
    require(errors == sorted(errors), f"errors do not rise: {errors}")


def options_round_trip(code: ModuleType) -> None:
    """Options go to plain JSON values and back."""
    for options in code.LEVELS:
        back = _options.read(code, _options.plain(options), "")
        require(back == options, f"{options} does not come back")


def empty_refused(code: ModuleType) -> None:
    """A weight without entries is refused in words."""
    for options in code.LEVELS:
        require(
            bool(code.refuse(0, 64, options)) and bool(code.refuse(64, 0, options)), f"{options} takes it"
        )


CODE_CHECKS = (levels_ordered, options_round_trip, empty_refused)


def _as_grid(found: object) -> Grid:
    if not isinstance(found, Grid):
        raise Broken(f"a {type(found).__name__} is no Grid")
    return found


def _reference(case: CodeCase) -> torch.Tensor | None:
    """The weight if it is an ordinary one."""
    return case.weight if case.weight_name in ("normal", "one row", "bfloat16") else None


def _require_same(one: Grid, other: Grid) -> None:
    for name in ("low", "high", "group"):
        require(getattr(one, name) == getattr(other, name), f"another {name}")
    for name in ("scales", "zeros", "table", "offsets", "mask"):
        a, b = getattr(one, name), getattr(other, name)
        same = a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a, b)
        require(same, f"other {name}")


def _require_raises(kind: type[Exception], action: Callable[[], object]) -> None:
    try:
        action()
    except kind:
        return
    raise Broken(f"no {kind.__name__} was raised")
