"""The weights' file, its offsets, and batches that must fit a graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flyweight.errors import ArtifactError, DataError
from flyweight.runtimes._files import match, write_weights
from flyweight.runtimes._layout import TRANSPOSED, load_state
from flyweight.runtimes._state import unique_state
from flyweight.transforms import QuantizedLayer
from flyweight.transforms._grid import grid, pack
from flyweight.transforms._quantized import quantized


def test_offsets_point_at_the_bytes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(5.0),
        "b": torch.arange(6, dtype=torch.int8).reshape(2, 3).T,
        "c": torch.zeros(0),
    }
    places = write_weights(tensors, tmp_path / "w")
    raw = (tmp_path / "w").read_bytes()
    for key, (offset, length) in places.items():
        assert raw[offset : offset + length] == tensors[key].contiguous().numpy().tobytes()
    assert torch.equal(load_file(tmp_path / "w")["b"], tensors["b"])


def test_every_tensor_is_kept_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(unique_state(model)) == ["0.weight", "0.bias", "1.bias"]


@pytest.mark.parametrize(
    ("batch", "word"),
    [
        (torch.zeros(2, 4), "2x4"),
        (torch.zeros(3), "3"),
        ({"y": torch.zeros(2, 3)}, "y"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batch: object, word: str) -> None:
    with pytest.raises(DataError, match=word):
        match(batch, ["x"], [(None, 3)])  # type: ignore[arg-type]


def test_dicts_are_put_in_the_graph_s_order() -> None:
    a, b = torch.zeros(1), torch.ones(2)
    assert match({"b": b, "a": a}, ["a", "b"], [(None,), (None,)]) == [a, b]


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(8, None, True), (4, 16, False), (4, 16, True), (4, None, False)]
)
def test_turned_tensors_come_back(bits: int, group: int | None, symmetric: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(quantized(nn.Linear(32, 6), "linear", grid(bits, group, symmetric)))
    layer, state = model[0], unique_state(model)
    assert isinstance(layer, QuantizedLayer)
    stored, layouts = dict(state), {"0.codes": TRANSPOSED}
    codes = layer.encoded().codes.T
    stored["0.codes"] = pack(codes.reshape(1, -1))[0] if bits == 4 else codes
    if not symmetric:
        stored["0.zeros"], layouts["0.zeros"] = pack(layer.zeros.T.reshape(1, -1))[0], TRANSPOSED
    fresh = nn.Sequential(quantized(nn.Linear(32, 6), "linear", grid(bits, group, symmetric)))
    load_state(fresh, stored, layouts)
    assert all(torch.equal(tensor, fresh.state_dict()[key]) for key, tensor in state.items())


def test_another_model_s_weights_are_refused_with_the_differences() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        ArtifactError, match=r"0\.bias missing; 1\.x unexpected; 0\.weight has shape \(4, 5\)"
    ):
        load_state(model, {"0.weight": torch.zeros(4, 5), "1.x": torch.zeros(1)}, {})
