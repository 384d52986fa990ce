"""Every error a user can meet. Each says four things: the rule, what came, where, and the way out.

The command line prints the sentence without a traceback and ends with the class's exit code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self


def first_line(error: BaseException) -> str:
    """The class and first line of somebody else's error, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200].rstrip(": ")


class FlyweightError(Exception):
    """Base of all errors that are the answer to a bad input, not a defect of flyweight.

    rule: what is required. got: what came instead. where: the layer, file, option or sample.
    way_out: what to do next. Empty parts are left out of the sentence.
    """

    exit_code = 1

    def __init__(self, rule: str, *, got: str = "", where: str = "", way_out: str = "") -> None:
        super().__init__(rule)
        self.rule, self.got, self.where, self.way_out = rule, got, where, way_out

    def __str__(self) -> str:
        """One sentence: rule, got, where, way out."""
        sentence = self.rule
        if self.got:
            sentence += f", got {self.got}"
        if self.where:
            sentence += f" (at {self.where})"
        return f"{sentence}; {self.way_out}" if self.way_out else sentence

    def at(self, where: str) -> Self:
        """The same error, told of another place."""
        return type(self)(self.rule, got=self.got, where=where, way_out=self.way_out)


@contextmanager
def foreign(
    answer: type[FlyweightError],
    rule: str,
    *,
    where: str | Callable[[BaseException], str] = "",
    way_out: str | Callable[[BaseException], str] = "",
    quoted: Callable[[BaseException], str] = first_line,
) -> Iterator[None]:
    """Run code that is not ours, a task's, a model's or a library's; whatever it raises becomes an error of ours.

    where, way_out: texts, or what makes them of the error; quoted: what to tell of it. Errors of ours pass as they are.
    """
    try:
        yield
    except FlyweightError:
        raise
    except (Exception, SystemExit) as error:  # the border to others' code, which may raise anything
        place, out = (part if isinstance(part, str) else part(error) for part in (where, way_out))
        raise answer(rule, got=quoted(error), where=place, way_out=out) from error


class UsageError(FlyweightError):
    """A wrong option, goal, plan or command line."""

    exit_code = 2


class ModelError(FlyweightError):
    """A model that cannot be taken in or changed as asked."""

    exit_code = 3


class DataError(FlyweightError):
    """Examples, training data or scores that cannot be used."""

    exit_code = 4


class ArtifactError(FlyweightError):
    """An artifact, study or plan file that is damaged, foreign or unsafe."""

    exit_code = 5


def another_model(got: str, where: str = "") -> ArtifactError:
    """The refusal of an artifact whose plan or weights do not fit the model that they are loaded into."""
    way_out = "give the model that the task's file builds"
    return ArtifactError("the artifact must belong to the model", got=got, where=where, way_out=way_out)


class MachineError(FlyweightError):
    """Something about this machine: a missing file or package, no room, no such device."""

    exit_code = 6


class Interrupted(FlyweightError):
    """Ctrl-C or a termination signal; what was finished is kept."""

    exit_code = 130
