"""manifest.json comes back as it was encoded, in one form, and says what is wrong with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import OrderedDict
from types import MappingProxyType

import pytest
from artifact import samples
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.artifact._strict import parse, shown
from flyweight.artifact.manifest import DTYPES, Manifest, StoredFile, StoredTensor, TensorSpec, decode, encode
from flyweight.errors import ArtifactError
from flyweight.records import Plan, Step

SHA = "ab" * 32
FILES = (StoredFile(name="weights.safetensors", bytes=12, sha256=SHA),)
TENSORS = (StoredTensor(name="b", dtype="int8", shape=(2, 0), sha256=SHA),)
TEXT = st.text(max_size=20)
TEXTS = st.dictionaries(TEXT, TEXT, max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(TEXT, parts, max_size=3),
    max_leaves=10,
)
OBJECTS = st.dictionaries(TEXT, JSON, max_size=3)
MANIFESTS = st.builds(
    Manifest,
    task=TEXT,
    runtime=st.from_regex("[A-Za-z0-9_-]{1,64}", fullmatch=True),
    session=TEXTS,
    plan=st.builds(Plan, st.lists(st.builds(Step, TEXT, TEXT, OBJECTS), max_size=3).map(tuple)),
    inputs=st.lists(
        st.builds(
            TensorSpec,
            name=TEXT,
            dtype=st.sampled_from(sorted(DTYPES)),
            shape=st.lists(st.none() | st.integers(0, 2**62), max_size=4).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
    outputs=JSON,
    layouts=TEXTS,
    model_digest=st.from_regex("[0-9a-f]{64}", fullmatch=True),
    measured=OBJECTS,
    machine=OBJECTS,
    versions=TEXTS,
)


@settings(max_examples=80, deadline=None)
@given(manifest=MANIFESTS)
def test_any_manifest_comes_back_equal(manifest: Manifest) -> None:
    said = decode(encode(manifest, FILES, TENSORS))
    assert (said.manifest, said.files, said.tensors) == (manifest, FILES, TENSORS)


def test_the_order_of_keys_does_not_matter() -> None:
    one = dataclasses.replace(samples.MANIFEST, machine={"a": 1, "b": [2]})
    two = dataclasses.replace(samples.MANIFEST, machine=MappingProxyType(OrderedDict(b=(2,), a=1)))
    assert encode(one, FILES, TENSORS) == encode(two, FILES, TENSORS)


def test_the_file_is_plain_json_with_its_digest_in_the_last_line() -> None:
    raw = encode(samples.MANIFEST, FILES, TENSORS)
    document = json.loads(raw)
    *lines, last = raw.decode().splitlines(keepends=True)
    assert last == f'"digest": "{document["digest"]}"}}\n'
    assert document["digest"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert document["files"] == {"weights.safetensors": {"bytes": 12, "sha256": SHA}}
    assert document["tensors"] == {"b": {"dtype": "int8", "shape": [2, 0], "sha256": SHA}}


@pytest.mark.parametrize("text", ['"\\ud800"', '{"\\udfff": 1}', '["\\ud83d\\u0041"]'])
def test_half_a_surrogate_pair_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="strict JSON"):
        parse(text.encode(), "here")
    assert parse(b'"\\ud83d\\ude00"', "here") == "\U0001f600"


def test_depth_is_limited() -> None:
    assert parse(b'[{"a":' * 32 + b"1" + b"}]" * 32, "here")
    with pytest.raises(ArtifactError, match="64 levels deep"):
        parse(b"[" * 65 + b"]" * 65, "here")


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        ("plain", "'plain'"),
        ("a\u202eb\x00<b>\n\x1b[31m", "'a\\u202eb\\x00<b>\\n\\x1b[31m'"),
        ("x" * 10**6, "'" + "x" * 76 + "..."),
        ({"a": [1, None]}, "{'a': [1, None]}"),
    ],
)
def test_what_a_file_says_is_safe_to_print(value: object, printed: str) -> None:
    assert shown(value) == printed
    assert len(shown(value)) <= 80
