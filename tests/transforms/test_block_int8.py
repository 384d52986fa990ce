"""Weights in groups, and inputs rounded in the same groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flyweight.errors import UsageError
from flyweight.records import Site
from flyweight.transforms import Context, QuantizedLayer, _options, block_int8, plain_site
from flyweight.transforms._quantized import round_blocks


def layer(options: dict[str, Any], inputs: int = 64) -> QuantizedLayer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, 6))
    read = _options.read(block_int8, options, "")
    found = block_int8.replace(model, plain_site(model, "0"), read, Context())["0"]
    assert isinstance(found, QuantizedLayer)
    return found


def slow(x: np.ndarray[Any, Any], group: int) -> np.ndarray[Any, Any]:
    """Row by row and group by group in float64: the nearest multiple of the largest magnitude over 127."""
    found = np.zeros_like(x, dtype=np.float64)
    for row, values in enumerate(x.astype(np.float64)):
        for start in range(0, len(values), group):
            part = values[start : start + group]
            step = np.abs(part).max() / 127
            found[row, start : start + group] = np.round(part / step) * step if step else 0
    return found


@given(st.integers(0, 2**32 - 1), st.sampled_from([16, 32]), st.integers(1, 4), st.floats(1e-6, 1e6))
def test_inputs_are_rounded_in_groups(seed: int, group: int, rows: int, size: float) -> None:
    source = torch.Generator().manual_seed(seed)
    x = size * torch.randn(rows, 3 * group, generator=source)
    x[0, :group] = 0
    found = round_blocks(x, group).double().numpy()
    steps = (
        x.reshape(rows, 3, group).abs().amax(-1, keepdim=True).expand(-1, -1, group).reshape(x.shape).double()
        / 127
    )
    away = np.abs(found - slow(x.numpy(), group))
    # Half-way cases may fall to either side.
    assert (np.minimum(away, np.abs(away - steps.numpy())) <= 1e-4 * steps.numpy() + 1e-30).all()
    assert (np.abs(found - x.double().numpy()) <= 0.5001 * steps.numpy()).all()
    assert (found[0, :group] == 0).all()


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (0, 64)])
def test_a_layer_computes_with_both_rounded(shape: tuple[int, ...]) -> None:
    found, x = layer({"group": 16}), torch.randn(shape)
    wanted = (
        torch.from_numpy(slow(x.reshape(-1, 64).numpy(), 16)) @ found.weight.double().T + found.bias.double()
    )
    assert torch.allclose(found(x).double(), wanted.reshape(*shape[:-1], 6), atol=1e-5)


def test_large_inputs_elsewhere_do_not_coarsen_a_group() -> None:
    found = layer({"bits": 8, "group": 16})
    x = torch.randn(1, 64)
    large = torch.cat([x[:, :16], 1e4 * x[:, 16:]], 1)
    zeros = torch.cat([x[:, :16], 0 * x[:, 16:]], 1)
    rest = torch.cat([0 * x[:, :16], 1e4 * x[:, 16:]], 1)
    assert torch.allclose(found(large), found(zeros) + found(rest) - found.bias, rtol=1e-4)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"bits": 8},
        {"symmetric": True},
        {"group": 128, "scale": "float32"},
        {"rounding": "error_feedback", "damping": 0.02},
    ],
    ids=str,
)
def test_options_come_back(given: dict[str, Any]) -> None:
    read = _options.read(block_int8, given, "")
    assert _options.plain(read) == given
    assert _options.read(block_int8, _options.plain(read), "") == read


def test_four_bits_in_groups_of_32_are_the_default() -> None:
    coding = block_int8.Options().weights.coding
    assert (coding.bits, coding.group, coding.symmetric, coding.scale) == (4, 32, False, "float16")
    assert _options.read(block_int8, {}, "") == block_int8.Options()


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"bits": 3}, "bits must be one of 4, 8"),
        ({"group": "tensor"}, "group must be one of 16"),
        ({"code": "palette"}, "use weight_only"),
        ({"grupo": 3}, "did you mean 'group'|did you mean group"),
    ],
)
def test_what_is_not_multiplied_is_refused(given: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        _options.read(block_int8, given, "steps[0].options")


def test_sites_that_do_not_fit_are_refused() -> None:
    options = block_int8.Options()
    assert "linear layers only" in str(
        block_int8.refuse(plain_site(nn.Conv1d(4, 4, 3), ""), options, nn.Conv1d(4, 4, 3))
    )
    assert "do not divide" in str(
        block_int8.refuse(plain_site(nn.Linear(40, 4), ""), options, nn.Linear(40, 4))
    )
    tied = Site(name="head", kind="linear", parameters=0, bytes=0, macs=0, tied=("embed",))
    assert "embed" in str(block_int8.refuse(tied, options, nn.Linear(64, 4)))
    assert block_int8.refuse(plain_site(nn.Linear(64, 4), ""), options, nn.Linear(64, 4)) is None
    assert block_int8.levels(plain_site(nn.Embedding(4, 4), "")) == ()
    assert len(block_int8.levels(plain_site(nn.Linear(64, 4), ""))) == 2


def test_matrices_of_inputs_are_asked_for_as_by_the_rounding() -> None:
    assert block_int8.learns(block_int8.Options()) == "nothing"
