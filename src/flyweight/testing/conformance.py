"""The contract of transforms, codes and runtimes as checks that every method must pass, for us and for authors of plug-ins.

    from flyweight.testing.conformance import check_transform, failures
    assert not failures(check_transform("my_method"))

Each check runs over the zoo of awkward models; a cell is passed, failed, or not applicable with the reason. Expected
failures are named with their reason, and one that passes is a failure too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from flyweight import discover
from flyweight.errors import FlyweightError, ModelError, UsageError, first_line
from flyweight.testing import _code_checks as of_codes
from flyweight.testing import _runtime_checks as of_runtimes
from flyweight.testing import _transform_checks as of_transforms
from flyweight.testing._cases import Case, NotApplicable, cases
from flyweight.testing.zoo import ZOO, Zoo

State: TypeAlias = Literal["passed", "failed", "not applicable"]
_Subject = TypeVar("_Subject")


@dataclass(frozen=True)
class Check:
    """One cell: one check of one method on one model with one setting."""

    method: str
    model: str
    setting: str
    """The options, or the plan that a runtime runs."""
    name: str
    state: State
    reason: str = ""
    """Why it failed or does not apply."""

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.method} on {self.model} ({self.setting}): {self.name} {self.state} {self.reason}".rstrip()
        )


def check_transform(name: str, zoo: Sequence[Zoo] = ZOO) -> Iterator[Check]:
    """Every check of a transform on every model of the zoo, in float32 and bfloat16."""
    method = discover.method("transforms", name)
    for check in of_transforms.OPTION_CHECKS:
        yield _cell((name, "-", "options"), check, method)
    for entry in zoo:
        for case in cases(name, entry):
            if isinstance(case, str):
                yield Check(name, entry.name, "-", "any", "not applicable", case)
                continue
            for on_model in of_transforms.CHECKS:
                yield _cell((name, case.model_name, case.setting), on_model, case)


def check_code(name: str, levels: Sequence[Any] | None = None) -> Iterator[Check]:
    """Every check of a code at each of its levels, or at those given, on ordinary and awkward weights."""
    code = discover.method("codes", name)
    for check in of_codes.CODE_CHECKS:
        yield _cell((name, "-", "levels"), check, code)
    for case in of_codes.cases(name, code, code.LEVELS if levels is None else levels):
        place = (name, case.weight_name, case.setting)
        fits = _cell(place, of_codes.refusal_truthful, case)
        yield fits
        if fits.state == "failed":
            continue
        try:
            _ = case.grid
        except UsageError as refused:
            yield Check(*place, "any", "not applicable", str(refused))
            continue
        for on_weight in of_codes.CHECKS:
            yield _cell(place, on_weight, case)


def check_runtime(name: str, zoo: Sequence[Zoo] = ZOO) -> Iterator[Check]:
    """Every check of a runtime on every model of the zoo, as it is and with every transform that pays there."""
    reason = discover.method("runtimes", name).available()
    if reason:
        yield Check(name, "-", "-", "any", "not applicable", reason)
        return
    for entry in zoo:
        for case in of_runtimes.plans(name, entry):
            if isinstance(case, str):
                yield Check(name, entry.name, "-", "any", "not applicable", case)
                continue
            yield from _on_runtime(name, case)


def failures(cells: Iterable[Check], expected: Mapping[str, str] | None = None) -> list[str]:
    """The failed cells, one line each, and the expected failures that passed; nothing: the method keeps the contract.

    expected: "model check" -> why it must fail.
    """
    found, left = [], dict(expected or {})
    for cell in cells:
        key = f"{cell.model} {cell.name}"
        if cell.state == "failed" and key not in (expected or {}):
            found.append(str(cell))
        elif cell.state == "failed":
            left.pop(key, None)
    return found + [f"{key} passes, though it was expected to fail: {why}" for key, why in left.items()]


def _on_runtime(name: str, case: Case) -> Iterator[Check]:
    place = (name, case.model_name, case.setting)
    try:
        with of_runtimes.prepared(name, case) as running:
            for check in of_runtimes.CHECKS:
                yield _cell(place, check, running)
    except ModelError as error:  # a runtime may refuse a model, with the reason
        yield Check(*place, "prepare", "not applicable", str(error))
    except Exception as error:  # whatever else it raises breaks the contract
        yield Check(*place, "prepare", "failed", first_line(error))


def _cell(place: tuple[str, str, str], check: Callable[[_Subject], None], subject: _Subject) -> Check:
    name = check.__name__
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(subject)
    except NotApplicable as reason:
        return Check(*place, name, "not applicable", str(reason))
    except FlyweightError as error:
        return Check(*place, name, "failed", f"refused: {error}")
    except Exception as error:  # a method under test may raise anything
        return Check(*place, name, "failed", first_line(error))
    return Check(*place, name, "passed")
