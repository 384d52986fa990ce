"""The description of this machine holds what results need, as plain JSON."""

from __future__ import annotations

import json
import os

from flyweight.analysis.machine import cores, instructions, machine, memory_bytes


def test_the_machine_is_plain_json() -> None:
    found = machine()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {
        "processor", "cores", "threads", "memory_bytes", "instructions", "system", "python", "accelerator",
    }  # fmt: skip
    assert all(found[name] not in ("", None) for name in ("processor", "system", "python"))


def test_figures_are_plausible() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert memory_bytes() > 2**28
    assert len(set(map(str, instructions()))) == len(instructions())
