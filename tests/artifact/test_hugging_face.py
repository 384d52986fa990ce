"""An artifact may hold a Hugging Face folder; what could make a reader run or fetch something is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact import samples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from flyweight.artifact import _hugging_face
from flyweight.artifact.format import read, tensors, write
from flyweight.errors import ArtifactError

MANIFEST = dataclasses.replace(samples.MANIFEST, runtime="transformers", layouts={}, session={})
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["a"]}},
    },
}
TOKENIZER = {"model": {"vocab": {"auto_map": 0, "chat_template": 1}}}


def source(folder: Path, **files: Any) -> Path:
    """A folder of weights and the given JSON files."""
    folder.mkdir()
    save_file(samples.weights(), folder / "model.safetensors", {"format": "pt"})
    for name, content in {"config": CONFIG, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "best", source(tmp_path / "source", tokenizer=TOKENIZER), MANIFEST)
    return tmp_path / "best"


def refused(folder: Path, word: str) -> None:
    with pytest.raises(ArtifactError, match=word):
        read(folder)


def test_a_folder_comes_back(folder: Path) -> None:
    artifact = read(folder)
    assert artifact.manifest == MANIFEST
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(file.name for file in artifact.files) == names
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "manifest.json"])
    assert artifact.bytes == sum(path.stat().st_size for path in folder.iterdir())
    found = tensors(artifact)
    assert all(torch.equal(found[name], tensor) for name, tensor in samples.weights().items())
    assert json.loads((folder / "manifest.json").read_text())["flyweight_artifact"] == 4


def test_it_replaces_and_is_replaced(folder: Path, tmp_path: Path) -> None:
    write(folder, samples.source(tmp_path / "other"), samples.MANIFEST)
    assert read(folder).manifest.runtime == "onnxruntime"
    write(folder, source(tmp_path / "again", generation_config={"eos_token_id": 2}), MANIFEST)
    assert "generation_config.json" in {file.name for file in read(folder).files}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_every_byte_is_covered(name: str, folder: Path) -> None:
    raw = bytearray((folder / name).read_bytes())
    raw[-3] ^= 1
    (folder / name).write_bytes(raw)
    refused(folder, name.replace(".", r"\."))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_every_file_must_be_there(name: str, folder: Path) -> None:
    (folder / name).unlink()
    refused(folder, rf"must be there.*{name}")


@pytest.mark.parametrize(
    "name", ["modeling_llama.py", "chat_template.jinja", "pytorch_model.bin", "adapter_config.json"]
)
def test_no_other_file_is_taken(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).write_text("{}")
    refused(folder, "one file too many")
    wrong = source(tmp_path / "wrong")
    (wrong / name).write_text("{}")
    with pytest.raises(ArtifactError, match="one file too many"):
        write(tmp_path / "new", wrong, MANIFEST)


KEYS = (
    "auto_map", "custom_pipelines", "custom_generate", "chat_template", "transformers_weights", "attn_implementation",
    "_attn_implementation", "experts_implementation", "vocab_file", "tokenizer_file",
)  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", ["config", "generation_config", "tokenizer_config", "special_tokens_map"])
def test_what_names_code_or_files_is_refused(key: str, name: str, tmp_path: Path) -> None:
    wrong = {**CONFIG, "deep": [{"er": {key: {"AutoModel": "somebody/somewhere--modeling.Model"}}}]}
    with pytest.raises(ArtifactError, match=rf"must not name code.*{key}.*{name}\.json"):
        write(tmp_path / "best", source(tmp_path / "source", **{name: wrong}), MANIFEST)
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("key", KEYS)
def test_a_forger_s_digests_do_not_help(key: str, folder: Path) -> None:
    content = json.dumps({**CONFIG, key: "kernels-of/somebody"}).encode()
    (folder / "config.json").write_bytes(content)

    def forge(document: dict[str, Any]) -> None:
        document["files"]["config.json"] = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }

    samples.resign(folder, forge)
    refused(folder, f"must not name code.*{key}")


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ({"quant_method": "gptq"}, "of the method compressed-tensors"),
        ({"quant_method": "compressed-tensors", "transform_config": {}}, "of the method compressed-tensors"),
        ("compressed-tensors", "of the method compressed-tensors"),
    ],
)
def test_other_quantization_is_refused(said: Any, word: str, tmp_path: Path) -> None:
    wrong = source(tmp_path / "source", config={**CONFIG, "quantization_config": said})
    with pytest.raises(ArtifactError, match=word):
        write(tmp_path / "best", wrong, MANIFEST)


@pytest.mark.parametrize(
    "content", [b"[]", b'"text"', b'{"a": 1, "a": 2}', b'{"a": NaN}', b"\xff", b"", b"{" * 99]
)
def test_files_are_strict_objects(content: bytes) -> None:
    for name in ("config.json", "tokenizer.json"):
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            _hugging_face.check(name, content)


@pytest.mark.parametrize(
    "change",
    [
        lambda files: files.pop("config.json"),
        lambda files: files.update({"weights.safetensors": files.pop("model.safetensors")}),
        lambda files: files.update({"model.onnx": files["config.json"]}),
        lambda files: files.update({"model.gguf": files["config.json"]}),
    ],
)
def test_a_folder_stands_by_itself(change: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    samples.resign(folder, lambda document: change(document["files"]))
    refused(folder, "stands beside|holds all|must be there")


def test_an_older_format_has_no_such_files(folder: Path) -> None:
    samples.resign(folder, lambda document: document.update(flyweight_artifact=3))
    refused(folder, "have a later format")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=6), _VALUES, max_size=4), st.sampled_from(KEYS))
def test_a_key_is_found_wherever_it_stands(value: dict[str, Any], key: str) -> None:
    _hugging_face.check("config.json", json.dumps(value).encode())
    for wrong in ({key: value}, {**value, "more": [{"x": {key: 1}}]}):
        with pytest.raises(ArtifactError, match="must not name code"):
            _hugging_face.check("config.json", json.dumps(wrong).encode())
