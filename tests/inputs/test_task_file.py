"""Which function of a task file is taken, and that reading one harms nothing around it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flyweight.errors import DataError, FlyweightError, MachineError, UsageError
from flyweight.inputs.task_file import read_task

HEAD = "from __future__ import annotations\nimport torch\nimport flyweight\nfrom flyweight import Task\n"
MAKE = (
    "Task(name={name!r}, model=torch.nn.Linear(2, 1), examples=[torch.ones(1, 2)], score=lambda predict: 1.0)"
)


def function(name: str, says: str = "", arguments: str = "") -> str:
    return f"def {name}({arguments}){says}:\n    return {MAKE.format(name=name)}\n"


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Each test leaves sys.path and sys.modules as they were."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(folder: Path, text: str, name: str = "mine.py") -> str:
    (folder / name).write_text(HEAD + text)
    return str(folder / name)


@pytest.mark.parametrize(
    ("text", "end", "taken"),
    [
        (function("only"), "", "only"),
        (function("task") + function("other"), "", "task"),
        (function("one") + function("two"), ":two", "two"),
        (function("helper", arguments="x=1") + function("made", " -> Task"), "", "made"),
        (function("helper") + function("made", " -> flyweight.Task"), "", "made"),
        (function("bare") + function("helper", arguments="x"), "", "bare"),
        (function("_hidden") + function("shown"), "", "shown"),
        ("from os.path import join\n" + function("own"), "", "own"),
    ],
)
def test_the_function_that_is_meant_is_taken(tmp_path: Path, text: str, end: str, taken: str) -> None:
    assert read_task(write(tmp_path, text) + end).name == taken


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (function("one") + function("two"), ""),
        (function("one", " -> Task") + function("two", " -> Task"), ""),
        ("", ""),
        (function("one"), ":two"),
        ("from os.path import join\n", ":join"),
    ],
)
def test_what_is_not_clear_is_refused_with_the_names(tmp_path: Path, text: str, end: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_task(write(tmp_path, text) + end)
    for name in ("one", "two"):
        if f"def {name}" in text:
            assert name in str(caught.value)


def test_a_file_may_import_its_neighbours_and_pass_errors_on(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_a_task.py").write_text("NAME = 'near'")
    text = "import neighbour_of_a_task\n" + function("task").replace("'task'", "neighbour_of_a_task.NAME")
    assert read_task(write(tmp_path, text)).name == "near"
    raising = (
        "from flyweight.errors import MachineError\ndef task(): raise MachineError('no data', got='x')\n"
    )
    with pytest.raises(MachineError, match="no data, got x"):
        read_task(write(tmp_path, raising, "other.py"))


def test_a_file_named_as_a_module_does_not_take_its_place(tmp_path: Path) -> None:
    assert read_task(write(tmp_path, function("task"), "json.py")).name == "task"
    assert sys.modules["json"] is json


def test_a_file_is_read_anew_each_time(tmp_path: Path) -> None:
    assert read_task(write(tmp_path, function("first"))).name == "first"
    assert read_task(write(tmp_path, function("second"))).name == "second"


def test_dataclasses_and_pickles_find_the_files_classes(tmp_path: Path) -> None:
    text = "from dataclasses import dataclass\n@dataclass\nclass Part:\n    size: int = 2\n" + function(
        "task"
    )
    read_task(write(tmp_path, text, "parts.py"))
    assert sys.modules["parts"].Part().size == 2  # type: ignore[attr-defined]


def test_an_error_is_told_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_task(write(tmp_path, "def task():\n    return 1 / 0\n"))
    assert caught.value.where == f"{tmp_path / 'mine.py'}, line 6"
    assert caught.value.got == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("reference", ["", ":", "nowhere.py", "nowhere.py:task", ".", "a:b:c"])
def test_what_is_no_file_is_refused(reference: str) -> None:
    with pytest.raises(FlyweightError) as caught:
        read_task(reference)
    assert caught.value.exit_code in (2, 6)


def test_a_colon_in_the_path_is_no_function(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    assert read_task(write(tmp_path / "a:b", function("task"))).name == "task"
    assert read_task(write(tmp_path / "a:b", function("task")) + ":task").name == "task"
