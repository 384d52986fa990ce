"""An unmodified transformers reads our folder and computes the model's own output."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runtimes.nets import gap
from runtimes.talkers import Wrapped, talker, tokens, words
from torch import nn

from flyweight import transforms
from flyweight.analysis.sites import analyse
from flyweight.artifact.format import Manifest, TensorSpec, read, write
from flyweight.artifact.load import load_module, load_predictor
from flyweight.errors import ArtifactError, DataError, ModelError
from flyweight.evaluation.memory import peak_memory
from flyweight.inputs.check import run
from flyweight.records import Batch, Plan, Step
from flyweight.runtimes import _hugging_face
from flyweight.runtimes import transformers as runtime
from flyweight.runtimes._structure import leaves

pytest.importorskip("transformers")
installed = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)
EXAMPLES = [tokens(2, 9), tokens(1, 5)]
FOUR = {"bits": 4, "group": 32, "symmetric": False, "scale": "float16"}
MIXTURE: Sequence[dict[str, Any]] = (
    FOUR, {"bits": 8}, {"bits": 3, "group": 32, "symmetric": False}, {"code": "ternary", "group": 32}, {"code": "low_float"},
    {"bits": 6, "symmetric": False}, {"bits": 2, "group": 16},
)  # fmt: skip


def applied(
    model: nn.Module, examples: Sequence[Batch], kinds: Sequence[dict[str, Any]], only: str = ""
) -> tuple[nn.Module, Plan]:
    """The model with its sites stored in turn in these ways; only: those whose names hold that."""
    sites = analyse(model, examples).sites
    names = [site.name for site in sites if only in site.name]
    plan = Plan(tuple(Step("weight_only", n, kinds[i % len(kinds)]) for i, n in enumerate(names)))
    return transforms.apply(model, plan, sites, transforms.Context()), plan


def kept(folder: Path, source: Path, predictor: Any, plan: Plan) -> Path:
    """An artifact of what a predictor runs."""
    inputs = tuple(TensorSpec(name=n, dtype=d, shape=s) for n, d, s in predictor.inputs)
    manifest = Manifest(
        task="talk", runtime="transformers", session=dict(predictor.session), plan=plan, outputs=predictor.outputs,
        layouts={}, inputs=inputs, model_digest="5e" * 32, measured={}, machine={}, versions={},
    )  # fmt: skip
    write(folder, source, manifest)
    return folder


def opened(folder: Path) -> Any:
    """The folder by the line that a user writes."""
    from transformers import AutoModelForCausalLM

    with _hugging_face.quiet():
        model = AutoModelForCausalLM.from_pretrained(folder)
        model(torch.zeros(1, 1, dtype=torch.long))
    return model


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "flyweight[huggingface]" in str(runtime.available())


def test_rounded_activations_are_refused() -> None:
    assert "activations" in str(runtime.refuse([Step("static_int8", "a"), Step("weight_only", "b")]))
    assert runtime.refuse([Step("weight_only", "a")]) is None


def test_codes_that_the_format_lacks_are_refused_before_anything_is_built() -> None:
    steps = [Step("weight_only", "a", {"code": code}) for code in ("palette", "low_float", "entropy")]
    assert "the code entropy, palette" in str(runtime.refuse(steps))


@installed
@pytest.mark.parametrize(
    ("kinds", "dequantized"),
    [([FOUR], True), ([{"bits": 4, "group": 32}], False), ([{"bits": 8}], False), (MIXTURE, False)],
)
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_and_every_logit_is_the_model_s_own(
    kinds: Sequence[dict[str, Any]], dequantized: bool, tied: bool, tmp_path: Path
) -> None:
    original = Wrapped(talker(tie_word_embeddings=tied, attention_bias=True))
    twin, _ = applied(original, EXAMPLES, kinds, "layers")
    predict = runtime.prepare(twin, EXAMPLES, tmp_path)
    loaded = opened(tmp_path)
    for path, layer in _hugging_face.quantized(twin.language).items():
        integers, grid = layer.encoded()
        assert torch.equal(loaded.get_submodule(path).weight, grid.values(integers))
    for batch in EXAMPLES:
        assert torch.equal(loaded(batch).logits, run(twin, batch))
        assert torch.equal(predict(batch), run(twin, batch))
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said.get("dequantize", False) is dequantized
    assert said["ignore"] == ["lm_head"]
    assert predict.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert gap(run(original, EXAMPLES[0]), run(twin, EXAMPLES[0])) > 1e-4


@installed
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_heads_too(tied: bool, tmp_path: Path) -> None:
    twin, _ = applied(Wrapped(talker(tie_word_embeddings=tied)), EXAMPLES, MIXTURE)
    predict = runtime.prepare(twin, EXAMPLES, tmp_path)
    assert torch.equal(predict(EXAMPLES[1]), run(twin, EXAMPLES[1]))
    loaded = opened(tmp_path)
    assert torch.equal(loaded(EXAMPLES[0]).logits, run(twin, EXAMPLES[0]))
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False


@installed
def test_an_artifact_gives_the_same(tmp_path: Path) -> None:
    original = Wrapped(talker(vocab_size=304))
    original.tokenizer = words()
    twin, plan = applied(original, EXAMPLES, MIXTURE)
    (tmp_path / "source").mkdir()
    predict = runtime.prepare(twin, EXAMPLES, tmp_path / "source")
    folder = kept(tmp_path / "best", tmp_path / "source", predict, plan)
    assert torch.equal(load_predictor(folder)(EXAMPLES[0]), run(twin, EXAMPLES[0]))
    assert torch.equal(run(load_module(folder, original), EXAMPLES[1]), run(twin, EXAMPLES[1]))
    assert read(folder).bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert read(folder).manifest.session == {
        "opened_by": "AutoModelForCausalLM", "arguments": "input_ids", "outputs": "logits",
    }  # fmt: skip
    with pytest.raises(ArtifactError, match="must belong to the model"):
        load_module(folder, Wrapped(talker(num_hidden_layers=1)))
    with pytest.raises(DataError, match="input"):
        load_predictor(folder)(EXAMPLES[0][..., None])
    with pytest.raises(DataError, match=r"tokens must be in \[0, 304\)"):
        load_predictor(folder)(EXAMPLES[0] + 304)


@installed
def test_the_folder_holds_what_a_user_needs(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    twin, _ = applied(Wrapped(talker(vocab_size=304)), EXAMPLES, [{"bits": 8}])
    twin.language.config.use_cache, twin.language.generation_config.use_cache = False, True
    twin.tokenizer = words()
    twin.tokenizer.chat_template = "{{ messages }}"
    files = runtime.prepare(twin, EXAMPLES, tmp_path).files
    names = [
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [file.name for file in files] == names  # a chat template is a program
    assert AutoTokenizer.from_pretrained(tmp_path)("the cat")["input_ids"] == words()("the cat")["input_ids"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    written = opened(tmp_path).generate(EXAMPLES[1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written.shape == (1, 9)


@installed
def test_the_tokenizer_comes_from_the_model_s_own_folder(tmp_path: Path) -> None:
    from inputs.language_folders import prose, written

    from flyweight.inputs.language_model import language_task

    folder, text, out = written(tmp_path / "model"), tmp_path / "text.txt", tmp_path / "out"
    text.write_text(prose(6000))
    out.mkdir()
    task = language_task(folder, text, window=32)
    twin, _ = applied(task.model.eval(), task.examples[:2], [{"bits": 4, "group": 16}])
    predict = runtime.prepare(twin, task.examples[:2], out)
    assert (out / "tokenizer.json").read_bytes()
    assert (
        json.loads((out / "tokenizer.json").read_text()).keys()
        == json.loads((folder / "tokenizer.json").read_text()).keys()
    )
    assert torch.equal(predict(task.examples[0]), run(twin, task.examples[0]))


@installed
def test_an_encoder_works_the_same_way(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=90, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
        )
    )
    examples: list[Batch] = [
        {"input_ids": t, "attention_mask": torch.ones_like(t), "token_type_ids": torch.zeros_like(t)}
        for t in EXAMPLES
    ]
    twin, plan = applied(model.eval(), examples, [{"bits": 8}, FOUR])
    (tmp_path / "source").mkdir()
    predict = runtime.prepare(twin, examples, tmp_path / "source")
    folder = kept(tmp_path / "best", tmp_path / "source", predict, plan)
    for batch in examples:
        assert type(predict(batch)) is type(run(twin, batch))
        for found in (predict(batch), load_predictor(folder)(batch), run(load_module(folder, model), batch)):
            pairs = zip(leaves(found), leaves(run(twin, batch)), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
    assert predict.session["opened_by"] == "AutoModel"
    assert predict.session["outputs"] == "last_hidden_state pooler_output"


class _Halved(nn.Module):
    """A model that says something else than the model of transformers in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.language = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.language(input_ids).logits.mean(1)


@pytest.mark.parametrize(
    ("model", "batch", "word"),
    [
        (lambda: nn.Linear(2, 2), torch.zeros(1, 2), "holds a model of transformers"),
        (lambda: nn.ModuleList([talker(), talker()]), tokens(), "holds a model of transformers"),
        (
            lambda: Wrapped(talker(), 0.5),
            tokens(),
            "must be what its model of transformers gives.*return logits",
        ),
        (lambda: _Halved(talker()), tokens(), "must be what its model of transformers gives"),
        (lambda: Wrapped(talker()), {"words": tokens()}, "must be arguments of the model.*input_ids"),
    ],
)
def test_what_is_no_such_model_is_refused(model: Any, batch: Any, word: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=word):
        runtime.prepare(model(), [batch], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"code": "palette", "bits": 4}, r"the code palette.*layers\.0\.self_attn\.q_proj"),
        ({"code": "entropy"}, "the code entropy"),
    ],
)
def test_codes_that_the_format_lacks_are_refused_by_layer(
    options: dict[str, Any], word: str, tmp_path: Path
) -> None:
    twin, _ = applied(Wrapped(talker()), EXAMPLES, [options], "layers")
    with pytest.raises(ModelError, match=word):
        runtime.prepare(twin, EXAMPLES, tmp_path)
    assert not list(tmp_path.iterdir())


def test_layers_that_the_format_lacks_are_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=90, n_embd=32, n_layer=1, n_head=2, n_positions=64, use_cache=False)
    twin, _ = applied(Wrapped(GPT2LMHeadModel(config).eval()), EXAMPLES, [{"bits": 8}], "c_attn")
    with pytest.raises(ModelError, match=r"linear layers and embeddings of PyTorch, got Conv1D.*c_attn"):
        runtime.prepare(twin, EXAMPLES, tmp_path)


@installed
def test_floats_alone_make_a_plain_folder(tmp_path: Path) -> None:
    model = Wrapped(talker(tie_word_embeddings=True))
    predict = runtime.prepare(model, EXAMPLES, tmp_path)
    assert torch.equal(predict(EXAMPLES[0]), run(model, EXAMPLES[0]))
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@installed
def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    twin, _ = applied(Wrapped(talker()), EXAMPLES, [{"bits": 8}], "layers")
    predict = runtime.prepare(twin, EXAMPLES, tmp_path)
    for name in ("gpt2.Model", "os", "AutoModel.from_config"):
        with pytest.raises(ModelError, match="a folder is opened by"):
            runtime.open_file(tmp_path, {**predict.session, "opened_by": name})
    with pytest.raises(ModelError, match="must take the arguments of the session"):
        runtime.open_file(tmp_path, {**predict.session, "arguments": "input_ids trust_remote_code"})
    odd = runtime.open_file(tmp_path, {**predict.session, "outputs": "past"})
    with pytest.raises(ModelError, match="must give the outputs"):
        odd({"input": EXAMPLES[0].numpy()})
    stored = load_file(tmp_path / "model.safetensors")
    stored.pop("model.layers.1.mlp.up_proj.weight_scale")
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"every weight of the folder, got .*up_proj\.weight_scale missing"):
        runtime.open_file(tmp_path, predict.session)


@installed
def test_a_weight_that_is_off_is_found(tmp_path: Path) -> None:
    twin, _ = applied(Wrapped(talker()), EXAMPLES, [{"bits": 8}], "layers")
    runtime.prepare(twin, EXAMPLES, tmp_path)
    loaded = opened(tmp_path)
    _hugging_face.check_same(twin.language, loaded)
    with torch.no_grad():
        loaded.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-3
    with pytest.raises(ModelError, match=r"decode a layer's weight exactly.*layers\.0\.mlp\.up_proj"):
        _hugging_face.check_same(twin.language, loaded)


@installed
def test_half_precision_models_lose_no_more_than_their_scales(tmp_path: Path) -> None:
    model = Wrapped(talker().to(torch.bfloat16))
    twin, _ = applied(model, EXAMPLES, [{"bits": 4, "group": 32}], "layers")
    predict = runtime.prepare(twin, EXAMPLES, tmp_path)
    assert predict(EXAMPLES[0]).dtype == torch.bfloat16
    assert gap(run(twin, EXAMPLES[0]).float(), predict(EXAMPLES[0]).float()) < 3e-2
    found = runtime.open_file(tmp_path, predict.session)({"input": EXAMPLES[0].numpy()})[0]
    assert found.dtype == "float32"


@installed
def test_memory_is_that_of_the_decoded_floats(tmp_path: Path) -> None:
    model = Wrapped(talker(hidden_size=256, intermediate_size=1024))
    twin, _ = applied(model, EXAMPLES, [{"bits": 4, "group": 32}])
    predict = runtime.prepare(twin, EXAMPLES, tmp_path)
    size = sum(p.numel() * 4 for p in model.parameters())
    assert (peak_memory(predict, twin, EXAMPLES[0]) or 0) > size > 3 * predict.bytes


@installed
@pytest.mark.heavy
def test_smollm2_arrives_bit_by_bit(tmp_path: Path) -> None:
    sys.path.append(str(Path(__file__).parents[2] / "examples"))
    import smollm2

    from flyweight.inputs.language_model import language_task

    place = smollm2.prepared()
    task = language_task(place / "model", place / "speeches.txt", judging=8, calibrating=2)
    example = task.examples[0][:, :32]
    twin, _ = applied(task.model.eval(), [example], [FOUR], "layers")
    predict = runtime.prepare(twin, [example], tmp_path)
    assert torch.equal(predict(example), run(twin, example))
    size = sum(tensor.numel() for tensor in task.model.parameters()) * 4
    assert predict.bytes < 0.4 * size
