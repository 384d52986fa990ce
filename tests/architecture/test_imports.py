"""Who may know whom: folders are layers, nothing goes in circles, optional packages stay optional."""

from __future__ import annotations

import graphlib
import os
import subprocess
import sys

import pytest
from architecture.source import ROOT, Module, imports, modules, outside

LAYERS = (
    "inputs", "analysis", "codes", "roundings", "transforms", "training", "runtimes", "evaluation", "planning", "search",
    "artifact", "report", "streaming",
)  # fmt: skip
BASE = {"records", "errors", "discover", "_faults"}
"""What every folder may import."""
TOP = {"session", "packing", "stages", "optimize", "cli", ""}
"""What stands on all folders; the root is the package itself."""
OPTIONAL = (
    "compressed_tensors", "gguf", "onnx", "onnxruntime", "onnxscript", "openvino", "transformers", "xllamacpp",
)  # fmt: skip
"""Packages that may be missing; none is imported before a runtime that needs it is asked to prepare a model."""


def test_each_folder_is_a_layer() -> None:
    folders = {module.folder for module in modules().values()} - {""}
    assert folders <= {*LAYERS, "testing"}
    assert {name for name, module in modules().items() if module.folder == ""} == BASE | TOP


@pytest.mark.parametrize("module", modules().values(), ids=lambda module: module.place)
def test_a_folder_imports_only_from_folders_above_it(module: Module) -> None:
    assert [
        f"{module.place}:{line} imports {name}" for name, line in imports(module) if not allowed(module, name)
    ] == []


def allowed(module: Module, name: str) -> bool:
    """Whether the module may import that one."""
    if module.name in TOP or module.folder == "testing" or name in BASE:
        return name.partition(".")[0] != "testing" or module.folder == "testing"
    folder = name.partition(".")[0]
    if module.name in BASE or folder not in LAYERS:
        return False
    return LAYERS.index(folder) <= LAYERS.index(module.folder)


def test_the_rule_finds_what_is_wrong() -> None:
    known = modules()
    assert not allowed(known["analysis.sites"], "search.study")
    assert not allowed(known["evaluation.bench"], "session")
    assert not allowed(known["errors"], "inputs.check")
    assert not allowed(known["cli"], "testing.zoo")
    assert allowed(known["search.hunt"], "planning.choose")


def test_no_imports_go_in_circles() -> None:
    graph = {
        name: {other for other, _ in imports(module) if other != name} for name, module in modules().items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError that names the circle


@pytest.mark.parametrize("package", OPTIONAL)
def test_an_optional_package_is_imported_in_its_own_place_and_late(package: str) -> None:
    for module in modules().values():
        helper = module.folder == "runtimes" and module.path.stem.startswith(
            "_"
        )  # itself imported late: see below
        assert helper or package not in {name for name, _ in outside(module, top=True)}, module.place
        if package in {name for name, _ in outside(module, top=False)}:
            reader = package == "transformers" and module.name == "inputs.language_model"
            assert reader or module.folder in ("runtimes", "artifact", "testing"), module.place


def test_the_package_works_without_optional_packages() -> None:
    code = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(OPTIONAL)}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
import flyweight, flyweight.cli, flyweight.session
from flyweight import discover
for folder in ("transforms", "runtimes"):
    assert discover.methods(folder)
assert not set({sorted(OPTIONAL)!r}) & set(sys.modules)
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
