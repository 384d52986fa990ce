"""Ctrl-C while PyTorch is being imported: the command answers in one line, a program of the user's gets its interrupt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import flyweight


def interrupted(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Import flyweight in a program of that name, where PyTorch's import is interrupted."""
    (folder / "torch.py").write_text("raise KeyboardInterrupt")
    places = [str(folder), str(Path(flyweight.__file__).parent.parent)]
    program = f"import sys; sys.argv = ['/bin/{name}']; sys.path[:0] = {places!r}; import flyweight"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_the_command_answers_an_interrupt_in_one_line(tmp_path: Path) -> None:
    done = interrupted("flyweight", tmp_path)
    assert (done.returncode, done.stderr) == (130, "flyweight: interrupted before the work began\n")


def test_another_program_gets_its_interrupt(tmp_path: Path) -> None:
    assert "KeyboardInterrupt" in interrupted("own.py", tmp_path).stderr
