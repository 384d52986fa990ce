"""What all tests share: `figure`, which collects the figures that docs/promises.md shows, and `one_thread`.

Tests that need minutes carry `@pytest.mark.heavy`; the marker is declared in pyproject.toml.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

_TESTS = Path(__file__).parent
_FIGURES = _TESTS.parent / "build" / "figures.jsonl"

# Helpers are imported by their path below tests/, in each of pytest's import modes.
if str(_TESTS) not in sys.path:
    sys.path.append(str(_TESTS))


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[int, str], None]:
    """`figure(promise_number, text)` appends a JSON line to build/figures.jsonl; the last one counts."""

    def append(promise: int, text: str) -> None:
        line = json.dumps({"promise": promise, "text": text, "test": request.node.nodeid})
        _FIGURES.parent.mkdir(exist_ok=True)
        # One write to a file opened for appending: lines of parallel workers do not mix.
        handle = os.open(_FIGURES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(handle, line.encode() + b"\n")
        finally:
            os.close(handle)

    return append


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: small models wait for threads more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
