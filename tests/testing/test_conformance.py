"""Every transform and runtime keeps its contract; and the suite notices those that do not."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flyweight import discover
from flyweight.artifact import format as spec
from flyweight.inputs.check import run
from flyweight.runtimes import _structure
from flyweight.testing import _runtime_checks
from flyweight.testing.conformance import check_runtime, check_transform, failures
from flyweight.testing.zoo import ZOO, Zoo, missing
from flyweight.transforms import weight_only

SOME = (
    "tied_embedding", "called_twice", "tuple_input", "depthwise_conv", "conv1d", "recommender", "attention", "one_row",
    "shared_buffer", "forgotten_eval", "bfloat16", "zero_channel", "residual_conv", "layer_norm",
)  # fmt: skip
FEW = ("called_twice", "conv_norm")
"""Exporting takes seconds a model, so that the whole zoo is for the long run."""


pytestmark = pytest.mark.usefixtures("one_thread")


def some(*names: str) -> list[Zoo]:
    return [entry for entry in ZOO if entry.name in names]


@pytest.mark.parametrize("name", discover.methods("transforms"))
def test_transforms(name: str) -> None:
    cells = list(check_transform(name, some(*SOME)))
    assert not failures(cells)
    assert sum(cell.state == "passed" for cell in cells) > 30


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", discover.methods("transforms"))
def test_transforms_on_the_whole_zoo(name: str, figure: Callable[[int, str], None]) -> None:
    cells = list(check_transform(name))
    assert not failures(cells)
    figure(17, f"{name}: {counted(cells)}")


@pytest.mark.parametrize("name", [name for name in discover.methods("runtimes") if name != "torch_compile"])
def test_runtimes(name: str) -> None:
    assert not failures(check_runtime(name, some(*FEW)))


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [name for name in discover.methods("runtimes") if name != "torch_compile"])
def test_runtimes_on_the_whole_zoo(name: str, figure: Callable[[int, str], None]) -> None:
    cells = list(check_runtime(name))
    assert not failures(cells)
    figure(17, f"{name}: {counted(cells)}")


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_compiled_pytorch() -> None:
    assert not failures(check_runtime("torch_compile", some("mlp", "conv_norm")))


def counted(cells: Sequence[Any]) -> str:
    found = Counter(cell.state for cell in cells)
    return ", ".join(f"{found[state]} {state}" for state in ("passed", "failed", "not applicable"))


RELOAD = """
import sys, torch, flyweight
from safetensors.torch import save_file
from flyweight.inputs.check import run
from flyweight.runtimes import _structure
from flyweight.testing.zoo import ZOO
folder, name, out = sys.argv[1:]
entry = next(entry for entry in ZOO if entry.name == name)
batch = entry.examples()[0]
outputs = flyweight.load(folder)(batch), run(flyweight.load(folder, entry.build()), batch)
leaves = map(_structure.leaves, outputs)
save_file({f"{i} {j}": t.clone() for i, found in enumerate(leaves) for j, t in enumerate(found)}, out)
"""


@pytest.mark.parametrize("name", ["conv_norm", pytest.param("tiny_bert", marks=pytest.mark.heavy)])
def test_an_artifact_gives_the_same_in_a_new_process(name: str, tmp_path: Path) -> None:
    entry = some(name)[0]
    if missing(entry) or discover.method("runtimes", "onnxruntime").available():
        pytest.skip("a package is missing")
    plans = [case for case in _runtime_checks.plans("onnxruntime", entry) if not isinstance(case, str)]
    with _runtime_checks.prepared("onnxruntime", plans[-1]) as running:
        spec.write(tmp_path / "best", running.predictor.files[0].parent, _runtime_checks.manifest(running))
        command = [sys.executable, "-c", RELOAD, str(tmp_path / "best"), name, str(tmp_path / "out")]
        subprocess.run(command, check=True, timeout=200)
        found, batch = load_file(tmp_path / "out"), running.case.examples[0]
        for index, wanted in enumerate((running.predictor(batch), run(running.twin, batch))):
            for number, leaf in enumerate(_structure.leaves(wanted)):
                assert torch.equal(found[f"{index} {number}"], leaf)


def changes_the_model(model: nn.Module, site: Any, options: Any, context: Any) -> Any:
    with torch.no_grad():
        model.get_submodule(site.name).weight.mul_(2)
    return weight_only.replace(model, site, options, context)


def shares(model: nn.Module, site: Any, options: Any, context: Any) -> Any:
    return {site.name: model.get_submodule(site.name)}


def is_random(model: nn.Module, site: Any, options: Any, context: Any) -> Any:
    layer = weight_only.replace(model, site, options, context)[site.name]
    layer.scales.mul_(1 + 1e-3 * torch.rand(()))
    return {site.name: layer}


def is_wrong(model: nn.Module, site: Any, options: Any, context: Any) -> Any:
    layer = weight_only.replace(model, site, options, context)[site.name]
    layer.scales.mul_(3)
    return {site.name: layer}


def is_not_finite(model: nn.Module, site: Any, options: Any, context: Any) -> Any:
    layer = weight_only.replace(model, site, options, context)[site.name]
    layer.scales.fill_(float("nan"))
    return {site.name: layer}


def grows(model: nn.Module, site: Any, options: Any, context: Any) -> Any:
    layer = weight_only.replace(model, site, options, context)[site.name]
    layer.register_buffer("ballast", torch.zeros(1000))
    return {site.name: layer}


def fails(model: nn.Module, site: Any, options: Any, context: Any) -> Any:
    raise KeyError("nothing")


@dataclass(frozen=True, kw_only=True)
class Unchecked:
    """Options that take anything."""

    strength: int = 1


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"replace": is_random}, "deterministic"),
        ({"replace": is_random}, "input_untouched"),
        ({"replace": is_wrong}, "finite_and_close"),
        ({"replace": is_not_finite}, "finite_and_close"),
        ({"replace": grows}, "honest_size"),
        ({"replace": fails}, "output_form"),
        ({"refuse": lambda *_: None}, "twice"),
        ({"Options": Unchecked, "levels": lambda _: (Unchecked(),), "refuse": lambda *_: None, "replace": shares},
         "options_checked"),
    ],
)  # fmt: skip
def test_a_transform_that_breaks_its_promise_is_found(
    changes: dict[str, Any], check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = SimpleNamespace(**{**vars(weight_only), **changes})
    if "Options" in changes:
        del bad.read
    known = MappingProxyType({**discover.methods("transforms"), "bad": bad})
    real = discover.methods
    monkeypatch.setattr(discover, "methods", lambda folder: known if folder == "transforms" else real(folder))
    cells = list(check_transform("bad", some("mlp")))
    assert any(cell.name == check and cell.state == "failed" for cell in cells), list(map(str, cells))
    assert failures(cells)


def test_an_expected_failure_that_passes_is_a_failure() -> None:
    cells = list(check_transform("weight_only", some("no_parameters")))
    assert not failures(cells)
    assert failures(cells, {"mlp deterministic": "a reason"}) == [
        "mlp deterministic passes, though it was expected to fail: a reason"
    ]
