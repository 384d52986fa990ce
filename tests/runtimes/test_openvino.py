"""OpenVINO reads the same files and gives the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from runtimes import nets

from flyweight.inputs.check import run
from flyweight.records import Step
from flyweight.runtimes import openvino as runtime

pytest.importorskip("openvino")


@pytest.mark.parametrize(("method", "tolerance"), [("weight_only", 1e-5), ("static_int8", 3e-2)])
def test_pictures_and_texts(method: str, tolerance: float, tmp_path: Path) -> None:
    for name, model, examples, folds in (
        ("texts", nets.words(), nets.TEXTS, ()), ("pictures", nets.pictures(), nets.IMAGES, nets.FOLDS),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        twin = nets.changed(model, examples, method, folds=folds)
        predict = nets.prepared("openvino", twin, examples, tmp_path / name)
        for batch in examples:
            wanted, found = run(twin, batch), predict(batch)
            if name == "texts":
                wanted, found = wanted.logits, found.logits
            assert nets.gap(wanted, found) < tolerance


def test_dynamic_plans_are_refused() -> None:
    assert "slower" in str(runtime.refuse([Step("dynamic_int8", "a")]))
    assert "float inputs" in str(runtime.refuse([Step("block_int8", "a"), Step("weight_only", "b")]))
    assert runtime.refuse([Step("weight_only", "a"), Step("static_int8", "b")]) is None
