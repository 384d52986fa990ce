"""llama.cpp is called only where its settings are known to lie, and never with what would stop the process."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtimes.talkers import talker, tokens

from flyweight.errors import DataError, ModelError
from flyweight.runtimes import _llama, llamacpp
from flyweight.runtimes._gguf_model import save

pytest.importorskip("transformers")
missing = llamacpp.available()
installed = pytest.mark.skipif(missing is not None, reason=str(missing))


def fresh() -> Any:
    """The library, checked anew."""
    file = _llama.find()
    assert file is not None
    return _llama._load.__wrapped__(file)


@pytest.fixture
def model(tmp_path: Path) -> _llama.Model:
    save(talker(max_position_embeddings=2048), tmp_path / "model.gguf")
    return _llama.Model(tmp_path / "model.gguf", 1024, 1)


@installed
@pytest.mark.parametrize("name", ["_CONTEXT_DEFAULTS", "_MODEL_DEFAULTS"])
@pytest.mark.parametrize("word", [0, 4])
def test_settings_that_lie_elsewhere_are_refused(
    name: str, word: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fresh()
    monkeypatch.setattr(_llama, name, {**getattr(_llama, name), word: 77})
    with pytest.raises(OSError, match="settings lie elsewhere"):
        fresh()


@installed
def test_every_word_that_is_set_is_checked_before() -> None:
    before = _llama.load().llama_context_default_params()
    after = _llama._context(_llama.load(), 1000)
    changed = {i for i, (a, b) in enumerate(zip(before.words, after.words, strict=True)) if a != b and i < 42}
    assert changed == {
        _llama._CONTEXT,
        _llama._BATCH,
        _llama._FLASH,
        _llama._CACHED_KEYS,
        _llama._CACHED_VALUES,
    }
    assert changed <= set(_llama._CONTEXT_DEFAULTS)
    assert _llama._GPU_LAYERS in _llama._MODEL_DEFAULTS


@installed
def test_a_library_without_a_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_llama._FUNCTIONS, "llama_sing", (None, []))
    with pytest.raises(OSError, match="no function llama_sing"):
        fresh()


def test_a_file_that_is_no_library_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "xllamacpp.abi3.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(_llama, "find", lambda: broken)
    assert "flyweight[llamacpp]" in str(llamacpp.available())
    with pytest.raises(ModelError, match=r"llama\.cpp must be able to load the file"):
        llamacpp.Reader.open(tmp_path / "model.gguf", 64)


@installed
def test_the_reason_is_told_and_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(talker(), tmp_path / "model.gguf")
    raw = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(raw.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    with pytest.raises(ValueError, match=r"blk\.1\.attn_q\.weight"):
        _llama.Model(tmp_path / "model.gguf", 64, 1)
    with pytest.raises(ValueError, match="nothing"):
        _llama.Model(tmp_path / "nothing.gguf", 64, 1)
    assert capfd.readouterr() == ("", "")


@installed
@pytest.mark.parametrize("given", [[], [-1], [90], [0, 2**31]])
def test_tokens_that_are_none_are_refused(given: list[int], model: _llama.Model) -> None:
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 90\)"):
        model.read(given)
    with pytest.raises(DataError, match=r"tokens must be in \[0, 90\)"):
        llamacpp.Reader(model).read(given)


@installed
def test_more_than_the_cache_holds_is_refused(model: _llama.Model) -> None:
    assert model.length == 1024
    model.read(tokens(1, 1000)[0].tolist())
    with pytest.raises(ValueError, match="the cache holds 1024 tokens, got 1000 and 25 more"):
        model.read([1] * 25)
    model.read([1] * 24)
    model.forget()
    assert np.isfinite(model.read([1] * 1024)).all()


@installed
def test_a_text_in_pieces_is_the_text(model: _llama.Model) -> None:
    text = tokens(1, 700)[0].tolist()
    whole = model.read(text, every=True)
    assert whole.shape == (700, 90)
    assert whole.dtype == np.float32
    for cuts in ([0, 700], [0, 1, 700], [0, 300, 301, 650, 700]):
        model.forget()
        parts = [model.read(text[a:b], every=True) for a, b in itertools.pairwise(cuts)]
        assert np.abs(np.concatenate(parts) - whole).max() < 1e-3
    model.forget()
    assert np.abs(model.read(text) - whole[-1:]).max() < 1e-3


@installed
def test_what_was_handed_out_stays(model: _llama.Model) -> None:
    first = model.read([1, 2, 3])
    kept = first.copy()
    model.read([4])
    assert np.array_equal(first, kept)


@installed
def test_a_file_without_a_vocabulary_takes_no_text(model: _llama.Model) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        model.tokenize("text")
