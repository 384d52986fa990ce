"""Streamed models beside the same models changed in memory, and the answers to folders that cannot be streamed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from streaming.folders import SMALL, edited, files, other, sharded, small, text_in

from flyweight.analysis.sites import analyse
from flyweight.errors import ArtifactError, DataError, FlyweightError, MachineError, ModelError, UsageError
from flyweight.inputs.language_model import calibrating_windows, in_batches, language_task
from flyweight.records import Plan, Step
from flyweight.runtimes._compressed_tensors import unpacked
from flyweight.streaming import Options, stream
from flyweight.testing.faults import short_write
from flyweight.transforms import Context, QuantizedLayer, apply

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


def in_memory(folder: Path, text: Path, options: Options) -> torch.nn.Module:
    """The same change by the transforms, with the whole model in memory."""
    windows = {"window": options.window, "calibrating": options.windows}
    model = language_task(folder, text, judging=8, **windows).model
    examples = in_batches(calibrating_windows(folder, text, **windows))
    found = analyse(model, examples)
    plain: dict[str, Any] = {
        "bits": options.bits, "group": options.group, "symmetric": options.symmetric, "scale": "float16",
        "rounding": options.rounding,
    }  # fmt: skip
    sites = [site for site in found.sites if ".layers." in site.name or ".h." in site.name]
    plan = Plan(tuple(Step("weight_only", site.name, plain) for site in sites))
    return apply(model, plan, found.sites, Context(statistics=found.statistics, examples=examples))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"symmetric": False}, {"bits": 3, "group": None, "rounding": "nearest"}, {"rounding": "coordinate"},
    ],
    ids=str,
)  # fmt: skip
def test_a_streamed_model_is_the_one_changed_in_memory(tmp_path: Path, changes: dict[str, Any]) -> None:
    options = dataclasses.replace(SMALL, **changes)
    folder, text = sharded(tmp_path / "model"), text_in(tmp_path)
    done = stream(folder, text, tmp_path / "out", options)
    expected = in_memory(folder, text, options)
    stored, compared = tensors_of(tmp_path / "out"), 0
    for path, layer in expected.named_modules():
        if isinstance(layer, QuantizedLayer):
            integers, grid = layer.encoded()
            own, on = unpacked(path.removeprefix("model."), stored, grid, layer.columns)
            assert torch.equal(own, integers), path
            assert torch.equal(on.scales, grid.scales), path
            compared += 1
    assert compared == done.layers == 14
    assert (done.blocks, done.left, done.resumed) == (2, {}, 0)


def test_what_is_outside_the_blocks_stays_to_the_last_bit(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", tie_word_embeddings=False)
    stream(folder, text_in(tmp_path), tmp_path / "out", SMALL)
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    outside = [name for name in before if name in after]
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(outside)
    assert all(torch.equal(before[name], after[name]) for name in outside)
    assert not [name for name in before if name not in after and f"{name}_packed" not in after]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(after)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_folder_with_the_very_weights(tmp_path: Path, tied: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    folder, text = sharded(tmp_path / "model", tie_word_embeddings=tied), text_in(tmp_path)
    stream(folder, text, tmp_path / "out", SMALL)
    loaded, said = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32, local_files_only=True
    )
    assert not any(said.values()), said
    head = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert head == tied
    ids = calibrating_windows(folder, text, window=16, calibrating=2)
    with torch.no_grad():
        expected = in_memory(folder, text, SMALL)(ids)
        assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_16_bit_shards_are_read_as_floats_and_copied_as_they_are(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    for path in folder.glob("*.safetensors"):
        for name in load_file(path):
            edited(path, name, lambda tensor: tensor.bfloat16())
    text = text_in(tmp_path)
    stream(folder, text, tmp_path / "out", SMALL)
    after = tensors_of(tmp_path / "out")
    assert after["model.norm.weight"].dtype == torch.bfloat16
    layer = in_memory(folder, text, SMALL).get_submodule("model.model.layers.1.mlp.down_proj")
    assert isinstance(layer, QuantizedLayer)
    own, _ = unpacked("model.layers.1.mlp.down_proj", after, layer.encoded()[1], layer.columns)
    assert torch.equal(own, layer.encoded()[0])


def test_one_file_of_another_family_with_positions_and_biases_goes_through(tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=260, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    folder, text = other(tmp_path / "model", OPTForCausalLM(config)), text_in(tmp_path)
    done = stream(folder, text, tmp_path / "out", SMALL)
    assert (done.blocks, done.layers) == (2, 12)
    expected, stored = in_memory(folder, text, SMALL), tensors_of(tmp_path / "out")
    layer = expected.get_submodule("model.model.decoder.layers.1.fc2")
    assert isinstance(layer, QuantizedLayer)
    own, _ = unpacked("model.decoder.layers.1.fc2", stored, layer.encoded()[1], layer.columns)
    assert torch.equal(own, layer.encoded()[0])
    assert "model.decoder.layers.1.fc2.bias" in stored


def test_layers_that_do_not_fit_are_left_and_said(tmp_path: Path) -> None:
    folder = small(tmp_path / "model", intermediate_size=40)
    done = stream(folder, text_in(tmp_path), tmp_path / "out", SMALL)
    assert set(done.left) == {f"model.layers.{index}.mlp.down_proj" for index in range(2)}
    assert "group" in next(iter(done.left.values()))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(done.left) <= set(config["quantization_config"]["ignore"])


def test_a_finished_run_is_checked_and_left_as_it_is(tmp_path: Path) -> None:
    folder, text = small(tmp_path / "model"), text_in(tmp_path)
    first = stream(folder, text, tmp_path / "out", SMALL)
    before = files(tmp_path / "out")
    again = stream(folder, text, tmp_path / "out", SMALL, resume=True)
    assert files(tmp_path / "out") == before
    assert (again.resumed, again.layers, again.bytes_after) == (2, first.layers, first.bytes_after)


def test_a_run_goes_on_only_as_it_began(tmp_path: Path) -> None:
    folder, text, out = small(tmp_path / "model"), text_in(tmp_path), tmp_path / "out"
    stream(folder, text, out, SMALL)
    with pytest.raises(UsageError, match=r"another run .*--resume"):
        stream(folder, text, out, SMALL)
    with pytest.raises(UsageError, match="got another 'options'"):
        stream(folder, text, out, dataclasses.replace(SMALL, bits=3), resume=True)
    text.write_text(text.read_text()[::-1])
    with pytest.raises(UsageError, match="got another 'text'"):
        stream(folder, text, out, SMALL, resume=True)


def test_a_damaged_finished_shard_is_found(tmp_path: Path) -> None:
    folder, text, out = small(tmp_path / "model"), text_in(tmp_path), tmp_path / "out"
    stream(folder, text, out, SMALL)
    shard = out / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"as it was written.*model-00002"):
        stream(folder, text, out, SMALL, resume=True)


def a_cut_shard(folder: Path) -> None:
    path = folder / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def a_header_with_a_hole(folder: Path) -> None:
    path = folder / "model-1.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw + b"\0" * 8)


def no_shard(folder: Path) -> None:
    (folder / "model-0.safetensors").unlink()


def a_way_out_of_the_folder(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-1.", "../model-1."))


def no_tensor(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    del value["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index.write_text(json.dumps(value))
    edited(folder / "model-1.safetensors", "model.layers.1.mlp.up_proj.weight", lambda tensor: None)


def a_nan(folder: Path) -> None:
    edited(folder / "model-1.safetensors", "model.layers.1.mlp.up_proj.weight", lambda tensor: tensor / 0)


def another_shape(folder: Path) -> None:
    edited(
        folder / "model-1.safetensors",
        "model.layers.1.mlp.up_proj.weight",
        lambda tensor: tensor.T.contiguous(),
    )


def integers(folder: Path) -> None:
    edited(
        folder / "model-1.safetensors",
        "model.layers.1.mlp.up_proj.weight",
        lambda tensor: tensor.to(torch.int8),
    )


def quantized(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"bits": 4}}))


@pytest.mark.parametrize(
    ("harm", "kind", "words"),
    [
        (a_cut_shard, ArtifactError, "must fill the file.*model-1"),
        (a_header_with_a_hole, ArtifactError, "must fill the file.*model-1"),
        (no_shard, ArtifactError, "no such file.*model-0"),
        (a_way_out_of_the_folder, ArtifactError, "a shard is a safetensors file in the folder"),
        (no_tensor, ModelError, "1 missing, such as model.layers.1.mlp.up_proj.weight"),
        (a_nan, ModelError, "must be finite.*model-1.*up_proj"),
        (another_shape, ModelError, r"the shape \(64, 32\), got \(32, 64\)"),
        (integers, ModelError, "must be floats, got int8"),
        (quantized, ModelError, "must be floats, got quantized ones"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_model_gets_its_answer_before_anything_is_written(
    tmp_path: Path, harm: Callable[[Path], None], kind: type[FlyweightError], words: str
) -> None:
    folder, text = sharded(tmp_path / "model"), text_in(tmp_path)
    harm(folder)
    with pytest.raises(kind, match=words):
        stream(folder, text, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists() or files(tmp_path / "out") == {}


def test_tokens_beyond_the_model_are_told(tmp_path: Path) -> None:
    folder = small(tmp_path / "model", vocab_size=60)
    with pytest.raises(DataError, match="must be below 60"):
        stream(folder, text_in(tmp_path), tmp_path / "out", SMALL)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 7}, "bits must be one of"), ({"group": 48}, "group must be"), ({"rounding": "dice"}, "dice"),
        ({"windows": 1}, "calibrating must be"), ({"window": 4}, "window must be"),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_option_gets_its_answer(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        stream(
            small(tmp_path / "model"),
            text_in(tmp_path),
            tmp_path / "out",
            dataclasses.replace(SMALL, **changes),
        )


def test_the_output_must_be_its_own_folder(tmp_path: Path) -> None:
    folder, text = small(tmp_path / "model"), text_in(tmp_path)
    with pytest.raises(UsageError, match="another folder than the model's"):
        stream(folder, text, folder, SMALL)
    with pytest.raises(UsageError, match="new or empty, got model"):
        stream(folder, text, tmp_path, SMALL, resume=True)
    with pytest.raises(UsageError, match="must be a folder"):
        stream(folder, text, text, SMALL)


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(tmp_path: Path) -> None:
    folder, text = small(tmp_path / "model"), text_in(tmp_path)
    stream(folder, text, tmp_path / "whole", SMALL)
    most = max(path.stat().st_size for path in (tmp_path / "whole").glob("model-*.safetensors"))
    with short_write(most - 1), pytest.raises(MachineError, match="run again"):
        stream(folder, text, tmp_path / "out", SMALL)
    assert not list((tmp_path / "out").glob(".model*"))
    done = stream(folder, text, tmp_path / "out", SMALL, resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert done.blocks == 2
