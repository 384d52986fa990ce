"""The bad inputs that people have, and the answer that each of them gets: one line, its exit code, never a traceback.

Each row: what it is, the files and the command line, the exit code, and what the answer must say. The letters are those of
the list of bad inputs: M models, D data, C configuration, L command line, A artifacts and studies.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from artifact import samples
from artifact.test_bad_artifacts import TABLE as BAD_ARTIFACTS

import flyweight
from flyweight.cli import main
from flyweight.errors import ArtifactError, FlyweightError, UsageError
from flyweight.evaluation import timing
from flyweight.runtimes import onnxruntime
from flyweight.search.study import Study

TASKS = Path(__file__).with_name("tasks.py")
Build = Callable[[Path], list[str]]
Row = tuple[str, Build, int, tuple[str, ...]]
ANSWERED: dict[str, float] = {}
"""Seconds that each row took."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time for moments only: these tests ask for answers, not for figures."""
    real = timing.race
    monkeypatch.setattr(timing, "race", lambda first, second, seconds=0.0: real(first, second, 0.02))


def optimize(task: str, *more: str) -> Build:
    """A run in PyTorch, which needs no export."""
    return lambda folder: [
        "optimize",
        f"{TASKS}:{task}",
        "--runtime",
        "torch",
        "-o",
        str(folder / "out"),
        *more,
    ]


def dry(task: str, *more: str) -> Build:
    return optimize(task, "--dry-run", *more)


def file(text: str, name: str = "given.py") -> Build:
    """A run of a task file with this text."""

    def build(folder: Path) -> list[str]:
        (folder / name).write_text(text)
        return ["optimize", str(folder / name), "-o", str(folder / "out")]

    return build


def recipe(content: object, task: str = "sound", command: str = "optimize") -> Build:
    """A run of a recipe; text is written as it is, anything else as JSON."""

    def build(folder: Path) -> list[str]:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "recipe.json").write_text(text)
        where = ["--recipe", str(folder / "recipe.json"), "--runtime", "torch", "-o", str(folder / "out")]
        return [command, f"{TASKS}:{task}", *where]

    return build


def step(site: str = "0", method: str = "weight_only", **options: object) -> dict[str, object]:
    return {"flyweight_plan": 1, "steps": [{"method": method, "site": site, "options": options}]}


def artifact(damage: Callable[[Path], object]) -> Build:
    def build(folder: Path) -> list[str]:
        damage(samples.build(folder / "best"))
        return ["verify", str(folder / "best")]

    return build


def resumed(task: str, *more: str) -> Build:
    """A run that goes on with one of the task `score_crash` and the bound 1%, which stored its identity and no work."""

    def build(folder: Path) -> list[str]:
        first = optimize("score_crash", "--max-drop", "1%")(folder)
        assert main(first) == 4
        return [*optimize(task, "--resume")(folder), *more]

    return build


def with_study(fill: Callable[[Path], object], *more: str) -> Build:
    def build(folder: Path) -> list[str]:
        (folder / "out").mkdir()
        fill(folder / "out" / "study.db")
        return optimize("sound", *more)(folder)

    return build


def foreign_database(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("create table customers (name text)")


def below_a_file(folder: Path) -> list[str]:
    (folder / "file").touch()
    return [*optimize("sound")(folder)[:-1], str(folder / "file" / "out")]


def output_is_a_file(folder: Path) -> list[str]:
    (folder / "out").touch()
    return optimize("sound")(folder)


def foreign_best(folder: Path) -> list[str]:
    (folder / "out" / "best").mkdir(parents=True)
    (folder / "out" / "best" / "photo.jpg").touch()
    return optimize("score_crash", "--force")(
        folder
    )  # the answer must come before the work, and so before the crash


def recipe_is_a_folder(folder: Path) -> list[str]:
    return [*optimize("sound")(folder), "--recipe", str(folder)]


def as_given(*argv: str) -> Build:
    """A command line that names no file of the test's folder, but FOLDER."""
    return lambda folder: [part.replace("FOLDER", str(folder)) for part in argv]


NESTED = "[" * 100_000 + "]" * 100_000
GIVEN = ("optimize", f"{TASKS}:sound", "-o", "FOLDER/out")

# fmt: off
MODELS: tuple[Row, ...] = (
    ("M1 a state in place of the model", optimize("state_dict"), 3,
     ("torch.nn.Module, got OrderedDict (4 tensors)", "build")),
    ("M2 a NaN weight", optimize("nan_weight"), 3, ("1 of 320 values NaN", "2.weight, first at [1, 7]", "repair")),
    ("M3 an infinite weight", optimize("inf_weight"), 3, ("weights must be finite", "2.weight", "repair")),
    ("M3 a weight of 1e38", dry("huge_weight"), 0, ("note: 2.weight holds values up to 1e+38",)),
    ("M4 no parameters", optimize("no_parameters"), 3, ("must have parameters, got none", "nothing to optimize")),
    ("M5 no layer to change", dry("no_layer"), 0, ("no layer can be changed", "parameters are in LayerNorm")),
    ("M6 tied weights", dry("tied"), 0, ("0 and 2 hold one weight: it is changed once, and stays tied",)),
    ("M7 a module called twice", dry("called_twice"), 0, ("0 runs 2 times in one pass",)),
    ("M8 a branch on values", dry("branching"), 0,
     ("the model cannot be traced", "two stays as it is: no example ran it")),
    ("M9 in training mode", dry("training"), 0, ("the model came in training mode",)),
    ("M10 on the meta device", optimize("meta"), 3,
     ("must be materialized, got weight, bias", "load the weights first")),
    ("M10 lazy", optimize("lazy"), 3, ("must be materialized",)),
    ("M12 quantized already", dry("quantized"), 0, ("2 layers are quantized already",)),
    ("M12 quantized already, again", recipe(step("0"), "quantized"), 2,
     ("must be a layer of the model, got '0'", "steps[0]")),
    ("M13 a dict comes out", dry("dict_output"), 0, ("candidates would be timed",)),
    ("M13 a set comes out", optimize("odd_output"), 3, ("tensors in dicts", "got set", "wrap the model")),
    ("M14 grouped convolution", dry("grouped"), 0, ("candidates would be timed",)),
    ("a model that cannot be copied", optimize("uncopyable"), 3, ("must be copyable", "lock", "keep files")),
)
DATA: tuple[Row, ...] = (
    ("D1 no examples", optimize("no_examples"), 4, ("at least 1 batch, got 0", "Task.examples", "give a few")),
    ("D2 a generator", optimize("generator"), 4, ("a sequence of batches, got generator", "make it a list")),
    ("D3 a NaN example", optimize("nan_example"), 4, ("must be finite", "examples[1], index [3, 1]", "leave that")),
    ("D4 a wrong shape", optimize("wrong_shape"), 4,
     ("accept every example", "60x31 and 32x64", "examples[0], float32 60x31")),
    ("D5 a wrong dtype", optimize("wrong_dtype"), 4,
     ("examples[0], uint8 60x32", "cast one, as in x.to(torch.float32)")),
    ("D5 no tensor", optimize("wrong_type"), 4,
     ("a batch is a tensor", "got list", "examples[0]", "torch.as_tensor")),
    ("D5 an empty dict", optimize("empty_dict"), 4, ("must hold a tensor, got none", "examples[0]")),
    ("D6 a label out of range", optimize("bad_label"), 4,
     ("the task's score must not fail", "Target 5 is out of bounds")),
    ("D7 inputs of one value", dry("constant"), 0, ("the input is 0 in all examples, a range of 0",)),
    ("D8 an outlier", dry("outlier"), 0,
     ("the input reaches 1e+30 where 99.9% of its values stay within 3.4", "mse")),
    ("D10 examples that fail", optimize("breaking_examples"), 4,
     ("must be readable", "the disk of the examples is gone")),
)
SCORES: tuple[Row, ...] = (
    ("C9 score gives None", optimize("score_none"), 4, ("must give finite numbers, got NoneType", "Task.score")),
    ("C9 score gives text", optimize("score_text"), 4, ("must give finite numbers, got str 'good'",)),
    ("C9 score gives NaN", optimize("score_nan"), 4, ("got nan", "Task.score, sample 2")),
    ("C9 score gives a table", optimize("score_table"), 4, ("shape (60, 5)", "one, or one per sample")),
    ("C9 score gives nothing", optimize("score_empty"), 4, ("shape (0,)", "one, or one per sample")),
    ("C9 score gives 0", optimize("score_zero"), 4, ("must not be 0", "shift or scale")),
    ("C9 score crashes", optimize("score_crash"), 4, ("score must not fail", "RuntimeError: the labels are gone")),
    ("C9 score ends the program", optimize("score_exit"), 4, ("score must not fail", "SystemExit: 3")),
    ("C9 score gives fewer the second time", optimize("score_fewer", "--runtime", "onnxruntime"), 4,
     ("the same samples each time, got 3 and 1",)),
    ("C9 score crashes the second time", optimize("score_crash_later", "--runtime", "onnxruntime"), 4,
     ("on some candidate", "the labels are gone")),
    ("score is no function", optimize("no_score"), 2, ("a function of predict, got float", "define score(predict)")),
)
CONFIGURATION: tuple[Row, ...] = (
    ("C1 unknown option", recipe(step(group_sise=32)), 2,
     ("unknown option, got 'group_sise'", "did you mean group?")),
    ("C2 text for a number", recipe(step(bits="4")), 2, ("bits must be int, got str '4'", "steps[0].options")),
    ("C2 true for a number", recipe(step(bits=True)), 2, ("bits must be int, got bool True",)),
    ("C3 a negative drop", optimize("sound", "--max-drop", "-0.2"), 2, ("in [0, 1)", "got '-0.2'", "--max-drop")),
    ("C3 a drop of 1.5", optimize("sound", "--max-drop", "1.5"), 2, ("in [0, 1)", "got '1.5'")),
    ("C3 a drop of 150%", optimize("sound", "--max-drop", "150%"), 2, ("in [0, 1)", "got '150%'")),
    ("C3 a drop of NaN", optimize("sound", "--max-drop", "nan"), 2, ("in [0, 1)", "got 'nan'")),
    ("C4 7 bits", recipe(step(bits=7)), 2, ("bits must be one of 8, 6, 5, 4, 3, 2, got 7", "steps[0].options.bits")),
    ("C4 a group that does not divide", recipe(step(bits=4, group=64)), 2,
     ("0: its 32 inputs do not divide", "steps[0]")),
    ("C4 a group that a convolution does not take", recipe(step("1", bits=4, group=32), "grouped"), 2,
     ("inputs do not divide into groups of 32", "steps[0]")),
    ("C8 one site twice", recipe({"flyweight_plan": 1, "steps": step()["steps"] * 2}), 2,
     ("one step of each stage", "steps[1]")),
    ("C10 another bound", resumed("score_crash", "--max-drop", "2%"), 2,
     ("goal.max_drop 0.02 where it was 0.01", "--force")),
    ("C10 another model", resumed("other_weights"), 2, ("the model, examples and goal it began with, got model ",)),
    ("C11 YAML with an object", recipe("!!python/object:os.system 'touch x'"), 2,
     ("a recipe must be JSON", "the form is")),
    ("C11 nesting", recipe(NESTED), 2, ("a recipe must be JSON",)),
    ("C12 unknown layer", recipe(step("20")), 2, ("must be a layer of the model, got '20'", "did you mean 2 or 0?")),
    ("unknown method", recipe(step(method="weights_only")), 2,
     ("unknown method", "'weights_only'", "did you mean weight_only?")),
    ("a recipe that is a list", recipe([1, 2]), 2, ("a plan is", "got [1, 2]", "recipe.json")),
    ("a step without a site", recipe({"flyweight_plan": 1, "steps": [{"method": "x"}]}), 2,
     ("method, site and options", "steps[0]")),
    ("a recipe of the future", recipe({"flyweight_plan": 2, "steps": []}), 2, ("plans of version 1, got 2",)),
    ("a recipe of 20 MB", recipe("[" + " " * 20_000_000 + "]"), 2, ("at most 10 MB",)),
    ("no recipe", optimize("sound", "--recipe", "nowhere.json"), 6,
     ("a recipe is a file", "nowhere.json", "give a plan")),
    ("a folder as recipe", recipe_is_a_folder, 6, ("a recipe is a file, got Is a directory",)),
    ("apply refuses alike", recipe(step(bits=7), command="apply"), 2, ("bits must be one of 8, 6, 5, 4, 3, 2, got 7",)),
    ("dry-run refuses alike", lambda folder: [*recipe(step("20"))(folder), "--dry-run"], 2,
     ("must be a layer of the model",)),
)
COMMANDS: tuple[Row, ...] = (
    ("L1 no command", as_given(), 2, ("required: COMMAND", "flyweight --help")),
    ("L1 unknown command", as_given("optimise"), 2, ("'optimise'", "did you mean optimize?")),
    ("L1 unknown flag", as_given(*GIVEN, "--max-drp=1%"), 2, ("--max-drp", "did you mean --max-drop?")),
    ("L1 unknown goal", as_given(*GIVEN, "--minimize", "sice"), 2, ("'sice'", "did you mean size?")),
    ("L1 no output", as_given("optimize", f"{TASKS}:sound"), 2, ("required: -o/--out",)),
    ("L2 no such file", as_given("optimize", "nowhere.py", "-o", "FOLDER/out"), 6,
     ("no such file: nowhere.py", "give PATH.py")),
    ("L2 a folder", as_given("optimize", "FOLDER", "-o", "FOLDER/out"), 6, ("got a folder", "give PATH.py")),
    ("L2 no task", as_given("profile"), 2,
     ("a task is a file, or --model with --text, got neither", "give PATH.py[:function], or --model")),
    ("L2 a file and a model", as_given(*GIVEN, "--model", "FOLDER", "--text", "x.txt"), 2,
     ("tasks.py:sound and --model and --text", "give PATH.py")),
    ("L2 a file and a model, evaluated", as_given("evaluate", f"{TASKS}:sound", "--model", "FOLDER", "--text", "x"), 2,
     ("tasks.py:sound and --model and --text",)),
    ("L2 a file and a text", as_given("evaluate", f"{TASKS}:sound", "--text", "x.txt"), 2,
     ("tasks.py:sound and --text",)),
    ("L2 a model without a text", as_given("optimize", "--model", "FOLDER", "-o", "FOLDER/out"), 2,
     ("got --model;", "--text FILE")),
    ("L2 a text without a model", as_given("profile", "--text", "x.txt"), 2, ("got --text;",)),
    ("L2 no such model", as_given("profile", "--model", "FOLDER/nowhere", "--text", "x.txt"), 6,
     ("a folder on this machine, got no such folder", "FOLDER/nowhere", "downloads nothing")),
    ("L2 a model that is no folder of Hugging Face", as_given("profile", "--model", "FOLDER", "--text", "x.txt"), 3,
     ("a Hugging Face model, got no config.json",)),
    ("L2 no such artifact", as_given("verify", "FOLDER/nowhere"), 6, ("FOLDER/nowhere",)),
    ("L2 no such result", as_given("report", "FOLDER"), 2, ("result.json", "run flyweight optimize first")),
    ("L3 output in use", with_study(Path.touch), 2,
     ("must not hold another run, got study.db", "--resume", "--force")),
    ("L3 output is a file", output_is_a_file, 2, ("the output must be a folder", "name another")),
    ("L3 output holds somebody's files", foreign_best, 2,
     ("an artifact takes the place of an artifact only", "photo.jpg")),
    ("L4 output below a file", below_a_file, 6, ("must be writable", "file/out", "-o")),
    ("L5 seed -1", optimize("sound", "--seed", "-1"), 2, ("an integer in [0, 2**32)", "'-1'", "--seed")),
    ("L5 seed 1.5", optimize("sound", "--seed", "1.5"), 2, ("an integer", "'1.5'")),
    ("L5 seed of other digits", optimize("sound", "--seed", "²"), 2, ("an integer",)),
    ("L5 seed 2**40", optimize("sound", "--seed", str(2**40)), 2, ("an integer in [0, 2**32)",)),
    ("L5 no time", optimize("sound", "--within", "0m"), 2, ("a time must be above 0", "'0m'", "--within")),
    ("L5 time abc", optimize("sound", "--within", "abc"), 2, ("a time must be above 0, as 90s, 20m or 1h",)),
    ("L5 time without end", optimize("sound", "--within", "9" * 400), 2, ("within must be a time",)),
    ("L6 a device", as_given(*GIVEN, "--device", "cuda"), 2, ("unrecognized arguments: --device",)),
    ("L6 unknown runtime", as_given(*GIVEN, "--runtime", "onnx"), 2, ("'onnx'", "onnxruntime", "openvino", "torch")),
    ("task file that is a checkpoint", file("", "model.pt"), 2,
     ("a task is a Python file", "model.pt", "give PATH.py")),
    ("task file without a function", file("x = 1"), 2, ("which function", "there are no functions")),
    ("task file with two functions", file("def one(): ...\ndef two(): ..."), 2,
     ("got there are one, two", "name it task")),
    ("task file that fails", file("x = 1\nraise ValueError('no weights')"), 4,
     ("ValueError: no weights", "given.py, line 2")),
    ("task file with a slip", file("def task(:"), 4, ("SyntaxError", "given.py, line 1")),
    ("task file that ends the program", file("import sys; sys.exit(0)"), 4, ("SystemExit", "given.py, line 1")),
    ("task that fails", optimize("fails"), 4,
     ("RuntimeError: the weights are gone", "tasks.py, line", "call it in Python")),
    ("task of another kind", optimize("no_task"), 2, ("must return a flyweight.Task, got str", "tasks.py:no_task")),
    ("task with arguments", optimize("needs_argument"), 4, ("missing 1 required positional argument: 'path'",)),
    ("unknown task", optimize("nothing"), 2, ("no such function", "got nothing", "there are sound")),
)
STUDIES: tuple[Row, ...] = (
    ("A14 somebody's database", with_study(foreign_database, "--resume"), 5, ("study.db",)),
    ("A14 random bytes", with_study(lambda path: path.write_bytes(os.urandom(5000)), "--resume"), 5, ("study.db",)),
)
# fmt: on
ARTIFACTS: tuple[Row, ...] = tuple((name, artifact(damage), 5, said) for name, damage, said in BAD_ARTIFACTS)
TABLE: tuple[Row, ...] = (*MODELS, *DATA, *SCORES, *CONFIGURATION, *COMMANDS, *STUDIES, *ARTIFACTS)


@pytest.mark.parametrize(("name", "build", "code", "contains"), TABLE, ids=[row[0] for row in TABLE])
def test_a_bad_input_gets_its_answer(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    build: Build,
    code: int,
    contains: tuple[str, ...],
) -> None:
    argv = build(tmp_path)
    capsys.readouterr()
    begin = time.monotonic()
    assert main(argv) == code
    ANSWERED[name] = time.monotonic() - begin
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    if code:
        assert said.out == ""
        answer = said.err.splitlines()[-1]
        assert answer.startswith("flyweight: ")
        assert answer.isprintable()
    else:
        answer = " ".join(said.out.split())
    for part in contains:
        assert part.replace("FOLDER", str(tmp_path)) in answer


def test_every_bad_input_is_in_the_table(figure: Callable[[int, str], None]) -> None:
    """The list's own numbers, but what is not built (a device, a dashboard) or needs one (M11: two devices)."""
    wanted = {*(f"M{i}" for i in (*range(1, 11), 12, 13, 14)), *(f"D{i}" for i in (*range(1, 9), 10))}
    wanted |= {*(f"C{i}" for i in (1, 2, 3, 4, 8, 9, 10, 11, 12)), *(f"L{i}" for i in range(1, 7))}
    wanted |= {f"A{i}" for i in (*range(1, 13), 14)}
    assert wanted <= {row[0].split()[0] for row in TABLE}
    assert len({row[0] for row in TABLE}) == len(TABLE)
    if len(ANSWERED) == len(TABLE):
        slowest = max(ANSWERED.values())
        figure(
            27,
            f"{len(TABLE)} bad inputs, all with their answer; tracebacks 0; slowest answer {slowest:.1f} s",
        )


def test_a_runtime_that_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        onnxruntime, "available", lambda: "onnx not installed: pip install 'flyweight[onnxruntime]'"
    )
    argv = ["optimize", f"{TASKS}:sound", "--runtime", "onnxruntime", "-o", str(tmp_path / "out")]
    assert main(argv) == 6
    assert "onnxruntime must be installed, got onnx not installed: pip install" in capsys.readouterr().err


def test_an_output_that_another_run_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Study.open(tmp_path / "out" / "study.db", {}, resume=False):
        assert main(optimize("sound", "--resume")(tmp_path)) == 2
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_may_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert main(optimize("sound")(tmp_path)) == 6
    assert "must be writable, got Permission denied" in capsys.readouterr().err


def test_an_impossible_goal_is_called_infeasible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = recipe(step("0"), "noisy")(tmp_path)
    argv[argv.index("torch")] = "onnxruntime"
    assert main([*argv, "--max-drop", "0", "--minimize", "size"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("infeasible: Nothing met the bound; the nearest, ")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["status"] == "infeasible"
    assert result["best"]["drop"] > 0
    assert result["best"]["verdict"] != "met"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the task `sound` that runs in PyTorch."""
    folder = tmp_path_factory.mktemp("written")
    assert main(recipe(step("0"), command="apply")(folder)) == 0
    return folder / "out" / "best"


@pytest.mark.parametrize(
    ("task", "code", "contains"),
    [
        ("other_weights", 0, ("the artifact was made from other weights",)),
        ("other_shape", 5, ("must belong to the model", "has shape (64, 32), the model (48, 32)")),
        ("no_layer", 5, ("must belong to the model, got a model without the layer 0",)),
    ],
)
def test_an_artifact_of_another_model(  # A13
    written: Path, capsys: pytest.CaptureFixture[str], task: str, code: int, contains: tuple[str, ...]
) -> None:
    assert main(["evaluate", f"{TASKS}:{task}", str(written)]) == code
    said = capsys.readouterr()
    answer = " ".join((said.err if code else said.out).split())
    for part in contains:
        assert part in answer


def test_loading_an_artifact_into_another_model(written: Path) -> None:
    tasks = _tasks()
    with pytest.raises(ArtifactError, match="has shape") as caught:
        flyweight.load(written, tasks["other_shape"]().model)
    assert caught.value.way_out
    with pytest.raises(UsageError, match="needs the model's class"):
        flyweight.load(written)
    assert isinstance(flyweight.load(written, tasks["sound"]().model), type(tasks["sound"]().model))


@pytest.mark.parametrize("name", ["study.db", "result.json", "best"])
def test_every_file_of_another_run_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("precious") if "." in name else (tmp_path / "out" / name).mkdir()
    assert main(optimize("sound")(tmp_path)) == 2
    assert f"got {name}" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_a_goal_out_of_range_is_refused_in_python_too() -> None:
    for bad in (
        {"max_drop": float("nan")},
        {"max_drop": True},
        {"within": -1},
        {"minimize": "cost"},
        {"seed": 2.0},
    ):
        with pytest.raises(FlyweightError) as caught:
            flyweight.Goal(**bad)  # type: ignore[arg-type]
        assert caught.value.exit_code == 2
        assert caught.value.got == repr(next(iter(bad.values())))


@functools.cache
def _tasks() -> dict[str, Callable[[], flyweight.Task]]:
    from bad_inputs import tasks

    return vars(tasks)
