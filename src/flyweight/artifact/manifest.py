"""The manifest: what an artifact says about itself, as nouns and as the bytes of manifest.json."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from flyweight.artifact._strict import damaged, parse, shown
from flyweight.errors import ArtifactError, UsageError
from flyweight.records import JSON, Plan, canonical, plain
from flyweight.runtimes._files import BESIDE, CONFIG, MODEL

FORMAT = 4
"""The newest format that this version writes and reads: 2 came with model.gguf, 3 with compressed weights, 4 with
model.safetensors; an artifact without any of them is still written as 1."""
MAX_MANIFEST = 2**20
"""Bytes."""
MAX_TENSORS = 100_000
MAX_UNPACKED = 2**36
"""Bytes that compressed weights may unpack to."""
MAX_RATIO = 8
"""Unpacked bytes for each compressed one: a Huffman code spends a bit or more on each byte."""
MANIFEST, WEIGHTS, ONNX, GGUF = "manifest.json", "weights.safetensors", "model.onnx", "model.gguf"
PACKED = f"{WEIGHTS}.gz"
FILES = (WEIGHTS, ONNX, GGUF, PACKED, MODEL, *BESIDE)
"""What a manifest may list."""
DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "bool": "BOOL",
        **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
        **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
        **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
        "bfloat16": "BF16",
        "float8_e4m3fn": "F8_E4M3",
        "float8_e5m2": "F8_E5M2",
        "complex64": "C64",
    }
)
"""The element types an artifact may hold, by torch's names, with the names that safetensors files use."""

_SINCE: Mapping[str, int] = MappingProxyType({GGUF: 2, PACKED: 3, MODEL: 4})
"""The format that a file came with, where it is not the first."""
_LAST_LINE = re.compile(rb'"digest": "([0-9a-f]{64})"}\n')


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input of the model."""

    name: str
    dtype: str
    """One of DTYPES."""
    shape: tuple[int | None, ...]
    """None: any length."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the writer of an artifact tells about it."""

    task: str
    runtime: str
    """The name of the runtime that runs it."""
    session: Mapping[str, str]
    """Options for the runtime's session. They come from a file: a runtime takes only those it knows."""
    plan: Plan
    inputs: tuple[TensorSpec, ...]
    outputs: JSON
    """How the outputs are put together; the runtime's own description."""
    layouts: Mapping[str, str]
    """How weights are packed, by name; the runtime's own description."""
    model_digest: str
    """Digest of the model that it was made from, in lower-case hex."""
    measured: Mapping[str, JSON]
    """records.Measured as JSON."""
    machine: Mapping[str, JSON]
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file as the manifest lists it."""

    name: str
    bytes: int
    sha256: str
    unpacked: int | None = None
    """Bytes that PACKED unpacks to; None: the file is not compressed."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor as the manifest lists it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    """Of the tensor's bytes."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All that manifest.json says."""

    manifest: Manifest
    files: tuple[StoredFile, ...]
    tensors: tuple[StoredTensor, ...]
    digest: str


_FIELDS = tuple(field.name for field in fields(Manifest))
_KEYS = frozenset((*_FIELDS, "flyweight_artifact", "files", "tensors", "digest"))
_INPUT_KEYS = frozenset(("name", "dtype", "shape"))
_FILE_KEYS = frozenset(("bytes", "sha256"))
_PACKED_KEYS = frozenset((*_FILE_KEYS, "unpacked"))
_TENSOR_KEYS = frozenset(("dtype", "shape", "sha256"))


def encode(manifest: Manifest, files: Sequence[StoredFile], tensors: Sequence[StoredTensor]) -> bytes:
    """The bytes of manifest.json; raises ArtifactError when a value is not finite JSON of the right type."""
    document = {
        **{name: getattr(manifest, name) for name in _FIELDS},
        "flyweight_artifact": _format(one.name for one in files),
        "inputs": [vars(one) for one in manifest.inputs],
        "files": {one.name: _unnamed(one) for one in files},
        "tensors": {one.name: _unnamed(one) for one in tensors},
    }
    try:
        lines = {key: canonical(plain(value)) for key, value in sorted(document.items())}
    except (TypeError, ValueError) as error:
        raise damaged("a manifest holds plain, finite JSON values", got=str(error), where=MANIFEST) from error
    raw = sign(b"{\n" + b"".join(b'"%s": %s,\n' % (key.encode(), value) for key, value in lines.items()))
    decode(raw)  # what is written passes the reader's checks, or is not written
    return raw


def sign(body: bytes) -> bytes:
    """The manifest's lines with the digest as the last one."""
    return b'%s"digest": "%s"}\n' % (body, hashlib.sha256(body).hexdigest().encode())


def decode(raw: bytes) -> Contents:
    """What manifest.json says; raises ArtifactError when its digest, its version or any value is wrong."""
    if len(raw) > MAX_MANIFEST:
        raise damaged(f"a manifest may have {MAX_MANIFEST} bytes", got=f"{len(raw)}", where=MANIFEST)
    digest = _digest(raw)
    document = parse(raw, MANIFEST)
    _check_version(document)
    said = _record(document, "the manifest", _KEYS)
    tensors = _kind(said["tensors"], dict, "tensors")
    _need(len(tensors) <= MAX_TENSORS, f"an artifact holds at most {MAX_TENSORS} tensors", len(tensors))
    files = _kind(said["files"], dict, "files")
    _check_files(files, document["flyweight_artifact"])
    return Contents(
        manifest=_manifest(said),
        files=tuple(_file(name, value) for name, value in files.items()),
        tensors=tuple(_tensor(name, value) for name, value in tensors.items()),
        digest=digest,
    )


def _digest(raw: bytes) -> str:
    body = raw[: raw.rfind(b"\n", 0, -1) + 1]
    last = _LAST_LINE.fullmatch(raw[len(body) :])
    if not last:
        got = f"{len(raw)} bytes that do not" if raw else "an empty file"
        raise damaged("the manifest must end with its digest", got=got, where=MANIFEST)
    said, digest = last[1].decode(), hashlib.sha256(body).hexdigest()
    if digest != said:
        rule = f"the manifest's digest must match its content, {said[:16]}..."
        raise damaged(rule, got=f"{digest[:16]}...", where=MANIFEST)
    return digest


def _check_version(document: Any) -> None:
    version = document.get("flyweight_artifact", 0) if isinstance(document, dict) else 0
    _need(type(version) is int and version >= 1, "flyweight_artifact is the number of the format", version)
    if version > FORMAT:
        raise ArtifactError(
            f"this version of flyweight reads artifacts up to format {FORMAT}",
            got=f"one written by format {shown(version)}",
            where=MANIFEST,
            way_out="upgrade flyweight",
        )


def _check_files(names: Collection[str], version: int) -> None:
    for name in names:
        rule = f"a manifest lists {WEIGHTS} and {ONNX} only, the first perhaps as {PACKED}, or {GGUF} alone, or {MODEL}"
        _need(name in FILES, f"{rule} and {', '.join(BESIDE)}", name)
    _need(not {WEIGHTS, PACKED} <= set(names), f"weights are in {WEIGHTS} or in {PACKED}", sorted(names))
    _need(GGUF not in names or len(names) == 1, f"{GGUF} holds all that a model needs", sorted(names))
    beside = {name for name in names if name != MODEL}
    folder = CONFIG in beside <= set(BESIDE) if MODEL in names else beside.isdisjoint(BESIDE)
    _need(
        folder, f"{MODEL} stands beside {CONFIG} and files of its kind, which stand beside it", sorted(names)
    )
    _need(_format(names) <= version, "artifacts with these files have a later format", version)


def _format(names: Iterable[str]) -> int:
    return max((_SINCE.get(name, 1) for name in names), default=1)


def _manifest(said: dict[str, Any]) -> Manifest:
    runtime = _kind(said["runtime"], str, "runtime")
    model_digest = _kind(said["model_digest"], str, "model_digest")
    inputs = _kind(said["inputs"], list, "inputs")
    _need(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", runtime), "runtime must be a runtime's name", runtime)
    _need(re.fullmatch(r"[0-9a-f]{8,128}", model_digest), "model_digest must be in hex", model_digest)
    return Manifest(
        task=_kind(said["task"], str, "task"),
        runtime=runtime,
        session=_texts(said["session"], "session"),
        plan=_plan(said["plan"]),
        inputs=tuple(_input(one, f"inputs[{at}]") for at, one in enumerate(inputs)),
        outputs=said["outputs"],
        layouts=_texts(said["layouts"], "layouts"),
        model_digest=model_digest,
        measured=_kind(said["measured"], dict, "measured"),
        machine=_kind(said["machine"], dict, "machine"),
        versions=_texts(said["versions"], "versions"),
    )


def _plan(value: Any) -> Plan:
    try:
        return Plan.from_json(value)
    except UsageError as error:
        raise damaged(error.rule, got=shown(error.got), where=f"{MANIFEST}, plan {error.where}") from error


def _input(value: Any, place: str) -> TensorSpec:
    said = _record(value, place, _INPUT_KEYS)
    _check_dtype(said["dtype"], place)
    _check_shape([0 if length is None else length for length in _kind(said["shape"], list, place)], place)
    return TensorSpec(name=_kind(said["name"], str, place), dtype=said["dtype"], shape=tuple(said["shape"]))


def _file(name: str, value: Any) -> StoredFile:
    place = f"file {shown(name)}"
    said = _record(value, place, _PACKED_KEYS if name == PACKED else _FILE_KEYS)
    _check_count(said["bytes"], f"{place} has a number of bytes")
    _check_sha256(said["sha256"], place)
    if name == PACKED:
        _check_count(said["unpacked"], f"{place} has a number of unpacked bytes")
        most = min(MAX_UNPACKED, MAX_RATIO * said["bytes"])
        _need(said["unpacked"] <= most, f"{place} may unpack to {most} bytes", said["unpacked"])
    return StoredFile(name=name, **said)


def _tensor(name: str, value: Any) -> StoredTensor:
    place = f"tensor {shown(name)}"
    said = _record(value, place, _TENSOR_KEYS)
    _check_dtype(said["dtype"], place)
    _check_shape(said["shape"], place)
    _check_sha256(said["sha256"], place)
    return StoredTensor(name=name, dtype=said["dtype"], shape=tuple(said["shape"]), sha256=said["sha256"])


def _record(value: Any, place: str, keys: frozenset[str]) -> dict[str, Any]:
    found = set(_kind(value, dict, place))
    rule = f"{place} must have {', '.join(sorted(keys))} and nothing else"
    _need(found == keys, rule, {"absent": sorted(keys - found), "added": sorted(found - keys)})
    return dict(value)


def _kind(value: Any, kind: type[dict[str, Any]] | type[list[Any]] | type[str], place: str) -> Any:
    name = "an object" if kind is dict else "a list" if kind is list else "text"
    _need(isinstance(value, kind), f"{place} must be {name}", value)
    return value


def _texts(value: Any, place: str) -> dict[str, str]:
    return {key: _kind(text, str, f"{place} {shown(key)}") for key, text in _kind(value, dict, place).items()}


def _check_count(value: Any, rule: str) -> None:
    _need(type(value) is int and value >= 0, rule, value)


def _check_dtype(value: Any, place: str) -> None:
    _need(isinstance(value, str) and value in DTYPES, f"{place} must have a dtype of an artifact", value)


def _check_shape(value: Any, place: str) -> None:
    holds = isinstance(value, list) and all(type(length) is int and 0 <= length < 2**63 for length in value)
    _need(holds, f"{place} must have a shape", value)


def _check_sha256(value: Any, place: str) -> None:
    holds = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    _need(holds, f"{place} must have a SHA-256 in hex", value)


def _unnamed(stored: StoredFile | StoredTensor) -> dict[str, Any]:
    return {key: value for key, value in vars(stored).items() if key != "name" and value is not None}


def _need(holds: object, rule: str, got: object) -> None:
    if not holds:
        raise damaged(rule, got=shown(got), where=MANIFEST)
