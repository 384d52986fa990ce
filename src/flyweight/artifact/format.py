"""The artifact: one folder that holds a model, says what it does, and how that was measured.

1. The folder holds two or three files and nothing else: `manifest.json`, `weights.safetensors` and, for
   runtimes that run ONNX, `model.onnx`; or `manifest.json` and, for llama.cpp, `model.gguf` (since format 2).
   In place of `weights.safetensors` there may be `weights.safetensors.gz` (since format 3). Or it holds, beside
   `manifest.json`, a Hugging Face folder (since format 4): `model.safetensors`, `config.json` and perhaps
   `generation_config.json`, `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`.
   The names are fixed; no name or path from a file is ever opened.
2. All files are regular, with one name each: no links, no pipes.
3. `manifest.json` is strict UTF-8 JSON of at most 1 MiB: no key twice, no NaN, at most 64 levels deep.
4. Its keys: flyweight_artifact (the format's number), task, runtime, session, plan, inputs, outputs, layouts,
   model_digest, measured, machine, versions, files, tensors, digest. None is absent, none is added.
5. `files` holds the bytes and the SHA-256 of every other file; `tensors` the dtype, the shape and the SHA-256
   of the bytes of every tensor. A compressed file's entry also has `unpacked`, the bytes that it unpacks to.
6. Its last line is `"digest": "..."}`: the SHA-256, in hex, of all bytes before that line. This holds for
   every format to come: `sed '$d' manifest.json | sha256sum` checks any of them.
7. The digests show accidents, not attacks: who changes a file can change its digest. They are for integrity,
   not authenticity. To be sure whose artifact it is, compare `digest` with one that came another way.
8. `weights.safetensors` is a safetensors file: 8 bytes length, a JSON header of at most 1 MiB, and a buffer
   that at most 100,000 tensors fill one behind the other, without holes or overlaps. Whole-byte dtypes only.
9. `model.onnx` holds the graph, at most 64 MiB. Weights are stored once: its external data has the location
   `weights.safetensors`, and an offset and a length that lie within that file's buffer.
10. `weights.safetensors.gz` is one gzip member (RFC 1952) without a name, a comment or a time, and nothing after it,
    that unpacks to `weights.safetensors` as above: `gunzip` makes the file beside which `model.onnx` runs. It unpacks
    to the bytes stated, at most 64 GiB, and at most 8 for each of its own, which no code of single bytes exceeds.
    A reader never unpacks more than is stated.
11. `model.gguf` holds weights and vocabulary, its head at most 64 MiB. Tensors lie one behind the other, filled
    up with zeros to multiples of 32 bytes. Packed integers are listed as uint8 rows. Entries that could name
    another file, and chat templates, which are programs, are refused.
12. `model.safetensors` is a file as in 8. The files beside it are strict JSON as in 3, at most 64 MiB each. What could
    name code, a kernel, a chat template or another file is refused (_hugging_face.py).
13. No code: nothing in an artifact names a class, a module or a function, and nothing else is compressed.
    `runtime`, `session`, and in a Hugging Face folder the kinds of model and tokenizer, are looked up in what this
    version of flyweight, and of transformers, knows.
14. A reader refuses a format newer than its own, and says so; it reads all older ones.
15. A writer puts the folder in its place whole: whoever looks sees the old one or the new one (atomic.py).
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from flyweight._faults import point
from flyweight.artifact import _gguf, _gzip, _hugging_face, _onnx, _weights
from flyweight.artifact._files import (
    Sink,
    check_size,
    disk_errors,
    is_there,
    names_in,
    opened,
    opened_folder,
    passed,
)
from flyweight.artifact._strict import damaged, shown
from flyweight.artifact.atomic import recover, replace_folder, synced_file, write_file
from flyweight.artifact.manifest import (
    GGUF,
    MANIFEST,
    MAX_MANIFEST,
    ONNX,
    PACKED,
    WEIGHTS,
    StoredFile,
    StoredTensor,
    decode,
    encode,
)
from flyweight.artifact.manifest import Manifest as Manifest
from flyweight.artifact.manifest import TensorSpec as TensorSpec
from flyweight.errors import ArtifactError, UsageError
from flyweight.runtimes._files import BESIDE, MODEL

_HEADERS: Mapping[str, _weights.Header] = MappingProxyType(
    {
        WEIGHTS: _weights.read_header,
        MODEL: functools.partial(_weights.read_header, file=MODEL),
        GGUF: _gguf.read_header,
    }
)


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """An artifact that was read and verified."""

    folder: Path
    manifest: Manifest
    bytes: int
    """Of all its files together."""
    files: tuple[StoredFile, ...]
    tensors: tuple[StoredTensor, ...]
    digest: str
    """The manifest's, which covers all else: equal digests, equal artifacts."""
    notes: tuple[str, ...]
    """Checks that could not be made on this machine."""


def write(folder: Path, source: Path, manifest: Manifest) -> int:
    """Make `folder` an artifact of the files in `source`, replacing the one that is there; its bytes in all.

    `source` holds weights.safetensors and perhaps model.onnx, or model.gguf, or a Hugging Face folder; where it also holds
    the compressed weights, those are taken and the plain ones are left. Whenever the process is killed, `folder` is
    whole: the old one or the new one. Raises ArtifactError when a reader would refuse the files, UsageError
    when `folder` is there and is no artifact, MachineError when the disk does not take it.
    """
    folder = folder.absolute()
    with disk_errors(source), opened_folder(source) as root:
        names = names_in(root)
    if MANIFEST in names:
        raise damaged("the writer makes the manifest", got="one in the source", where=shown(str(source), 300))
    if GGUF in names and len(names) > 1:
        raise damaged(
            f"{GGUF} holds all that a model needs", got=", ".join(names), where=shown(str(source), 300)
        )
    check_replaceable(folder)
    return replace_folder(folder, lambda part: _fill(part, source, names, manifest))


def read(folder: Path) -> Artifact:
    """Verify an artifact to its last byte.

    Raises ArtifactError that names the file and the tensor when anything is not as the format says,
    MachineError when the folder is not there or cannot be read.
    """
    folder = folder.absolute()
    with disk_errors(folder):
        while True:
            try:
                with opened_folder(folder) as root:
                    return _verified(folder, root)
            except FileNotFoundError:
                if not recover(folder):
                    raise


def tensors(artifact: Artifact) -> dict[str, torch.Tensor]:
    """The weights, each in memory of its own, shapes as in artifact.tensors; verified again as they are read.

    Raises ArtifactError when they changed since the artifact was read.
    """
    files = {file.name: file for file in artifact.files}
    name = _holder(files)
    with (
        disk_errors(artifact.folder),
        opened_folder(artifact.folder) as root,
        opened(root, name) as (stream, size),
    ):
        unpacked = files[name].unpacked
        if unpacked is not None:
            return _gzip.load(stream, unpacked, artifact.tensors)
        return _weights.load(stream, size, artifact.tensors, _HEADERS[name])


@contextmanager
def runnable(artifact: Artifact) -> Iterator[Path]:
    """A folder whose files a runtime can open: the artifact's own, or one for its unpacked weights that goes at the end.

    What is unpacked is verified on the way; nobody else can read it. Raises ArtifactError when the artifact changed since
    it was read, MachineError when the disk for temporary files does not take it.
    """
    files = {file.name: file for file in artifact.files}
    if PACKED not in files:
        yield artifact.folder
        return
    with tempfile.TemporaryDirectory(prefix="flyweight-") as place:
        with disk_errors(Path(place)), opened_folder(artifact.folder) as root:
            _unpack(root, files, artifact.tensors, Path(place))
        yield Path(place)


def _verified(folder: Path, root: int) -> Artifact:
    try:
        return _artifact(folder, root)
    except ArtifactError as error:
        if not (is_there(folder) and os.path.samestat(os.lstat(folder), os.fstat(root))):
            # Replaced while it was read, so that its files were going: the new one counts.
            raise FileNotFoundError from error
        raise error.at(f"{shown(str(folder), 300)}: {error.where}") from error


def _artifact(folder: Path, root: int) -> Artifact:
    names = names_in(root)
    raw = _content(root, MANIFEST, MAX_MANIFEST)
    said = decode(raw)
    _check_names(names, [MANIFEST, *(file.name for file in said.files)])
    files = {file.name: file for file in said.files}
    holder = _holder(files)
    scan = _scanned(root, files[holder], said.tensors, ())
    checked = ONNX not in files or _onnx.check(_graph(root, files[ONNX]), scan.buffer)
    for name in sorted(files.keys() & set(BESIDE)):
        _hugging_face.check(name, _verified_content(root, files[name], _hugging_face.MAX_JSON))
    return Artifact(
        folder=folder,
        manifest=said.manifest,
        bytes=len(raw) + sum(file.bytes for file in said.files),
        files=said.files,
        tensors=scan.tensors,
        digest=said.digest,
        notes=() if checked else (_onnx.NOT_CHECKED,),
    )


def _holder(names: Iterable[str]) -> str:
    """The file that holds the tensors."""
    present = set(names)
    return next((name for name in (GGUF, PACKED, MODEL) if name in present), WEIGHTS)


def _scanned(
    root: int, file: StoredFile, expected: Sequence[StoredTensor], sinks: Sequence[Sink]
) -> _weights.Scan:
    """The file of tensors, verified; what it holds, unpacked, goes to the sinks."""
    with opened(root, file.name) as (stream, size):
        _check_bytes(file, size)
        if file.unpacked is None:
            scan = _weights.scan(stream, size, sinks, _HEADERS[file.name])
        else:
            scan = _gzip.scan(stream, file.unpacked, (), sinks)
    _weights.check_same(scan.tensors, expected, file.name)
    _check_digest(file, scan.sha256)
    return scan


def _graph(root: int, file: StoredFile) -> bytes:
    return _verified_content(root, file, _onnx.MAX_ONNX)


def _verified_content(root: int, file: StoredFile, limit: int) -> bytes:
    content = _content(root, file.name, limit)
    _check_bytes(file, len(content))
    _check_digest(file, hashlib.sha256(content).hexdigest())
    return content


def _unpack(
    root: int, files: Mapping[str, StoredFile], expected: Sequence[StoredTensor], place: Path
) -> None:
    """Put weights.safetensors in the folder `place`, and a copy of the graph, which looks for them beside it."""
    with (place / WEIGHTS).open("xb") as plain:
        _scanned(root, files[PACKED], expected, [plain.write])
    if ONNX in files:
        # No hard link: a file of an artifact must have one name, for all who read it meanwhile.
        (place / ONNX).write_bytes(_graph(root, files[ONNX]))


def _fill(part: Path, source: Path, names: Sequence[str], manifest: Manifest) -> int:
    with opened_folder(source) as root:
        holder = _holder(names)
        with opened(root, holder) as (stream, size), synced_file(part / holder) as append:
            unpacked = _gzip.length(stream, size) if holder == PACKED else None
            if unpacked is None:
                scan = _weights.scan(stream, size, [append], _HEADERS[holder])
            else:
                scan = _gzip.scan(stream, unpacked, [append], ())
        point("artifact:weights")
        files = [StoredFile(name=holder, bytes=size, sha256=scan.sha256, unpacked=unpacked)]
        if ONNX in names:
            content = _content(root, ONNX, _onnx.MAX_ONNX)
            _onnx.check(content, scan.buffer)
            write_file(part / ONNX, content)
            point("artifact:onnx")
            files.append(_stored(ONNX, content))
        for name in (one for one in names if one in BESIDE):
            content = _content(root, name, _hugging_face.MAX_JSON)
            _hugging_face.check(name, content)
            write_file(part / name, content)
            files.append(_stored(name, content))
    raw = encode(manifest, files, scan.tensors)
    write_file(part / MANIFEST, raw)
    point("artifact:manifest")
    return len(raw) + sum(file.bytes for file in files)


def _stored(name: str, content: bytes) -> StoredFile:
    return StoredFile(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _content(root: int, name: str, limit: int) -> bytes:
    content = io.BytesIO()
    with opened(root, name) as (stream, size):
        check_size(size, limit, name)
        passed(stream, size, [content.write], name)
    return content.getvalue()


def check_replaceable(folder: Path) -> None:
    """Raise UsageError when `folder` is there and is no artifact, MachineError when that cannot be seen."""
    folder = folder.absolute()
    with disk_errors(folder):
        try:
            with opened_folder(folder) as root:
                names_in(root)
        except FileNotFoundError:
            return
        except ArtifactError as error:
            raise UsageError(
                "an artifact takes the place of an artifact only",
                got=f"{error.got}, {error.where}",
                where=shown(str(folder), 300),
                way_out="choose another output folder",
            ) from error


def _check_names(present: Sequence[str], listed: Sequence[str]) -> None:
    for name in (_holder(listed), *listed):
        if name not in present:
            raise damaged("every file of an artifact must be there", got="no such file", where=name)
    for name in present:
        if name not in listed:
            raise damaged("the manifest must list every file", got="one more", where=name)


def _check_bytes(file: StoredFile, size: int) -> None:
    if size != file.bytes:
        raise damaged(f"the file must have {file.bytes} bytes", got=f"{size}", where=file.name)


def _check_digest(file: StoredFile, digest: str) -> None:
    if digest != file.sha256:
        rule = f"the file must have the digest {file.sha256[:16]}..."
        raise damaged(rule, got=f"{digest[:16]}...", where=file.name)
