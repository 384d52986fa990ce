"""The command line: one sub-command per stage. Parses, calls, prints, exits; no logic."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from flyweight import discover, stages
from flyweight.errors import FlyweightError, Interrupted, MachineError, UsageError, first_line
from flyweight.inputs.language_model import language_task
from flyweight.inputs.task_file import read_task
from flyweight.optimize import optimize, read_result
from flyweight.records import OBJECTIVES, Goal, Plan, Task
from flyweight.report import _words, terminal
from flyweight.streaming import command as streaming

_SECONDS = {"s": 1, "m": 60, "h": 3600}
_RECIPE_BYTES = 10_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 usage, 3 model, 4 data, 5 artifact, 6 machine, 130 interrupted."""
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        return _guarded(argv)
    finally:
        signal.signal(signal.SIGTERM, before)


def _guarded(argv: Sequence[str] | None) -> int:
    """Run one command; every error it may end with becomes a sentence and an exit code."""
    if sys.stdout is None:  # closed by the caller
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # it is the process's own until its end
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except FlyweightError as error:
        return _end(str(error), error.exit_code)
    except KeyboardInterrupt as signalled:
        code, word = (
            (143, "terminated")
            if isinstance(signalled, _Terminated)
            else (Interrupted.exit_code, "interrupted")
        )
        return _end(f"{word}; what optimize or stream had finished is kept: go on with --resume", code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, OSError) as error:
        reason = "memory ran out" if isinstance(error, MemoryError) else first_line(error)
        return _end(
            f"this machine must have room and rights for the work, got {reason}; the log is {_log()}", 6
        )
    except Exception:  # the last border: a defect of ours, told with the place of its log
        return _end(f"a defect of flyweight; please report it with the log {_log()}", 1)


def _run(argv: Sequence[str] | None) -> int:
    try:
        given = _parser().parse_args(argv)
    except SystemExit as done:  # --help was printed
        return int(done.code or 0)
    said = given.run(given)
    if said is not None:
        print(_words.encodable(said, sys.stdout.encoding or "ascii"))
    return 0


def percent(text: str) -> float:
    """1%, 0.01 or 0.5% as a fraction in [0, 1)."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE]-?[0-9]+)?)\s*(%?)\s*", text)
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value < 1:
        raise UsageError("a drop must be in [0, 1), as 1% or 0.01", got=repr(text), where="--max-drop")
    return value


def duration(text: str) -> float:
    """90s, 20m, 1h or plain seconds, in seconds."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([smh]?)\s*", text)
    value = float(match[1]) * _SECONDS[match[2] or "s"] if match else 0.0
    if value <= 0:
        raise UsageError("a time must be above 0, as 90s, 20m or 1h", got=repr(text), where="--within")
    return value


def read_plan(path: str) -> Plan:
    """The plan in a recipe file: a plan, an artifact's manifest, or a run's result.json."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_RECIPE_BYTES + 1)
    except OSError as error:
        got, way_out = error.strerror or "", "give a plan, an artifact's manifest.json or a run's result.json"
        raise MachineError("a recipe is a file", got=got, where=path, way_out=way_out) from error
    if len(raw) > _RECIPE_BYTES:
        raise UsageError("a recipe is at most 10 MB", got="more", where=path, way_out="give the plan alone")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        way_out = (
            'the form is {"flyweight_plan": 1, "steps": [{"method": ..., "site": ..., "options": {...}}]}'
        )
        raise UsageError("a recipe must be JSON", got=str(error)[:120], where=path, way_out=way_out) from None
    if isinstance(value, dict) and "flyweight_plan" not in value:
        value = (
            value.get("best", value).get("plan", value)
            if isinstance(value.get("best", value), dict)
            else value
        )
    try:
        return Plan.from_json(value)
    except UsageError as error:
        raise error.at(f"{path}: {error.where}") from None


class _Parser(argparse.ArgumentParser):
    """argparse that raises UsageError with a suggestion instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        hint = f"see {self.prog} --help"
        wrong = re.search(r"(?:unrecognized arguments: |invalid choice: ')([^\s']+)", message)
        if wrong:
            known = [s for action in self._actions for s in (*action.option_strings, *(action.choices or ()))]
            near = difflib.get_close_matches(wrong[1], [str(name) for name in known], n=1)
            if near:
                hint, message = f"did you mean {near[0]}?", re.sub(r" \(choose from .*\)$", "", message)
        raise UsageError(message, way_out=hint)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; an unknown flag of a sub-command is answered by that sub-command, which knows its flags."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            getattr(found, "parser", self).error(f"unrecognized arguments: {' '.join(rest)}")
        return found


def _parser() -> _Parser:
    parser = _Parser(prog="flyweight", description="Fit a model to a budget, measured, with the proof.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, (about, arguments, run) in _COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        arguments(command)
        command.set_defaults(run=run, parser=command)
    return parser


def _task(command: _Parser) -> None:
    command.add_argument(
        "task",
        nargs="?",
        metavar="PATH.py[:function]",
        help="a file with a function that returns flyweight.Task",
    )
    command.add_argument(
        "--model", metavar="FOLDER", help="instead: a language model, as a Hugging Face folder"
    )
    command.add_argument("--text", metavar="FILE", help="with --model: a text that calibrates and judges it")


def _runtime(command: _Parser) -> None:
    names = ("auto", *discover.methods("runtimes"))
    command.add_argument(
        "--runtime", default="auto", choices=names, help="where it runs; auto measures all (%(default)s)"
    )
    command.add_argument("--seed", default="0", help="seeds every random choice (%(default)s)")


def _goal(command: _Parser) -> None:
    command.add_argument("--max-drop", default="1%", help="largest relative drop of the score (%(default)s)")
    command.add_argument(
        "--minimize", default="latency", choices=OBJECTIVES, help="what gets smaller (%(default)s)"
    )
    command.add_argument("--within", default="20m", help="time for the search: 90s, 20m, 1h (%(default)s)")
    _runtime(command)


def _output(command: _Parser) -> None:
    command.add_argument("-o", "--out", required=True, metavar="OUT", help="folder for the results")
    command.add_argument("--force", action="store_true", help="start anew over what OUT holds")


def _optimize_arguments(command: _Parser) -> None:
    _task(command)
    _goal(command)
    _output(command)
    command.add_argument("--resume", action="store_true", help="go on with the run that OUT holds")
    command.add_argument("--recipe", metavar="FILE", help="measure this plan instead of searching")
    command.add_argument(
        "--dry-run", action="store_true", help="say what would be tried, and how long it takes"
    )


def _apply_arguments(command: _Parser) -> None:
    _task(command)
    command.add_argument(
        "--recipe", required=True, metavar="FILE", help="a plan, a manifest or a result.json"
    )
    _runtime(command)
    _output(command)


def _evaluate_arguments(command: _Parser) -> None:
    _task(command)
    command.add_argument("artifact", nargs="?", help="an artifact's folder; without it the original alone")
    command.add_argument("--seed", default="0", help="seeds every random choice (%(default)s)")


def _profile_arguments(command: _Parser) -> None:
    _task(command)
    _runtime(command)


def _folder_argument(command: _Parser) -> None:
    command.add_argument("folder", metavar="DIR", help="the folder")


def _export_arguments(command: _Parser) -> None:
    _folder_argument(command)
    command.add_argument("-o", "--out", required=True, metavar="OUT", help="a new folder for the files")


def _given_goal(given: Any) -> Goal:
    values = {"runtime": given.runtime, "seed": _seed(given.seed)}
    if hasattr(given, "max_drop"):
        values |= {
            "max_drop": percent(given.max_drop),
            "minimize": given.minimize,
            "within": duration(given.within),
        }
    return Goal(**values)


def _given_task(given: Any) -> Task:
    """The task of a file, or of a language model's folder and a text; raises UsageError when it is not clear which."""
    ways = {"--model": given.model, "--text": given.text}
    missing = [name for name, value in ways.items() if value is None]
    if given.task is not None and len(missing) == 2:
        return read_task(given.task)
    if given.task is None and not missing:
        return language_task(given.model, given.text)
    came = [name for name in ways if name not in missing]
    raise UsageError(
        "a task is a file, or --model with --text",
        got=" and ".join([given.task, *came] if given.task else came) or "neither",
        way_out="give PATH.py[:function], or --model FOLDER --text FILE",
    )


def _seed(text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text):
        raise UsageError("a seed must be an integer in [0, 2**32)", got=repr(text), where="--seed")
    return int(text)


def _optimize(given: Any) -> str | None:
    goal = _given_goal(given)
    recipe = read_plan(given.recipe) if given.recipe else None
    task = _given_task(given)
    if given.dry_run:
        return stages.dry_run(task, goal, recipe)
    result = optimize(
        task, goal, out=given.out, recipe=recipe, resume=given.resume, force=given.force, progress=True
    )
    terminal.show(result, given.out, sys.stdout)
    return None


def _apply(given: Any) -> str:
    goal, recipe = _given_goal(given), read_plan(given.recipe)
    return stages.apply(_given_task(given), recipe, goal, Path(given.out), force=given.force)


def _evaluate(given: Any) -> str:
    if given.model is not None and not re.search(r"\.py(:|$)", given.task or ""):
        given.task, given.artifact = None, given.task  # beside --model the one path is the artifact's
    task = _given_task(given)
    return stages.evaluate(task, Path(given.artifact) if given.artifact else None, _seed(given.seed))


def _report(given: Any) -> None:
    result = read_result(Path(given.folder))
    stages.write_report(result, Path(given.folder))
    terminal.show(result, given.folder, sys.stdout)


def _stop(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends as Ctrl-C does, with its own code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated


class _Terminated(KeyboardInterrupt):
    """No Exception: code that handles every error of a task's own would take it for one of those."""


def _end(sentence: str, code: int) -> int:
    """Print one line to stderr whatever its encoding and whatever the sentence quotes."""
    if sys.stderr is not None:  # closed by the caller
        text = _words.one_line(f"flyweight: {sentence}")
        print(_words.encodable(text, sys.stderr.encoding or "ascii"), file=sys.stderr)
    return code


def _log() -> str:
    with tempfile.NamedTemporaryFile("w", prefix="flyweight-", suffix=".log", delete=False) as file:
        traceback.print_exc(file=file)
    return file.name


_Arguments = Callable[[_Parser], None]
_COMMANDS: dict[str, tuple[str, _Arguments, Callable[[Any], str | None]]] = {
    "optimize": ("find the best form of a task's model within the bound", _optimize_arguments, _optimize),
    "profile": (
        "show the layers of a task's model: bytes, arithmetic, time",
        _profile_arguments,
        lambda given: stages.profile(_given_task(given), _given_goal(given)),
    ),
    "apply": ("apply a recipe to a task's model and write the artifact", _apply_arguments, _apply),
    "evaluate": ("score and time a task's model, or an artifact of it", _evaluate_arguments, _evaluate),
    "stream": (
        "put a language model larger than memory into few bits, shard by shard",
        streaming.arguments,
        streaming.run,
    ),
    "export": (
        "write the plain files of an artifact for other tools",
        _export_arguments,
        lambda given: stages.export(Path(given.folder), Path(given.out)),
    ),
    "verify": (
        "check an artifact to its last byte",
        _folder_argument,
        lambda given: stages.verify(Path(given.folder)),
    ),
    "report": ("write the report of a finished run again", _folder_argument, _report),
    "doctor": (
        "say what this machine has and which number formats are fast on it",
        lambda command: None,
        lambda given: stages.doctor(),
    ),
}


if __name__ == "__main__":
    sys.exit(main())
