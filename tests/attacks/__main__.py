"""Runs every attack and says what happened: `PYTHONPATH=src:tests python -m attacks`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from artifact import samples
from attacks import bombs, compressed, path_escapes, payloads

from flyweight.artifact.format import read
from flyweight.errors import ArtifactError


def main() -> None:
    """Print one line for each attack."""
    for attack in (*path_escapes.ATTACKS, *bombs.ATTACKS, *payloads.ATTACKS, *compressed.ATTACKS):
        with tempfile.TemporaryDirectory() as place:
            folder = samples.build(Path(place) / "best")
            attack.forge(folder)
            try:
                read(folder)
                outcome = "read; what it holds stays plain text"
            except ArtifactError as error:
                outcome = f"refused: {error.rule}, got {error.got}"
            print(f"{attack.name:60} {outcome}")


main()
