"""Shards as safetensors reads them, and folders that one process writes at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from flyweight.errors import ArtifactError, UsageError
from flyweight.streaming import _writing
from flyweight.testing.faults import in_child

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.bool]


@settings(deadline=None, max_examples=40)
@given(
    drawn=st.lists(
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(TYPES)), min_size=1, max_size=6
    )
)
def test_safetensors_reads_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[list[int], torch.dtype]]
) -> None:
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    tensors = {
        f"t{index}": torch.randint(0, 2, shape).to(dtype) for index, (shape, dtype) in enumerate(drawn)
    }
    written = _writing.write_shard(path, [_writing.held(name, tensor) for name, tensor in tensors.items()])
    assert written.bytes == path.stat().st_size
    _writing.require_same(path.parent, written)
    found = load_file(path)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in tensors.items())


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    _writing.write(path, [b"old"])

    def parts() -> object:
        yield b"new"
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        _writing.write(path, parts())  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["x"]


def test_a_file_that_changed_is_told(tmp_path: Path) -> None:
    written = _writing.write(tmp_path / "x", [b"one", b"two"])
    (tmp_path / "x").write_bytes(b"onetwo!")
    with pytest.raises(ArtifactError, match="got 7 bytes"):
        _writing.require_same(tmp_path, written)
    (tmp_path / "x").unlink()
    with pytest.raises(ArtifactError, match="no such file"):
        _writing.require_same(tmp_path, written)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    def rival() -> None:
        with pytest.raises(UsageError, match="one process at a time"), _writing.alone_in(tmp_path):
            pass

    with _writing.alone_in(tmp_path):
        assert in_child(rival).code == 0
    with _writing.alone_in(tmp_path):
        pass
