"""Reads a task from a Python file: `PATH.py` or `PATH.py:function`. The file is the user's own program and is run."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from flyweight.errors import DataError, MachineError, UsageError, foreign
from flyweight.records import Task


def read_task(reference: str) -> Task:
    """The task that the file's function returns.

    Without `:function` it is the function named `task`, or else the only one that says it returns a Task, or the only one
    without arguments. Raises MachineError when there is no such file, UsageError when the function is not clear, DataError
    when it fails.
    """
    path, name = _split(reference)
    function = _function(_module(path), name, path)
    with foreign(
        DataError,
        "the task's function must not fail",
        where=lambda error: _place(error, path) or f"{path}:{function.__name__}",
        way_out="call it in Python to see the whole error",
    ):
        task = function()
    if not isinstance(task, Task):
        raise UsageError(
            "the task's function must return a flyweight.Task",
            got=type(task).__name__,
            where=f"{path}:{function.__name__}",
            way_out="end it with return flyweight.Task(...)",
        )
    return task


def _split(reference: str) -> tuple[Path, str]:
    whole = Path(reference)
    head, _, tail = reference.rpartition(":")
    path, name = (Path(head), tail) if head and not whole.exists() else (whole, "")
    if path.is_dir() or not path.exists():
        got = "a folder" if path.is_dir() else "no such file"
        raise MachineError(
            "a task is a Python file", got=f"{got}: {path}", way_out="give PATH.py or PATH.py:function"
        )
    if path.suffix != ".py":
        raise UsageError("a task is a Python file", got=str(path), way_out="give PATH.py or PATH.py:function")
    return path, name


def _module(path: Path) -> ModuleType:
    """Import a file under its own stem, with its folder on the path, as Python does for a script.

    A stem that another module has already, such as json, must not take that module's place.
    """
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    taken = path.stem in sys.modules and getattr(sys.modules[path.stem], "__file__", None) != str(
        path.resolve()
    )
    name = f"flyweight_task_{path.stem}" if taken else path.stem
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise UsageError("a task is a Python file", got=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with foreign(
        DataError,
        "the task file must import without an error",
        where=lambda error: _place(error, path) or str(path),
        way_out=f"python {path} shows the whole error",
    ):
        spec.loader.exec_module(module)
    return module


def _place(error: BaseException, path: Path) -> str:
    """The line of the task's file that the error came from."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path.resolve()
    ]
    if isinstance(error, SyntaxError) and error.filename == str(path.resolve()):
        return f"{path}, line {error.lineno}"
    return f"{path}, line {frames[-1].lineno}" if frames else ""


def _function(module: ModuleType, name: str, path: Path) -> Callable[[], Any]:
    found = {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    }
    if name:
        if name not in found:
            raise UsageError(
                "no such function in the task file", got=name, where=str(path), way_out=_there_are(found)
            )
        return found[name]
    if "task" in found:
        return found["task"]
    returning = [f for f in found.values() if "Task" in str(inspect.signature(f).return_annotation)]
    bare = [f for f in found.values() if not inspect.signature(f).parameters]
    for group in (returning, bare):
        if len(group) == 1:
            return group[0]
    raise UsageError(
        "it must be clear which function returns the task",
        got=_there_are(found),
        where=str(path),
        way_out=f"name it task, or give {path}:function",
    )


def _there_are(found: dict[str, Any]) -> str:
    return f"there are {', '.join(found)}" if found else "there are no functions"
