"""Named write points at which a test can kill the process. For tests only.

`FLYWEIGHT_KILL_AT=name:n` makes the process kill itself at the n-th pass of the point `name`, by SIGKILL: no
clean-up runs. It shows what survives a killed process, not a power cut.
Without the variable nothing happens.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "FLYWEIGHT_KILL_AT"
_passes: Counter[str] = Counter()


def point(name: str) -> None:
    """Pass the write point of that name; the process ends here when FLYWEIGHT_KILL_AT names this pass."""
    wanted, _, nth = os.environ.get(VARIABLE, "").rpartition(":")
    if wanted != name:
        return
    _passes[name] += 1
    if _passes[name] == int(nth):
        os.kill(os.getpid(), signal.SIGKILL)
