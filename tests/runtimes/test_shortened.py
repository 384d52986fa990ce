"""Language models whose layers were dropped, as folders of transformers and as GGUFs: fewer layers, numbered anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flyweight import transforms
from flyweight.errors import ModelError
from flyweight.inputs.check import run
from flyweight.records import Plan, Step
from flyweight.runtimes import _gguf_model, _hugging_face
from flyweight.runtimes._layout import load_state
from flyweight.runtimes._shortened import shortened
from flyweight.transforms import Context

pytestmark = pytest.mark.usefixtures("one_thread")
transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BATCH = {"input_ids": torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))}


def built(kind: str = "Llama") -> nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, f"{kind}ForCausalLM")
    model = cls(cls.config_class(**SIZES)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def dropped(model: nn.Module, *paths: str) -> tuple[nn.Module, Plan]:
    context = Context(examples=[BATCH])
    plan = transforms.complete(model, Plan(tuple(Step("drop", path) for path in paths)), context)
    return transforms.apply(model, plan, [], context), plan


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_transformers_reads_a_folder_with_fewer_layers(tmp_path: Path, kind: str) -> None:
    model = built(kind)
    small, plan = dropped(model, "model.layers.1")
    _hugging_face.write(small, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["num_hidden_layers"] == 2
    assert model.config.num_hidden_layers == small.config.num_hidden_layers == 3
    loaded = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(tmp_path).eval()
    wanted, found = run(small, BATCH).logits, run(loaded, BATCH).logits
    assert torch.allclose(found, wanted, atol=1e-4)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in small.parameters())
    fresh = transforms.apply(built(kind), plan, [], Context(rebuilding=True))
    load_state(fresh, _hugging_face.state(fresh, load_file(tmp_path / "model.safetensors")), {})
    assert torch.equal(run(fresh, BATCH).logits, wanted)


def test_a_gguf_counts_the_layers_that_are_left() -> None:
    small, _ = dropped(built(), "model.layers.0")
    said, tensors = _gguf_model.contents(shortened(small)[0])
    assert said["llama.block_count"] == 2
    assert {name.split(".")[1] for name in (one.name for one in tensors) if name.startswith("blk.")} == {
        "0",
        "1",
    }


def test_what_a_config_cannot_say_is_refused(tmp_path: Path) -> None:
    small, _ = dropped(built(), "model.layers.1.mlp")
    with pytest.raises(ModelError, match="nothing of parts that are gone"):
        _hugging_face.write(small, tmp_path)
    same, names = shortened(built())
    assert (same.config.num_hidden_layers, names) == (3, {})
