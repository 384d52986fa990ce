"""Reads a text, and cuts it into windows of tokens: its first part calibrates, its last part judges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from flyweight.errors import DataError, MachineError

Encode = Callable[[str], list[int]]
"""A tokenizer's function from text to token ids, without marks of beginning and end."""
LARGEST = 1 << 28
"""Bytes of the largest text."""
CALIBRATES = 0.60
"""Share of the text that calibrates."""
JUDGES_FROM = 0.62
"""Where the part that judges begins; what is between belongs to neither, so that no paragraph is in both."""
_REACH = 16
"""Characters that are encoded for each token asked for; a word of English has five and makes about one token."""


def read_text(path: Path) -> str:
    """The text in a file; raises MachineError when it cannot be read, DataError when it is no UTF-8 text."""
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        way_out = "give a plain text of the kind that the model will meet"
        raise MachineError(
            "a text is a file that can be read", got=error.strerror or "", where=str(path), way_out=way_out
        ) from error
    if len(raw) > LARGEST:
        raise DataError(
            f"a text has at most {LARGEST:,} bytes", got="more", where=str(path), way_out="give a part of it"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            "a text must be UTF-8",
            got=f"byte 0x{raw[error.start]:02x} at {error.start:,}",
            where=str(path),
            way_out="convert it, as in: iconv -f latin1 -t utf8",
        ) from None
    if "\0" in text:
        raise DataError(
            "a text must be plain text",
            got=f"a NUL at character {text.index(chr(0)):,}",
            where=str(path),
            way_out="give the text itself, not an archive or a table of tokens",
        )
    return text


def parts(text: str) -> tuple[str, str]:
    """The part of a text that calibrates and the part that judges, with a gap between."""
    return text[: int(CALIBRATES * len(text))], text[int(JUDGES_FROM * len(text)) :]


def windows(part: str, encode: Encode, count: int, size: int) -> torch.Tensor:
    """At most `count` windows of `size` tokens, evenly spread over a part of a text, none overlapping: (windows, size) int64.

    Of a long part only the characters around each window are encoded. A short part gives fewer windows, or none.
    """
    room = len(part) // count
    if room >= _REACH * size:
        found = [encode(_from_a_word(part[k * room : k * room + _REACH * size]))[:size] for k in range(count)]
        if all(len(ids) == size for ids in found):
            return torch.tensor(found)
    ids = encode(part)
    count = min(count, len(ids) // size)
    room = len(ids) // max(count, 1)
    found = [ids[k * room : k * room + size] for k in range(count)]
    return torch.tensor(found, dtype=torch.int64).view(count, size)


def require(found: torch.Tensor, least: int, part: str, encode: Encode, name: str, where: Path) -> None:
    """Raise DataError that says how many tokens there are and how many are needed when there are fewer windows."""
    if len(found) >= least:
        return
    size, tokens = found.shape[1], len(encode(part))
    raise DataError(
        f"the {name} of the text must give {least} windows of {size} tokens, {least * size:,} tokens",
        got=f"{tokens:,} tokens",
        where=str(where),
        way_out="give a longer text, or a smaller window",
    )


def _from_a_word(snippet: str) -> str:
    """Without the piece of a word that it begins with; a text without spaces stays as it is."""
    return snippet[max(snippet[:64].find(" "), 0) :]
