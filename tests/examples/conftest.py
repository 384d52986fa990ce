"""Makes the examples importable, as they are for `flyweight optimize`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

_EXAMPLES = str(Path(__file__).parents[2] / "examples")
if _EXAMPLES not in sys.path:
    sys.path.append(_EXAMPLES)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """FLYWEIGHT_CACHE in a new folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(folder))
    return folder
