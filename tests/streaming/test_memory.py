"""Memory that is bounded by a block, not by the model: measured in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from streaming.folders import small, text_in

pytest.importorskip("transformers")
WIDTH = {"hidden_size": 512, "intermediate_size": 1024}
BLOCK = 4 * (512 * 512 * 3 + 3 * 512 * 1024)
"""Bytes of a block's weights."""
CODE = """
import sys
from pathlib import Path
import torch
from flyweight.streaming import Options, stream
torch.set_num_threads(1)
stream(*sys.argv[1:], Options(windows=2, window=32))
lines = Path("/proc/self/status").read_text().splitlines()
print(next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
"""


def peak(folder: Path, text: Path, out: Path) -> int:
    """The most bytes that a run held at a time."""
    command = [sys.executable, "-c", CODE, str(folder), str(text), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_more_blocks_take_no_more_memory(tmp_path: Path) -> None:
    text = text_in(tmp_path)
    few, many = (small(tmp_path / f"{count}", num_hidden_layers=count, **WIDTH) for count in (2, 12))
    least, most = (peak(folder, text, tmp_path / f"out{folder.name}") for folder in (few, many))
    # ten more blocks came through; what the allocator keeps differs from run to run
    assert most - least < 6 * BLOCK
