"""Structured and blind fuzzing of all that a reader parses: the outcome is a value or an ArtifactError.

FLYWEIGHT_FUZZ multiplies the number of inputs.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from artifact import samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from flyweight.artifact import _onnx, _weights
from flyweight.artifact.format import read
from flyweight.artifact.manifest import Contents, decode, encode, sign
from flyweight.errors import ArtifactError

TIMES = int(os.environ.get("FLYWEIGHT_FUZZ", "1"))
FIGURE = Callable[[int, str], None]
QUICK = settings(
    max_examples=200 * TIMES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(
        ["float32", "0" * 64, "weights.safetensors", "model.onnx", "../x", 0, -1, 2**63, 1e308]
    ),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=8), parts, max_size=3),
    max_leaves=8,
)
WORDS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\\u0000",
    b"\\ud800",
    b"NaN",
    b"-1",
    b"1e999",
    b"9" * 30,
    b"\0",
)
"""What blind changes put in, besides random bytes."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good artifact that no test changes."""
    return samples.build(tmp_path_factory.mktemp("good") / "best")


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values within."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, child in items for path in places(child, (*at, key)))]


def signed(document: dict[str, Any]) -> bytes:
    """The document as a manifest with a right digest."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in document.items()]
    return sign(b"{\n" + "".join(lines).encode())


def decoded(raw: bytes) -> Contents | None:
    """What the manifest says, or None when it is refused; another error passes and fails the test."""
    try:
        return decode(raw)
    except ArtifactError as error:
        assert all((error.rule, error.got, error.where, error.way_out))
        assert str(error).isascii()
        assert len(str(error)) < 1000
        return None


@QUICK
@given(data=st.data())
def test_changed_manifests_are_refused_or_equal_when_written_again(good: Path, data: st.DataObject) -> None:
    document = json.loads((good / "manifest.json").read_bytes())
    del document["digest"]
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(document)[1:]))
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[path[-1]] = data.draw(JSON)
        elif isinstance(holder, dict):
            holder[data.draw(st.text(max_size=8))] = holder.pop(path[-1])
        else:
            del holder[path[-1]]
    said = decoded(signed(copy.deepcopy(document)))
    if said is not None:
        again = decode(encode(said.manifest, said.files, said.tensors))
        assert (again.manifest, set(again.files), set(again.tensors)) == (
            said.manifest,
            set(said.files),
            set(said.tensors),
        )


def changed(source: random.Random, raw: bytes) -> bytes:
    """The bytes with one to four blind changes: a byte, a word, a cut, a copy of a part."""
    content = bytearray(raw)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(content) + 1)
        to = min(len(content), at + source.choice((0, 1, 1, 2, 8, 64)))
        content[at:to] = source.choice(
            (
                bytes([source.randrange(256)]),
                source.choice(WORDS),
                b"",
                content[at:to] * 2,
                bytes(content[:8]),
            )
        )
    return bytes(content)


def corpus(good: Path) -> Sequence[bytes]:
    """Manifest lines to start from."""
    whole = (good / "manifest.json").read_bytes()
    return (whole[: whole.rfind(b'"digest"')], b"{\n")


def test_blindly_changed_manifests_are_refused_or_read(good: Path, figure: FIGURE) -> None:
    source, seeds, read_anyway = random.Random(1), corpus(good), 0
    for _ in range(10_000 * TIMES):
        read_anyway += decoded(sign(changed(source, source.choice(seeds)))) is not None
    assert 0 < read_anyway < 10_000 * TIMES  # both outcomes were seen
    figure(
        15, f"manifests changed blindly, outcomes other than a value or a refusal: 0 of {10_000 * TIMES:,}"
    )


def test_blindly_changed_weights_are_refused_or_read_as_safetensors_reads_them(
    good: Path, figure: FIGURE
) -> None:
    whole = (good / "weights.safetensors").read_bytes()
    size, source, read_anyway = int.from_bytes(whole[:8], "little"), random.Random(2), 0
    for _ in range(10_000 * TIMES):
        header = changed(source, whole[8 : 8 + size])
        raw = samples.safetensors(header, whole[8 + size :])
        if source.random() < 0.1:
            raw = changed(source, raw)
        ours = extents(raw)
        if ours is None:
            continue
        read_anyway += 1
        assert ours == theirs(raw)
    assert read_anyway > 10
    figure(15, f"weights changed blindly, read otherwise than by safetensors itself: 0 of {10_000 * TIMES:,}")


def extents(raw: bytes) -> dict[str, tuple[tuple[int, ...], bytes]] | None:
    """Shapes and bytes by name, as our reader finds them; None when it refuses."""
    stream = io.BytesIO(raw)
    try:
        head, found = _weights.read_header(stream, len(raw))  # type: ignore[arg-type]
    except ArtifactError:
        return None
    at = len(head)
    return {one.name: (one.shape, raw[at + one.begin : at + one.end]) for one in found}


def theirs(raw: bytes) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """The same, as the safetensors package finds them; the test fails when it refuses what we read."""
    try:
        return {name: (tuple(one["shape"]), bytes(one["data"])) for name, one in deserialize(raw)}
    except SafetensorError as error:
        pytest.fail(f"safetensors refuses what we read: {error}: {raw!r}")


def test_blindly_changed_graphs_are_refused_or_refer_to_the_weights_only(good: Path, figure: FIGURE) -> None:
    whole, source, read_anyway = (good / "model.onnx").read_bytes(), random.Random(3), 0
    for _ in range(10_000 * TIMES):
        raw = changed(source, whole)
        try:
            assert _onnx.check(raw, range(272, 405))
        except ArtifactError as error:
            assert str(error).isascii()
            continue
        read_anyway += 1
        for tensor in onnx.ModelProto.FromString(raw).graph.initializer:
            told = onnx.external_data_helper.ExternalDataInfo(tensor)
            assert not tensor.external_data or told.location == "weights.safetensors"
            assert not tensor.external_data or 272 <= told.offset <= told.offset + told.length <= 405
    assert read_anyway > 10
    figure(
        15, f"graphs changed blindly, accepted with a place outside of the weights: 0 of {10_000 * TIMES:,}"
    )


def test_blindly_changed_files_are_refused(good: Path, tmp_path: Path, figure: FIGURE) -> None:
    folder = samples.build(tmp_path / "best")
    source, whole = random.Random(4), {path.name: path.read_bytes() for path in good.iterdir()}
    for _ in range(500 * TIMES):
        name = source.choice(sorted(whole))
        raw = changed(source, whole[name])
        (folder / name).write_bytes(raw)
        if raw != whole[name]:
            with pytest.raises(ArtifactError):
                read(folder)
        (folder / name).write_bytes(whole[name])
    assert read(folder) is not None
    figure(11, f"files changed blindly that were accepted: 0 of {500 * TIMES:,}")
