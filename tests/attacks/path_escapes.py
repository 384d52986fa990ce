"""Attacks that try to make a reader open something outside of the artifact."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from artifact import samples
from attacks.attack import SECRET, Attack

ELSEWHERE = (
    "../SECRET",
    "../best/weights.safetensors",
    "a/../../SECRET",
    "./weights.safetensors",
    "./../SECRET",
    "weights.safetensors/",
    "weights.safetensors/../../SECRET",
    "/etc/passwd",
    "//etc/passwd",
    "/proc/self/environ",
    "/dev/zero",
    "..\\SECRET",
    "C:\\Windows\\win.ini",
    "\\\\server\\share\\SECRET",
    "file:///etc/passwd",
    "~/.ssh/id_ed25519",
    "%2e%2e/SECRET",
    "..%2fSECRET",
    "weights.safetensors\0",
    "../SECRET\0weights.safetensors",
    "",
    ".",
    "..",
    "Weights.safetensors",
    "weights.safetensors ",
    "\uff57eights.safetensors",
    "weights.safetensors\u200b",
    "*/_ORT_MEM_ADDR_/*",
    "manifest.json",
)


def _lists(name: str) -> Attack:
    def forge(folder: Path) -> None:
        entry = {"bytes": 6, "sha256": "0" * 64}
        samples.resign(folder, lambda document: document["files"].update({name: entry}))

    return Attack(f"the manifest lists {name!a}", forge, "lists weights.safetensors and model.onnx only")


def _refers(name: str) -> Attack:
    def forge(folder: Path) -> None:
        samples.replace_file(folder, "model.onnx", samples.graph(8, 64, name))

    return Attack(f"the graph's weights lie in {name!a}", forge, "must lie in weights.safetensors")


def _link(folder: Path, name: str, target: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(target)


def _hard_link(folder: Path) -> None:
    (folder.parent / "twin").hardlink_to(folder / "weights.safetensors")


def _pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def _socket(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    here = Path.cwd()
    os.chdir(folder)  # the name of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("model.onnx")
    finally:
        os.chdir(here)


def _folder_in_place(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()
    (folder / "weights.safetensors").mkdir()


def _linked_folder(folder: Path) -> None:
    folder.rename(folder.with_name("real"))
    folder.symlink_to("real")


def _only_linked_by_case(folder: Path) -> None:
    (folder / "MODEL.ONNX").write_bytes((folder / "model.onnx").read_bytes())


def _names_a_context(folder: Path) -> None:
    from onnx import helper

    model = samples.model(samples.external(*_extent(folder)))
    model.graph.node.append(
        helper.make_node("EPContext", ["x"], ["z"], domain="com.microsoft", ep_cache_context=f"../{SECRET}")
    )
    samples.replace_file(folder, "model.onnx", model.SerializeToString())


def _extent(folder: Path) -> tuple[int, int]:
    return samples.extent((folder / "weights.safetensors").read_bytes(), "layer.weight")


ATTACKS = (
    *(_lists(name) for name in ELSEWHERE if name != "manifest.json"),
    *(_refers(name) for name in ELSEWHERE),
    Attack("the manifest lists itself", _lists("manifest.json").forge, "lists weights.safetensors and"),
    Attack(
        "weights are a symbolic link to a secret",
        lambda at: _link(at, "weights.safetensors", f"../{SECRET}"),
        "got a symbolic link",
    ),
    Attack(
        "the manifest is a symbolic link to the environment",
        lambda at: _link(at, "manifest.json", "/proc/self/environ"),
        "got a symbolic link",
    ),
    Attack(
        "the graph is a symbolic link within the folder",
        lambda at: _link(at, "model.onnx", "weights.safetensors"),
        "got a symbolic link",
    ),
    Attack(
        "weights are a symbolic link to nothing",
        lambda at: _link(at, "weights.safetensors", "nothing"),
        "got a symbolic link",
    ),
    Attack("the folder is a symbolic link", _linked_folder, "got a symbolic link"),
    Attack("weights are a hard link", _hard_link, "got 2 hard links"),
    Attack("the manifest is a pipe", lambda at: _pipe(at, "manifest.json"), "got a pipe"),
    Attack("weights are a pipe", lambda at: _pipe(at, "weights.safetensors"), "got a pipe"),
    Attack("the graph is a socket", _socket, "got a socket"),
    Attack("weights are a folder", _folder_in_place, "got a folder"),
    Attack("a name that differs by case", _only_linked_by_case, "one file too many"),
    Attack("a node of the graph names a file", _names_a_context, "must not name a file"),
)
