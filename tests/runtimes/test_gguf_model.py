"""What a GGUF holds is the model: read by another reader, it computes the same; and by ours, the weights come back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runtimes.talkers import Wrapped, rounded, stored, talker, tokens
from torch import nn

from flyweight.codes import entropy, integer, palette
from flyweight.errors import ArtifactError, ModelError
from flyweight.inputs.check import run
from flyweight.runtimes._gguf_load import state
from flyweight.runtimes._gguf_model import causal, save
from flyweight.runtimes._layout import load_state
from flyweight.transforms import QuantizedLayer
from flyweight.transforms._int8 import int8

pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
FORMATS = [(8, 32, True), (8, None, True), (4, 32, True), (4, 32, False), (4, None, False)]


def opened(model: nn.Module, path: Path) -> Any:
    save(model, path)
    return gguf.GGUFReader(path)


def values(reader: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors as float32, decoded by the format's own package."""
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(tuple(t.shape)[::-1])
        for t in reader.tensors
    }


def neighbours(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a projection as llama.cpp wants them, one by one: 0, d/2, 1, d/2 + 1, ... of each head."""
    size = len(weight) // heads
    order = [
        h * size + i + half * size // 2 for h in range(heads) for i in range(size // 2) for half in (0, 1)
    ]
    return np.stack([weight[row] for row in order])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_weight_is_there_to_the_bit(family: str, tmp_path: Path) -> None:
    model = talker(family)
    found = values(opened(model, tmp_path / "m"))
    kept = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    assert len(found) == len(kept)
    assert np.array_equal(found["token_embd.weight"], kept["model.embed_tokens.weight"])
    assert np.array_equal(found["output.weight"], kept["lm_head.weight"])
    for block in range(2):
        theirs, ours = f"blk.{block}.", f"model.layers.{block}."
        assert np.array_equal(found[f"{theirs}ffn_down.weight"], kept[f"{ours}mlp.down_proj.weight"])
        assert np.array_equal(found[f"{theirs}attn_norm.weight"], kept[f"{ours}input_layernorm.weight"])
        for name, heads in (("q", 4), ("k", 2)):
            wanted = kept[f"{ours}self_attn.{name}_proj.weight"]
            wanted = neighbours(wanted, heads) if family == "llama" else wanted
            assert np.array_equal(found[f"{theirs}attn_{name}.weight"], wanted)
    if family == "qwen2":
        assert np.array_equal(found["blk.1.attn_q.bias"], kept["model.layers.1.self_attn.q_proj.bias"])


def test_the_metadata_describe_the_model(tmp_path: Path) -> None:
    reader = opened(talker(tie_word_embeddings=True, rms_norm_eps=1e-5, head_dim=32), tmp_path / "m")
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert said.pop("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert said == {
        "general.architecture": "llama", "general.quantization_version": 2, "llama.block_count": 2,
        "llama.context_length": 128, "llama.embedding_length": 64, "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.key_length": 32,
        "llama.attention.value_length": 32, "llama.rope.dimension_count": 32, "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 90, "tokenizer.ggml.model": "no_vocab",
    }  # fmt: skip
    assert "output.weight" not in values(reader)


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_our_integers_decode_to_our_weights(
    family: str, bits: int, group: int | None, symmetric: bool, tmp_path: Path
) -> None:
    model = rounded(talker(family), bits, group, symmetric)
    reader = opened(model, tmp_path / "m")
    kinds = {t.tensor_type.name for t in reader.tensors if t.name.startswith("blk") and "norm" not in t.name}
    assert kinds - {"F32"} == {{(8, True): "Q8_0", (4, True): "Q4_0", (4, False): "Q4_1"}[bits, symmetric]}
    found = values(reader)
    for name, path, heads in (("ffn_up", "mlp.up_proj", 0), ("attn_k", "self_attn.k_proj", 2)):
        layer = model.get_submodule(f"model.layers.1.{path}")
        wanted = layer.weight.detach().numpy()
        wanted = neighbours(wanted, heads) if heads and family == "llama" else wanted
        assert np.array_equal(found[f"blk.1.{name}.weight"], wanted)


def test_scales_finer_than_half_precision_are_rounded_and_nothing_else(tmp_path: Path) -> None:
    model = rounded(talker(), 4, scale="float32")
    found = values(opened(model, tmp_path / "m"))["blk.0.ffn_up.weight"]
    integers, grid = model.get_submodule("model.layers.0.mlp.up_proj").encoded()
    halves = grid.scales.half().float()
    assert not torch.equal(halves, grid.scales)
    assert np.array_equal(
        found, (integers.float().unflatten(1, (2, 32)) * halves[..., None]).flatten(1).numpy()
    )


def test_floats_are_halved_only_where_nothing_is_lost(tmp_path: Path) -> None:
    model = talker()
    with torch.no_grad():
        up = model.get_submodule("model.layers.0.mlp.up_proj").weight
        up.copy_(up.half().float())
    kinds = {t.name: t.tensor_type.name for t in opened(model, tmp_path / "m").tensors}
    assert kinds.pop("blk.0.ffn_up.weight") == "F16"
    assert set(kinds.values()) == {"F32"}


@pytest.mark.parametrize("rope", ["linear", "llama3"])
def test_stretched_rotary_embeddings(rope: str, tmp_path: Path) -> None:
    model = talker(rope=rope)
    found = values(opened(model, tmp_path / "m"))["rope_freqs.weight"]
    theta, inverse = model.config.rope_parameters["rope_theta"], model.model.rotary_emb.inv_freq
    for index, factor in enumerate(found):
        assert theta ** (-2 * index / 16) / factor == pytest.approx(float(inverse[index]), rel=1e-5)
    with pytest.raises(ModelError, match="llama models only"):
        save(talker("qwen2", rope), tmp_path / "n")


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_weights_come_back_into_the_model(
    family: str, bits: int, group: int | None, symmetric: bool, tmp_path: Path
) -> None:
    model = Wrapped(rounded(talker(family, tie_word_embeddings=True), bits, group, symmetric))
    reader = opened(model.language, tmp_path / "m")
    found = {t.name: torch.from_numpy(np.array(t.data).reshape(_rows(t))) for t in reader.tensors}
    other = Wrapped(rounded(talker(family, tie_word_embeddings=True), bits, group, symmetric))
    for name, tensor in other.state_dict().items():
        tensor.fill_(1 if name.endswith("scales") else 0)
    load_state(other, state(other, found), {})
    assert torch.equal(run(other, tokens()), run(model, tokens()))


def _rows(tensor: Any) -> tuple[int, ...]:
    shape = tuple(int(n) for n in tensor.shape)[::-1]
    return (*shape[:-1], -1)


@pytest.mark.parametrize("broken", ["absent", "floats", "other"])
def test_another_model_s_tensors_are_refused(broken: str, tmp_path: Path) -> None:
    model = rounded(talker(), 4)
    found = {t.name: torch.from_numpy(np.array(t.data)) for t in opened(model, tmp_path / "m").tensors}
    if broken == "absent":
        del found["blk.1.attn_q.weight"]
    elif broken == "floats":
        found["blk.1.attn_q.weight"] = torch.zeros(64, 64)
    wanted = nn.Linear(3, 3) if broken == "other" else model
    with pytest.raises(ArtifactError, match="the artifact must belong to the model"):
        state(wanted, found)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type must be",
        ),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(
    changes: dict[str, Any], word: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=word):
        save(talker(**changes), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    model = talker("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ModelError, match="layer_types must be full_attention"):
        save(model, tmp_path / "m")


def test_layers_that_no_type_holds_are_named(tmp_path: Path) -> None:
    def changed(layer: nn.Module) -> nn.Module:
        model = talker()
        model.model.layers[1].mlp.up_proj = layer
        return model

    linear = nn.Linear(64, 96, bias=False)
    static = int8(linear, "linear", reduced=False).static((0.1, 0), None)
    weight = linear.weight.detach()
    table = palette.fit(weight, palette.Options(bits=4))
    coded = QuantizedLayer(
        linear, "palette", palette.Options(bits=4), (table.nearest(weight), table), transposed=False
    )
    grid = entropy.fit(weight, entropy.Options())
    factored = QuantizedLayer(
        linear, "entropy", entropy.Options(), (grid.nearest(weight), grid), transposed=False
    )
    cases = (
        (stored(linear, integer.Options(bits=4, group=16)), "groups of 32"),
        (coded, "evenly spaced integers, got the code palette"),
        (factored, "evenly spaced integers, got the code entropy"),
        (static, "rounds activations in its own way, got static"),
        (nn.Sequential(linear), "must know every layer that has parameters"),
        (nn.Identity(), "got none for blk.1.ffn_up.weight"),
    )
    for layer, word in cases:
        with pytest.raises(ModelError, match=word) as caught:
            save(changed(layer), tmp_path / "m")
        assert "up_proj" in str(caught.value) or "ffn_up" in str(caught.value)
        assert not list(tmp_path.iterdir())


def test_only_language_models_are_taken() -> None:
    model = talker()
    assert causal(Wrapped(model)) is model
    assert causal(model) is model
    two = nn.ModuleList([talker(), talker()])
    for other in (nn.Linear(2, 2), model.get_submodule("model"), two):
        with pytest.raises(ModelError, match="llama or qwen2"):
            causal(other)


def test_a_quantized_embedding_that_is_tied_is_written_once(tmp_path: Path) -> None:
    model = talker(tie_word_embeddings=True)
    layer = stored(model.get_submodule("lm_head"), integer.Options(bits=8, group=32, scale="float16"))
    for head in (layer, copy.copy(layer)):
        model.model.embed_tokens, model.lm_head = layer, head
        found = {t.name: t.tensor_type.name for t in opened(model, tmp_path / "m").tensors}
        assert found["token_embd.weight"] == "Q8_0"
        assert "output.weight" not in found
    model.lm_head = copy.deepcopy(layer)
    assert "output.weight" in values(opened(model, tmp_path / "m"))


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS)
def test_a_tied_embedding_comes_back_into_both(
    bits: int, group: int | None, symmetric: bool, tmp_path: Path
) -> None:
    def tied(seed: int) -> nn.Module:
        model = talker(tie_word_embeddings=True)
        with torch.no_grad():
            model.lm_head.weight.mul_(seed)
        options = integer.Options(bits=bits, group=group, symmetric=symmetric, scale="float16")
        layer = stored(model.model.embed_tokens, options)
        model.model.embed_tokens, model.lm_head = layer, layer.beside(model.lm_head, rounding=True)
        return model

    model, other = tied(1), tied(2)
    reader = opened(model, tmp_path / "m")
    found = {t.name: torch.from_numpy(np.array(t.data).reshape(_rows(t))) for t in reader.tensors}
    assert "output.weight" not in found
    load_state(other, state(other, found), {})
    for path in ("model.embed_tokens", "lm_head"):
        wanted, back = (m.get_submodule(path).encoded() for m in (model, other))
        assert torch.equal(wanted[0], back[0])
        assert torch.equal(wanted[1].scales, back[1].scales)
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)


def test_a_tied_embedding_in_a_code_that_is_no_integers_is_refused_by_name(tmp_path: Path) -> None:
    model, options = talker(tie_word_embeddings=True), palette.Options(bits=4)
    weight = model.lm_head.weight.detach()
    table = palette.fit(weight, options)
    embedding = model.get_submodule("model.embed_tokens")
    layer = QuantizedLayer(embedding, "palette", options, (table.nearest(weight), table), transposed=False)
    model.model.embed_tokens, model.lm_head = layer, layer.beside(model.lm_head, rounding=True)
    with pytest.raises(ModelError, match="evenly spaced integers, got the code palette"):
        save(model, tmp_path / "m")


def test_quantized_layers_know_their_rows() -> None:
    model = rounded(talker(), 8)
    assert sum(isinstance(m, QuantizedLayer) for m in model.modules()) == 14
