"""Where a model runs, and in which file: one file, one runtime."""

from __future__ import annotations

from collections.abc import Collection

from flyweight import transforms
from flyweight.records import Step

ROUNDING = frozenset({"block_int8", "dynamic_int8", "static_int8"})
"""Methods that round activations."""


def methods(steps: Collection[Step]) -> frozenset[str]:
    """The methods of steps."""
    return frozenset(step.method for step in steps)


def lacking(form: str, known: frozenset[str], steps: Collection[Step]) -> str | None:
    """Why a form of file that knows these codes alone cannot hold what steps make of weights, or None."""
    if transforms.inside(list(steps)):
        return f"{form} has no layers in the place of one"
    others = {str(step.options.get("code", "integer")) for step in steps} - known
    return f"{form} has no type for the code {', '.join(sorted(others))}" if others else None
