"""Windows come from where they should, do not overlap, and cost no more than they must."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flyweight.errors import DataError, MachineError
from flyweight.inputs._text import parts, read_text, require, windows


def letters(text: str) -> list[int]:
    """A tokenizer with one token for each character."""
    return [ord(sign) for sign in text]


@given(st.integers(0, 400), st.integers(1, 9), st.integers(1, 30))
def test_windows_of_a_short_part_are_even_whole_and_apart(length: int, count: int, size: int) -> None:
    part = "".join(chr(1000 + place) for place in range(length))
    found = windows(part, letters, count, size)
    assert found.shape == (min(count, length // size), size)
    assert found.dtype == torch.int64
    places = (found - 1000).tolist()
    for row in places:
        assert row == list(range(row[0], row[0] + size))
    starts = [row[0] for row in places]
    steps = {after - before for before, after in itertools.pairwise(starts)}
    assert len(steps) <= 1
    assert all(step >= size for step in steps)
    if starts:
        assert starts[0] == 0
        assert length - (starts[-1] + size) < length // len(starts) + len(starts)


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 3000))
def test_windows_of_a_long_part_are_spread_and_little_is_encoded(count: int, size: int, more: int) -> None:
    length = count * size * 16 + more
    part = "".join(chr(1000 + place) for place in range(length))
    encoded = []

    def encode(text: str) -> list[int]:
        encoded.append(len(text))
        return letters(text)

    found = windows(part, encode, count, size)
    assert (found - 1000)[:, 0].tolist() == [k * (length // count) for k in range(count)]
    assert encoded == [16 * size] * count


def test_a_window_begins_with_a_word() -> None:
    part = "seldom have words of such length been encoded before this one " * 40
    found = windows(part, letters, 3, 20)
    assert all(chr(row[0]) == " " or k == 0 for k, row in enumerate(found.tolist()))
    text = "".join(map(chr, found[2].tolist()))
    assert text.split()[0] in part.split()


def test_a_long_part_of_few_tokens_is_encoded_as_a_whole() -> None:
    def words(text: str) -> list[int]:
        return list(range(len(text.split())))

    part = ("word" * 60 + " ") * 50  # far more characters than 16 for each token
    assert windows(part, words, 2, 20).shape == (2, 20)
    assert windows(part, words, 3, 20).shape == (2, 20)


def test_what_calibrates_never_judges() -> None:
    text = "".join(chr(1000 + place) for place in range(1000))
    first, last = parts(text)
    assert (len(first), len(last)) == (600, 380)
    assert ord(last[0]) - ord(first[-1]) == 21


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (None, MachineError, "a text is a file that can be read, got No such file"),
        (b"caf\xe9 and more", DataError, "must be UTF-8, got byte 0xe9 at 3"),
        (b"PK\x03\x04\x00\x00", DataError, "plain text, got a NUL at character 4"),
    ],
)
def test_what_is_no_text_is_refused(
    tmp_path: Path, content: bytes | None, kind: type[Exception], said: str
) -> None:
    path = tmp_path / "given.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kind, match=re.escape(said)) as caught:
        read_text(path)
    assert str(path) in str(caught.value)


def test_a_folder_and_too_large_a_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match="got Is a directory"):
        read_text(tmp_path)
    monkeypatch.setattr("flyweight.inputs._text.LARGEST", 10)
    (tmp_path / "big.txt").write_text("12345678901")
    with pytest.raises(DataError, match="at most 10 bytes"):
        read_text(tmp_path / "big.txt")
    (tmp_path / "fits.txt").write_bytes(b"\xef\xbb\xbf1234567")
    assert read_text(tmp_path / "fits.txt") == "1234567"


def test_too_few_windows_say_how_many_tokens_came_and_are_needed() -> None:
    found = windows("x" * 57, letters, 8, 16)
    with pytest.raises(DataError) as caught:
        require(found, 8, "x" * 57, letters, "last 38 %", Path("short.txt"))
    said = str(caught.value)
    assert "the last 38 % of the text must give 8 windows of 16 tokens, 128 tokens, got 57 tokens" in said
    assert "short.txt" in said
    require(windows("x" * 128, letters, 8, 16), 8, "x" * 128, letters, "last 38 %", Path("short.txt"))
    with pytest.raises(DataError, match="got 0 tokens"):
        require(windows("", letters, 2, 16), 2, "", letters, "first 60 %", Path("empty.txt"))
