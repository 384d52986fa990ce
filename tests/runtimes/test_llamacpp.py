"""An unmodified llama.cpp reads our file and computes the model's own logits."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from runtimes.nets import gap
from runtimes.talkers import TEXT, Wrapped, rounded, talker, tokens, words
from torch import nn

from flyweight.artifact.format import Manifest, TensorSpec, read, write
from flyweight.artifact.load import load_module, load_predictor
from flyweight.errors import DataError, ModelError
from flyweight.evaluation import generation
from flyweight.evaluation.memory import peak_memory
from flyweight.inputs.check import run
from flyweight.records import Plan, Step
from flyweight.runtimes import llamacpp as runtime
from flyweight.runtimes._gguf_model import save

pytest.importorskip("transformers")
missing = runtime.available()
installed = pytest.mark.skipif(missing is not None, reason=str(missing))
EXAMPLES = [tokens(2, 9), tokens(1, 5)]
FORMATS = [(8, 32, True, "Q8_0"), (4, 32, True, "Q4_0"), (4, 32, False, "Q4_1"), (8, None, True, "Q8_0")]


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "flyweight[llamacpp]" in str(runtime.available())


def test_rounded_activations_are_refused() -> None:
    for method in ("block_int8", "dynamic_int8"):
        assert "activations" in str(runtime.refuse([Step(method, "a")]))
    assert "activations" in str(runtime.refuse([Step("static_int8", "a"), Step("weight_only", "b")]))
    assert runtime.refuse([Step("weight_only", "a")]) is None


def test_codes_that_a_gguf_has_no_type_for_are_refused_before_anything_is_built() -> None:
    steps = [Step("weight_only", "a"), Step("weight_only", "b", {"code": "entropy"})]
    assert "the code entropy" in str(runtime.refuse(steps))


@pytest.mark.parametrize("options", [{"bits": 3, "group": 32}, {"bits": 6}, {"code": "ternary"}])
def test_what_a_gguf_would_hold_in_more_bits_is_refused(options: dict[str, Any]) -> None:
    steps = [Step("weight_only", "a"), Step("weight_only", "b", options)]
    assert "no type as small as" in str(runtime.refuse(steps))
    assert runtime.refuse([Step("weight_only", "a", {"code": "super_block", "bits": 3})]) is None


@pytest.mark.parametrize(
    ("model", "batch", "word"),
    [
        (lambda: nn.Linear(2, 2), torch.zeros(1, 2), "causal language models of Hugging Face"),
        (lambda: Wrapped(talker(), 0.5), tokens(), "must be its logits"),
        (lambda: Wrapped(talker()), {"input_ids": tokens(), "other": tokens()}, "a batch is tokens"),
        (lambda: Wrapped(talker()), {"attention_mask": tokens()}, "a batch is tokens"),
        (lambda: Wrapped(talker()), torch.zeros(2, 3), "a batch is tokens"),
        (lambda: Wrapped(talker()), tokens()[0], "a batch is tokens"),
    ],
)
def test_what_is_no_language_model_is_refused(model: Any, batch: Any, word: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=word):
        runtime.prepare(model(), [batch], tmp_path)
    assert not list(tmp_path.iterdir())


@installed
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}), ("llama", {"tie_word_embeddings": True}), ("llama", {"rope": "linear"}), ("llama", {"rope": "llama3"}),
        ("llama", {"attention_bias": True}), ("llama", {"head_dim": 32}), ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
)  # fmt: skip
def test_floats_give_the_model_s_logits(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = talker(family, **changes)
    predict = runtime.prepare(model, EXAMPLES, tmp_path)
    for batch in EXAMPLES:
        wanted, found = run(model, batch), predict(batch)
        assert type(found) is type(wanted)
        assert found.logits.dtype == torch.float32
        assert gap(wanted.logits, found.logits) < 2e-5
    assert predict.bytes == (tmp_path / "model.gguf").stat().st_size


@installed
@pytest.mark.parametrize(("bits", "group", "symmetric", "name"), FORMATS)
def test_integers_give_the_model_s_logits(
    bits: int, group: int | None, symmetric: bool, name: str, tmp_path: Path
) -> None:
    original = Wrapped(talker())
    model = Wrapped(rounded(original.language, bits, group, symmetric))
    found = runtime.prepare(model, EXAMPLES, tmp_path)(EXAMPLES[0])
    wanted = run(model, EXAMPLES[0])
    # llama.cpp rounds activations to 8 bits in blocks of 32.
    assert gap(wanted, found) < 2e-2
    assert bits == 8 or gap(wanted, found) < gap(run(original, EXAMPLES[0]), found) / 2


@installed
def test_masks_of_ones_pass_and_padding_does_not(tmp_path: Path) -> None:
    model = Wrapped(talker())
    ones = torch.ones(2, 9, dtype=torch.long)
    predict = runtime.prepare(model, [{"input_ids": tokens(), "attention_mask": ones}], tmp_path)
    found = predict({"attention_mask": ones, "input_ids": tokens()})
    assert gap(run(model, tokens()), found) < 2e-5
    with pytest.raises(DataError, match="without padding"):
        predict({"input_ids": tokens(), "attention_mask": ones.index_fill(1, torch.tensor([0]), 0)})


@installed
def test_tokens_that_are_none_are_refused(tmp_path: Path) -> None:
    predict = runtime.prepare(Wrapped(talker()), EXAMPLES, tmp_path)
    for batch in (torch.tensor([[1, 90]]), torch.tensor([[-1, 3]])):
        with pytest.raises(DataError, match=r"tokens must be in \[0, 90\)"):
            predict(batch)
    for empty in (torch.zeros(0, 4, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)):
        assert predict(empty).shape == (*empty.shape, 90)


@installed
def test_texts_longer_than_the_first_cache_and_no_state(tmp_path: Path) -> None:
    model = Wrapped(talker(max_position_embeddings=2048))
    predict = runtime.prepare(model, EXAMPLES, tmp_path)
    before = predict(EXAMPLES[0])
    long = tokens(1, 1100)
    assert gap(run(model, long), predict(long)) < 5e-5
    assert torch.equal(predict(EXAMPLES[0]), before)


@installed
def test_an_artifact_gives_the_same(tmp_path: Path) -> None:
    model, folder = Wrapped(talker()), tmp_path / "best"
    paths = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in p]
    options = {"bits": 4, "group": 32, "scale": "float16"}
    plan = Plan(tuple(Step("weight_only", path, options) for path in paths))
    (tmp_path / "source").mkdir()
    twin = Wrapped(rounded(model.language, 4))
    predict = runtime.prepare(twin, EXAMPLES, tmp_path / "source")
    manifest = Manifest(
        task="talk", runtime="llamacpp", session={}, plan=plan, outputs=predict.outputs, layouts={},
        inputs=tuple(TensorSpec(name=n, dtype=d, shape=s) for n, d, s in predict.inputs),
        model_digest="5e" * 32, measured={}, machine={}, versions={},
    )  # fmt: skip
    write(folder, tmp_path / "source", manifest)
    assert torch.equal(load_predictor(folder)(EXAMPLES[0]), predict(EXAMPLES[0]))
    assert torch.equal(run(load_module(folder, model), EXAMPLES[0]), run(twin, EXAMPLES[0]))
    assert read(folder).bytes == sum(file.stat().st_size for file in folder.iterdir())


@installed
def test_a_file_that_llama_cpp_does_not_take(tmp_path: Path) -> None:
    save(talker(), tmp_path / "model.gguf")
    raw = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(raw.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    with pytest.raises(ModelError, match=r"llama\.cpp must be able to load the file"):
        runtime.open_file(tmp_path, {})


@installed
def test_memory_is_measured(tmp_path: Path) -> None:
    model = Wrapped(talker())
    predict = runtime.prepare(model, EXAMPLES, tmp_path)
    assert (peak_memory(predict, model, EXAMPLES[0]) or 0) > predict.bytes
    assert peak_memory(dataclasses.replace(predict, runtime="torch"), model, EXAMPLES[0]) is not None


@installed
@pytest.mark.parametrize("split", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_llama_cpp_reads_texts_as_the_tokenizer_does(split: str, tmp_path: Path) -> None:
    model, tokenizer = talker(vocab_size=304), words(split)
    model.tokenizer = tokenizer
    runtime.prepare(model, EXAMPLES, tmp_path)
    llama = runtime.Reader.open(tmp_path / "model.gguf", 64).model
    for text in (TEXT, "the  cat", "<user>12 ships</s>", ""):
        assert llama.tokenize(text) == tokenizer(text)["input_ids"]
    last = llama.library.llama_vocab_eos
    last.argtypes = [ctypes.c_void_p]
    assert last(llama.vocabulary) == tokenizer.eos_token_id


@installed
def test_it_writes_what_the_model_writes(tmp_path: Path) -> None:
    model, prompt = talker(), [3, 1, 4, 1, 5]
    save(model, tmp_path / "model.gguf")
    reader = runtime.Reader.open(tmp_path / "model.gguf", 64)
    found = generation.write(reader, prompt, 12)
    assert found == generation.write(generation.TorchReader(model), prompt, 12)
    fast = generation.speed(reader, prompt, count=4, rounds=2)
    assert fast.prefill > 0
    assert fast.decode > 0
