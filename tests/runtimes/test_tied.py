"""A weight that an embedding and a head share is stored once in every file, and both compute with it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from runtimes.nets import gap, prepared
from runtimes.talkers import talker as speaker
from runtimes.talkers import tokens
from safetensors import safe_open
from torch import nn

from flyweight import discover, transforms
from flyweight.analysis.gram import lazily
from flyweight.analysis.sites import analyse, model_bytes
from flyweight.inputs.check import run
from flyweight.records import Plan, Step
from flyweight.runtimes._files import PACKED, WEIGHTS, Predictor
from flyweight.runtimes._layout import load_state
from flyweight.testing._awkward import TiedLanguageModel
from flyweight.transforms import Context, QuantizedLayer, weight_only

VOCABULARY = 50
RUNTIMES = ("onnxruntime", "openvino")
CODES: tuple[dict[str, Any], ...] = (
    {},
    {"bits": 8, "symmetric": False},
    {"bits": 6, "scale": "float16"},
    {"bits": 4},
    {"bits": 4, "symmetric": False},
    {"bits": 4, "group": 32, "symmetric": False, "scale": "float16"},
    {"bits": 3, "group": 16, "symmetric": False, "rounding": "error_feedback"},
    {"bits": 4, "group": "tensor", "symmetric": False},
    {"code": "palette", "bits": 4, "scaled": True},
    {"code": "vector_palette", "bits": 2, "width": 2},
    {"code": "low_float", "format": "e2m1", "group": 32, "scale": "e8m0"},
    {"code": "ternary", "group": 16},
    {"code": "entropy"},
    {"code": "entropy", "rounding": "waterfilling", "level": 0.02},
    {"code": "iq4_nl"},
)
SUPER: tuple[dict[str, Any], ...] = ({"code": "super_block"}, {"code": "super_block", "uneven": True})


@functools.cache
def talker(width: int) -> nn.Module:
    torch.manual_seed(0)
    model = TiedLanguageModel(VOCABULARY, width).eval()
    model.head.bias = nn.Parameter(torch.randn(VOCABULARY))
    return model


def examples() -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, shape, generator=source) for shape in ((1, 6), (2, 9), (4, 6))]


def changed(model: nn.Module, options: dict[str, Any], method: str = "weight_only") -> nn.Module:
    found = analyse(model, examples())
    context = Context(found.statistics, lazily(model, [site.name for site in found.sites], examples()))
    return transforms.apply(model, Plan((Step(method, "head", options),)), found.sites, context)


def require(runtime: str) -> None:
    reason = discover.method("runtimes", runtime).available()
    if reason:
        pytest.skip(reason)


def unpacked(predictor: Predictor) -> Path:
    """The plain file of weights."""
    return predictor.files[0].parent / WEIGHTS


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("width", "codes"), [(32, CODES), (17, CODES), (256, SUPER)])
def test_every_code_of_a_tied_weight_runs_as_in_pytorch(
    runtime: str, width: int, codes: tuple[dict[str, Any], ...], tmp_path: Path
) -> None:
    require(runtime)
    model = talker(width)
    site = next(site for site in analyse(model, examples()[:1]).sites if site.tied)
    for index, options in enumerate(codes):
        read = weight_only.read(options, "")
        if weight_only.refuse(site, read, model.head) is not None:
            continue
        where = tmp_path / str(index)
        where.mkdir()
        found = changed(model, options)
        predictor = prepared(runtime, found, examples(), where)
        for batch in examples():
            assert gap(run(found, batch), predictor(batch)) < 2e-5, options
        assert unpacked(predictor).stat().st_size < model_bytes(found) + 1500, options
        fresh = transforms.apply(
            talker(width), Plan((Step("weight_only", "head", options),)), [site], Context(rebuilding=True)
        )
        with safe_open(unpacked(predictor), "pt") as file:
            load_state(fresh, {key: file.get_tensor(key) for key in file.keys()}, predictor.layouts)  # noqa: SIM118
        assert torch.equal(run(fresh, examples()[1]), run(found, examples()[1])), options


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_tied_weight_in_floats_is_stored_once(runtime: str, tmp_path: Path) -> None:
    require(runtime)
    model = talker(32)
    predictor = prepared(runtime, model, examples(), tmp_path)
    assert gap(run(model, examples()[1]), predictor(examples()[1])) < 2e-6
    assert unpacked(predictor).stat().st_size < model_bytes(model) + 1000


def test_a_head_with_rounded_inputs_shares_its_integers_with_the_lookup(tmp_path: Path) -> None:
    require("onnxruntime")
    found = changed(talker(32), {}, "dynamic_int8")
    assert isinstance(found.embed, QuantizedLayer)
    assert found.embed.activations == "float"
    predictor = prepared("onnxruntime", found, examples(), tmp_path)
    assert gap(run(found, examples()[2]), predictor(examples()[2])) < 1e-2
    assert unpacked(predictor).stat().st_size < model_bytes(found) + 1000


def test_a_compressed_file_of_a_tied_weight_is_as_small_as_pytorch_s(tmp_path: Path) -> None:
    require("onnxruntime")
    found = changed(talker(32), {"code": "entropy"})
    sizes = []
    for runtime in ("torch", "onnxruntime"):
        (tmp_path / runtime).mkdir()
        predictor = prepared(runtime, found, examples(), tmp_path / runtime)
        sizes.append(next(file.stat().st_size for file in predictor.files if file.name == PACKED))
    assert abs(sizes[0] - sizes[1]) < 100


def test_a_gguf_holds_a_tied_weight_once_and_gives_it_back(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    from flyweight.runtimes import _gguf_load, _gguf_model

    model = speaker(tie_word_embeddings=True)
    batch = [{"input_ids": tokens()}]
    site = next(site for site in analyse(model, batch).sites if site.tied)
    assert (site.name, site.tied) == ("lm_head", ("model.embed_tokens",))
    plan = Plan((Step("weight_only", "lm_head", {"group": 32, "scale": "float16"}),))
    found = transforms.apply(model, plan, [site], Context())
    _gguf_model.save(found, tmp_path / "m")
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "m").tensors}
    assert stored["token_embd.weight"].tensor_type.name == "Q8_0"
    assert "output.weight" not in stored
    fresh = transforms.apply(speaker(tie_word_embeddings=True), plan, [site], Context(rebuilding=True))
    read = {name: torch.from_numpy(t.data.copy().reshape(*t.data.shape)) for name, t in stored.items()}
    load_state(fresh, _gguf_load.state(fresh, read), {})
    assert torch.equal(fresh.lm_head.integers, found.lm_head.integers)
    assert fresh.lm_head.integers is fresh.get_submodule("model.embed_tokens").integers
    assert gap(run(found, batch[0]).logits, run(fresh, batch[0]).logits) < 1e-6
