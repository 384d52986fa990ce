"""Numbers in tuning: what they compute is what is stored, and slopes are those of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flyweight import discover
from flyweight.transforms import QuantizedLayer
from flyweight.transforms._tuned import Numbers, TunedLayer

CODES: list[tuple[str, dict[str, Any]]] = [
    ("integer", {"bits": 2, "group": 16, "symmetric": False, "scale": "float16"}), ("integer", {"bits": 3}),
    ("integer", {"bits": 4, "group": "tensor"}), ("ternary", {"group": 16}), ("palette", {"bits": 2}),
    ("palette", {"bits": 3, "scaled": True, "rows": 4, "table": "float32"}),
]  # fmt: skip


def layer_of(
    code: str, options: dict[str, Any], transposed: bool = False
) -> tuple[QuantizedLayer, torch.Tensor]:
    source = torch.Generator().manual_seed(4)
    inner = nn.Linear(32, 8)
    weight = torch.randn(8, 32, generator=source)
    with torch.no_grad():
        inner.weight.copy_(weight)
    module = discover.method("codes", code)
    chosen = module.Options(**options)
    grid = module.fit(weight, chosen)
    return QuantizedLayer(inner, code, chosen, (grid.nearest(weight), grid), transposed=transposed), weight


@pytest.mark.parametrize(("code", "options"), CODES, ids=str)
def test_untouched_numbers_give_the_layer_back(code: str, options: dict[str, Any]) -> None:
    layer, weight = layer_of(code, options)
    for numbers in (Numbers(layer), Numbers(layer, weight)):
        same = numbers.frozen()
        assert torch.allclose(numbers.values(), layer.weight.as_subclass(torch.Tensor), rtol=1e-6)
        assert all(torch.equal(same.stored()[name], tensor) for name, tensor in layer.stored().items())


@pytest.mark.parametrize(("code", "options"), CODES, ids=str)
def test_moved_numbers_are_stored_as_they_compute(code: str, options: dict[str, Any]) -> None:
    layer, weight = layer_of(code, options)
    numbers, source = Numbers(layer, weight), torch.Generator().manual_seed(6)
    with torch.no_grad():
        for tensor in numbers.moving():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=source))
    numbers.hold()
    found, x = numbers.frozen(), torch.randn(5, 32, generator=source)
    assert torch.allclose(TunedLayer(layer, numbers)(x), found(x), rtol=3e-3, atol=3e-3)  # float16 scales
    assert not torch.equal(found(x), layer(x))
    grid = found.encoded()[1]
    assert grid.table is None or bool((grid.table.diff(dim=1) >= 0).all())
    assert {name: tensor.shape for name, tensor in found.stored().items()} == {
        name: tensor.shape for name, tensor in layer.stored().items()
    }


def test_slopes_are_those_of_the_unrounded_formula() -> None:
    layer, weight = layer_of("integer", {"bits": 3, "group": 16, "symmetric": False})
    numbers, source = Numbers(layer, weight), torch.Generator().manual_seed(7)
    passed = torch.randn(8, 32, generator=source)
    (numbers.values() * passed).sum().backward()
    integers, grid = layer.encoded()
    assert numbers.levels is not None
    assert numbers.sizes is not None
    assert grid.zeros is not None
    wide = grid.scales.repeat_interleave(16, 1)
    assert numbers.levels.grad is not None
    assert torch.allclose(numbers.levels.grad, passed * wide)
    along = (passed * grid.values(integers)).unflatten(1, (2, 16)).sum(-1)
    assert torch.allclose(numbers.sizes.grad, along, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


def test_levels_begin_on_the_weights_side_and_within_their_integer() -> None:
    layer, weight = layer_of("integer", {"bits": 2, "group": 16, "symmetric": False})
    levels, (integers, grid) = Numbers(layer, weight).levels, layer.encoded()
    assert levels is not None
    off, side = levels.detach() - integers, weight - grid.values(integers)
    assert float(off.abs().max()) <= 0.35 + 1e-6
    assert bool((off * side * grid.scales.repeat_interleave(16, 1) >= 0).all())


def test_a_transposed_layer_computes_alike() -> None:
    layer, weight = layer_of("integer", {"bits": 4})
    foreign = Foreign(weight.T.contiguous())
    stored = QuantizedLayer(foreign, "integer", layer.options, layer.encoded(), transposed=True)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(TunedLayer(stored, Numbers(stored))(x), stored(x), rtol=1e-5, atol=1e-6)


class Foreign(nn.Module):
    """A linear layer with its weight (inputs, outputs)."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight
