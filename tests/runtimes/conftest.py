"""What the tests of runtimes share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def few_threads(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here runs small models."""
    monkeypatch.setattr("flyweight.runtimes.llamacpp.cores", lambda: 1)
