"""How artifact files are doubted: strict JSON, and refusals that are safe to print."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NoReturn

from flyweight.errors import ArtifactError

AGAIN = "get an undamaged copy, or write the artifact again"
MAX_DEPTH = 64
"""How deep lists and objects may lie in one another in a file."""


def damaged(rule: str, *, got: str, where: str, way_out: str = AGAIN) -> ArtifactError:
    """The refusal of a file, with all four parts; `got` must be safe to print (see `shown`)."""
    return ArtifactError(rule, got=got, where=where, way_out=way_out)


def shown(value: object, most: int = 80) -> str:
    """What a file said, safe to print: all but printable ASCII escaped, cut after `most` characters."""
    text = ascii(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most else text[: most - 3] + "..."


def parse(raw: bytes, where: str) -> Any:
    """The JSON value of UTF-8 bytes; raises ArtifactError on what two readers could read differently.

    Refused: other encodings, lone surrogates, repeated keys, NaN, Inf, numbers beyond float64, and more than
    MAX_DEPTH levels.
    """
    try:
        value = json.loads(
            raw.decode(), object_pairs_hook=_unrepeated, parse_constant=_not_finite, parse_float=_finite
        )
        json.dumps(value, ensure_ascii=False).encode()  # fails on half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise damaged("the file must be strict JSON", got=shown(str(error), 120), where=where) from error
    if _deeper(value, MAX_DEPTH):
        raise damaged(f"JSON may be {MAX_DEPTH} levels deep", got="more", where=where)
    return value


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond float64")
    return value


def _deeper(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        layer = [child for item in layer for child in _children(item) if isinstance(child, dict | list)]
        if not layer:
            return False
    return True


def _children(item: Any) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
