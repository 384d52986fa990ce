"""Configs that say the widths of pruned language models: transformers reads the folder and gives the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from runtimes.talkers import rounded, talker, tokens
from torch import nn

from flyweight.analysis.coupling import Group, couple
from flyweight.errors import ModelError
from flyweight.runtimes import _hugging_face
from flyweight.transforms._removal import proven, removed


def cut(model: nn.Module, kinds: Sequence[str], layers: str = "") -> nn.Module:
    """Half of the units of all groups of some kinds gone, of those alone whose names hold `layers`."""
    batch = {"input_ids": tokens()}
    coupling = proven(model, couple(model, batch), batch)
    chosen: list[Group] = [group for group in coupling.groups if group.kind in kinds and layers in group.name]
    assert chosen
    return removed(model, chosen, {group.name: range(1, group.units, 2) for group in chosen}).eval()


def read_back(model: nn.Module, folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    _hugging_face.write(model, folder)
    found: nn.Module = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    return found


@pytest.mark.parametrize(
    ("kinds", "sizes"),
    [
        (["neurons"], {"intermediate_size": 48}),
        (["heads"], {"num_attention_heads": 1, "num_key_value_heads": 1}),
        (["heads", "neurons"], {"intermediate_size": 48, "num_attention_heads": 1, "num_key_value_heads": 1}),
    ],
)
def test_a_narrower_model_is_read_by_transformers(kinds, sizes, tmp_path: Path) -> None:
    small = cut(talker(), kinds)
    found = read_back(small, tmp_path)
    assert {name: getattr(found.config, name) for name in sizes} == sizes
    with torch.no_grad():
        assert torch.allclose(found(tokens()).logits, small(tokens()).logits, atol=1e-5)


def test_heads_are_told_from_their_channels_by_the_answers(tmp_path: Path) -> None:
    small = cut(talker(num_key_value_heads=4), ["heads"])
    found = read_back(small, tmp_path)
    assert (found.config.num_attention_heads, found.config.head_dim) == (2, 16)
    with torch.no_grad():
        assert torch.allclose(found(tokens()).logits, small(tokens()).logits, atol=1e-5)


def test_a_narrower_model_may_be_quantized(tmp_path: Path) -> None:
    found = read_back(rounded(cut(talker(), ["neurons"]), 4, 16), tmp_path)
    assert found.config.intermediate_size == 48


def test_layers_of_different_widths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="widths of all layers") as raised:
        _hugging_face.write(cut(talker(), ["neurons"], "layers.1."), tmp_path)
    assert "layers.1.mlp" in raised.value.where


def test_a_model_of_its_old_widths_keeps_its_config(tmp_path: Path) -> None:
    model = talker()
    assert read_back(model, tmp_path).config.intermediate_size == model.config.intermediate_size
