"""The weights' file, its offsets, and batches that must fit a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flyweight.errors import ArtifactError, DataError
from flyweight.records import Plan, Step
from flyweight.runtimes._files import match, write_weights
from flyweight.runtimes._layout import as_stored, load_state
from flyweight.runtimes._state import unique_state
from flyweight.transforms import Context, apply, plain_site


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
    ("kind", "turned"), [("int8", True), ("int8", False), ("uint8", True), ("int4", True), ("uint4", False)]
)
def test_integers_lie_in_their_element_type(kind: str, turned: bool) -> None:
    low = -8 if kind.startswith("int") else 0
    integers = (torch.arange(15).reshape(3, 5) % 15 + low).to(torch.int16)
    stored, layout = as_stored(integers, kind, turned=turned)
    assert layout == (f"{kind} transposed" if turned else kind)
    flat = (integers.T if turned else integers).flatten()
    if kind.endswith("8"):
        assert stored.flatten().tolist() == flat.tolist()
    else:
        nibbles = [value % 16 for value in flat.tolist()] + [0]
        assert stored.tolist() == [a + 16 * b for a, b in zip(nibbles[::2], nibbles[1::2], strict=True)]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"bits": 4, "group": 16, "symmetric": False},
        {"bits": 4, "group": 16, "scale": "float16"},
        {"bits": 3, "symmetric": False},
        {"bits": 6, "group": "tensor", "symmetric": False},
        {"code": "palette", "bits": 3, "rows": 2},
        {"code": "vector_palette", "bits": 2, "width": 2},
        {"code": "low_float"},
        {"code": "ternary", "group": 16},
        {"code": "entropy", "step": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("turned", [True, False])
def test_turned_tensors_come_back(given: dict[str, Any], turned: bool) -> None:
    torch.manual_seed(0)
    model, fresh = (coded(nn.Sequential(nn.Linear(32, 6)), given) for _ in range(2))
    state, layer = unique_state(model), model[0]
    integers, grid = layer.encoded()
    stored, layouts = dict(state), {}
    whole = integers if grid.table is None else integers - grid.low
    kind = "int8" if grid.low < 0 and grid.table is None else "uint8"
    stored["0.integers"], layouts["0.integers"] = as_stored(whole, kind, turned=turned)
    if grid.zeros is not None:
        zeros = grid.zeros[: len(layer.scales)].to(torch.int16)
        stored["0.zeros"], layouts["0.zeros"] = as_stored(zeros, "uint8", turned=turned)
    load_state(fresh, stored, layouts)
    assert all(torch.equal(tensor, fresh.state_dict()[key]) for key, tensor in state.items())


def coded(model: nn.Module, given: dict[str, Any]) -> nn.Module:
    return apply(model, Plan((Step("weight_only", "0", given),)), [plain_site(model, "0")], Context())


def test_another_model_s_weights_are_refused_with_the_differences() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        ArtifactError, match=r"0\.bias missing; 1\.x unexpected; 0\.weight has shape \(4, 5\)"
    ):
        load_state(model, {"0.weight": torch.zeros(4, 5), "1.x": torch.zeros(1)}, {})
