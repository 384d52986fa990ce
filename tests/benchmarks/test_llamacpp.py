"""What the comparison with llama.cpp's own quantizer rests on: its files are its own, and figures say what they are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks import llamacpp as bench  # noqa: E402  # it lies beside the package
from runtimes.talkers import talker, tokens  # noqa: E402

from flyweight import Task  # noqa: E402
from flyweight.evaluation.generation import Speed  # noqa: E402
from flyweight.inputs.language_model import Judge, Logits  # noqa: E402
from flyweight.runtimes.llamacpp import Reader, available  # noqa: E402

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
missing = available()
pytestmark = [
    pytest.mark.skipif(missing is not None, reason=str(missing)), pytest.mark.usefixtures("one_thread"),
]  # fmt: skip


def task() -> Task:
    model = Logits(talker(tie_word_embeddings=True)).eval()
    windows = tokens(2, 24)
    return Task(name="talk", model=model, examples=[tokens(2, 24)], score=Judge(windows, windows[:, :4]))


def opened(path: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", bench.TYPES)
def test_llama_cpp_s_files_hold_the_model_in_the_types_that_it_takes(kind: str, tmp_path: Path) -> None:
    given, path = task(), tmp_path / "theirs.gguf"
    bench._theirs(given, kind, {}, path)
    found, state = opened(path), given.model.state_dict()
    assert found["token_embd.weight"].tensor_type.name == "Q8_0"
    assert "output.weight" not in found
    assert found["output_norm.weight"].tensor_type.name == "F32"
    for name, key, levels in (
        ("token_embd", "embed_tokens", 254),
        ("blk.1.ffn_up", "layers.1.mlp.up_proj", 0),
    ):
        tensor = found[f"{name}.weight"]
        assert levels or tensor.tensor_type.name == kind
        wanted = state[f"model.model.{key}.weight"].numpy()
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(wanted.shape)
        reach = np.abs(wanted).reshape(len(wanted), -1, 32).max(-1, keepdims=True)
        step = 2 * reach / (levels or {"Q8_0": 254, "Q4_1": 15, "Q4_0": 15}[kind])
        assert (np.abs(values - wanted).reshape(len(wanted), -1, 32) <= step * 1.01).all()


def test_an_importance_matrix_moves_the_error_away_from_what_counts(tmp_path: Path) -> None:
    given = task()
    weight = given.model.state_dict()["model.model.layers.0.mlp.up_proj.weight"].numpy()
    energy = torch.ones(64).index_fill(0, torch.arange(0, 64, 2), 100.0)
    errors = []
    for name, energies in (("plain", {}), ("with", {"model.model.layers.0.mlp.up_proj": energy})):
        bench._theirs(given, "Q4_0", energies, tmp_path / name)
        tensor = opened(tmp_path / name)["blk.0.ffn_up.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
        errors.append(float(((values - weight) ** 2)[:, ::2].sum()))
    assert errors[1] < errors[0]


def test_the_original_s_files_lose_nothing(tmp_path: Path) -> None:
    given = task()
    bench._original(given.model.model, tmp_path / "F32.gguf", bench._gguf.F32)
    reader = Reader.open(tmp_path / "F32.gguf", 32)
    losses = bench._losses(given, {"F32": reader})
    assert losses["F32"].shape == (2,)
    assert losses["F32"].max() < 1e-8


def test_speeds_are_compared_turn_by_turn() -> None:
    ours = [Speed(prefill=2.0 * turn, decode=3.0 * turn) for turn in (1.0, 10.0, 100.0)]
    theirs = [Speed(prefill=turn, decode=turn) for turn in (1.0, 10.0, 100.0)]
    assert bench._paired(ours, theirs, "prefill") == pytest.approx((2.0, 2.0, 2.0))
    assert bench._paired(ours, theirs, "decode") == pytest.approx((3.0, 3.0, 3.0))


def test_an_interval_holds_the_mean_and_is_the_same_again() -> None:
    values = np.random.default_rng(1).exponential(size=40)
    low, high = bench._bootstrap(values)
    assert low < values.mean() < high
    assert high - low < values.std()
    assert bench._bootstrap(values) == (low, high)
