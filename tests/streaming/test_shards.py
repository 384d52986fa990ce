"""Reading tensors by seeking, beside the safetensors library."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flyweight.errors import ArtifactError, MachineError, ModelError
from flyweight.streaming import _shards

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


def folder_of(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    save_file(tensors, path / "model.safetensors")
    return path


def random_tensor(shape: list[int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    values = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(seed))
    return (values.abs() if dtype == torch.uint8 else values).to(dtype)


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5),
    dtype=st.sampled_from(TYPES),
)
def test_reads_what_safetensors_wrote(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtype: torch.dtype
) -> None:
    tensors = {f"t{index}": random_tensor(shape, dtype, index) for index, shape in enumerate(shapes)}
    source = _shards.opened(folder_of(tmp_path_factory.mktemp("shards"), tensors))
    assert set(source.tensors) == set(tensors)
    assert source.nbytes == sum(t.numel() * t.element_size() for t in tensors.values())
    for name, tensor in tensors.items():
        found = _shards.read(source, name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert b"".join(_shards.pieces(source, name)) == raw


@settings(deadline=None, max_examples=40)
@given(places=st.lists(st.integers(0, 9), max_size=12))
def test_rows_are_those_of_the_whole(tmp_path_factory: pytest.TempPathFactory, places: list[int]) -> None:
    table = random_tensor([10, 3], torch.bfloat16)
    source = _shards.opened(folder_of(tmp_path_factory.mktemp("rows"), {"x": torch.ones(5), "table": table}))
    assert torch.equal(_shards.rows(source, "table", places), table[places])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_with_its_place(tmp_path: Path, value: float) -> None:
    tensor = torch.zeros(3, 4)
    tensor[1, 2] = value
    source = _shards.opened(folder_of(tmp_path / "m", {"w": tensor}))
    for reading in (
        lambda: _shards.read(source, "w"),
        lambda: list(_shards.pieces(source, "w")),
        lambda: _shards.rows(source, "w", [0, 1]),
    ):
        with pytest.raises(ModelError, match=r"must be finite, got 1 values.*model.safetensors, tensor 'w'"):
            reading()
    assert torch.equal(_shards.rows(source, "w", [0, 2]), torch.zeros(2, 4))
    assert set(_shards.loaded(tmp_path / "m", "model.safetensors")) == {"w"}


def test_the_digest_knows_headers_sizes_and_configuration(tmp_path: Path) -> None:
    one = _shards.opened(folder_of(tmp_path / "m", {"w": torch.zeros(3, 4)})).digest
    assert _shards.opened(tmp_path / "m").digest == one
    assert _shards.opened(folder_of(tmp_path / "n", {"w": torch.zeros(4, 3)})).digest != one
    (tmp_path / "m" / "config.json").write_text('{"a": 1}')
    assert _shards.opened(tmp_path / "m").digest != one


def test_links_are_followed_and_pipes_are_not(tmp_path: Path) -> None:
    folder_of(tmp_path / "m", {"w": torch.ones(2)})
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "blob")
    (tmp_path / "m" / "model.safetensors").symlink_to(tmp_path / "blob")
    assert torch.equal(_shards.read(_shards.opened(tmp_path / "m"), "w"), torch.ones(2))
    (tmp_path / "blob").unlink()
    os.mkfifo(tmp_path / "blob")
    with pytest.raises(ArtifactError, match="regular files"):
        _shards.opened(tmp_path / "m")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", {"w": torch.ones(2)})
    for name in ("a", "b"):
        save_file({"w": torch.ones(2)}, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}})
    )
    with pytest.raises(ArtifactError, match="one shard, got it twice"):
        _shards.opened(folder)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"w": 1}}', '{"weight_map": NaN}']
)
def test_a_strange_index_is_refused(tmp_path: Path, text: str) -> None:
    folder = folder_of(tmp_path / "m", {"w": torch.ones(2)})
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ArtifactError):
        _shards.opened(folder)


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    source = _shards.opened(folder_of(tmp_path / "m", {"w": torch.ones(200)}))
    os.truncate(tmp_path / "m" / "model.safetensors", 300)
    with pytest.raises(ArtifactError, match="bytes more, got its end"):
        _shards.read(source, "w")


def test_a_file_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", {"w": torch.ones(2)})
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        with pytest.raises(MachineError, match="the disk must do"):
            _shards.opened(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
