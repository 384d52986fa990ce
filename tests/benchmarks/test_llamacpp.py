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

from benchmarks import _llamacpp_model, _llamacpp_report  # noqa: E402  # they lie beside the package
from benchmarks import llamacpp as bench  # noqa: E402
from runtimes.talkers import talker, tokens  # noqa: E402

from flyweight import Task  # noqa: E402
from flyweight.inputs.check import run  # noqa: E402
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


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_0"])
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


def test_the_original_s_file_loses_nothing_but_half_precision(tmp_path: Path) -> None:
    given = task()
    _llamacpp_model.original(given.model.model, tmp_path / "F16.gguf")
    case = bench.Case(given, None, None, tmp_path)
    for _ in range(2):  # the second time the original's logits are read from the folder
        losses = bench._losses(case, Reader.open(tmp_path / "F16.gguf", 32))
        assert len(losses) == 2
        assert 0 <= max(losses) < 1e-5


def test_a_model_made_wider_by_zeros_computes_the_same() -> None:
    model = Logits(talker(tie_word_embeddings=True)).eval()
    wide = _llamacpp_model.padded(model)
    config = wide.model.config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (256, 32, 16)
    assert wide.model.lm_head.weight is wide.model.model.embed_tokens.weight
    wanted, found = run(model, tokens()), run(wide, tokens())
    assert (wanted - found).norm() < 1e-5 * wanted.norm()


def record(kl: float, decode: float | None = None, size: int = 100) -> dict[str, Any]:
    known: dict[str, Any] = {"bytes": size, "seconds": 1.0, "kl": [kl, kl]}
    return known if decode is None else known | {"decode": [decode] * 3, "prefill": [decode * 2] * 3}


def test_the_best_of_ours_is_compared_with_the_best_of_theirs() -> None:
    records = {
        "Q4_K, llama.cpp": record(0.4, 10.0),
        "Q4_K, llama.cpp, importance": record(0.2),
        "Q4_K, nearest": record(0.3),
        "Q4_K, error feedback": record(0.1, 11.0),
        "Q4_0, llama.cpp": record(0.4),
        "PyTorch, wide": {"decode": [5.0] * 3, "prefill": [5.0] * 3},
    }
    rows = list(_llamacpp_report.rows(records))
    assert [row.metric for row in rows][:2] == ["KL to the original, error feedback", "file"]
    assert (rows[0].ours, rows[0].ratio, rows[0].met) == (0.1, pytest.approx(0.5), True)
    speeds = {row.metric: row.ours for row in rows[2:]}
    assert speeds == {
        "decode, llama.cpp's own file = 1": pytest.approx(1.1), "decode, PyTorch = 1": pytest.approx(2.2),
        "prefill, llama.cpp's own file = 1": pytest.approx(1.1), "prefill, PyTorch = 1": pytest.approx(4.4),
    }  # fmt: skip
    lines = _llamacpp_report.table(records).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| Q4_K* | 0.0 | 0.4 [0.4, 0.4] | 0.2")
    assert "**0.50** | 1.10 [1.10, 1.10] |" in lines[2]


def test_speeds_are_compared_turn_by_turn() -> None:
    turns = np.array([1.0, 10.0, 100.0])
    assert _llamacpp_report.paired(list(2 * turns), list(turns)) == pytest.approx((2.0, 2.0, 2.0))


def test_an_interval_holds_the_mean_and_is_the_same_again() -> None:
    values = list(np.random.default_rng(1).exponential(size=40))
    low, high = _llamacpp_report.bootstrap(values)
    assert low < np.mean(values) < high
    assert high - low < np.std(values)
    assert _llamacpp_report.bootstrap(values) == (low, high)
