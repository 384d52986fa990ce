"""What the options of several codes have in common."""

from __future__ import annotations

from flyweight.errors import UsageError

GROUPS = (16, 32, 64, 128, 256)


def require(holds: bool, name: str, rule: str, got: object) -> None:
    """Raise UsageError unless the rule for an option holds."""
    if not holds:
        raise UsageError(f"{name} must be {rule}", got=repr(got), where=name)


def require_group(group: int | str | None) -> None:
    """Raise UsageError unless it says who shares a scale: one of GROUPS, None (a channel) or "tensor"."""
    require(group in (None, "tensor", *GROUPS), "group", '16, 32, 64, 128, 256, "tensor" or None', group)


def require_one_of(value: object, name: str, known: tuple[object, ...]) -> None:
    """Raise UsageError unless the value is a known one."""
    require(value in known, name, f"one of {', '.join(map(str, known))}", value)
