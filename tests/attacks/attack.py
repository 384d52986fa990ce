"""What an attack is: a change to a good artifact, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CANARY = "CANARY"
"""The name of a file beside the artifact; an attack that runs code makes it."""
SECRET = "SECRET"
"""The name of a file beside the artifact that nothing may open."""


@dataclass(frozen=True)
class Attack:
    """One attack on a reader."""

    name: str
    forge: Callable[[Path], object]
    """Turns the good artifact in that folder into the hostile one."""
    says: str | None
    """A part of the refusal; None: the artifact is read, and what it holds stays plain text."""

    def __str__(self) -> str:
        """Its name."""
        return self.name
