"""A tokenizer's vocabulary as llama.cpp's own converter writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runtimes.talkers import words

from flyweight.errors import ModelError
from flyweight.runtimes import _gguf
from flyweight.runtimes._gguf_vocab import no_vocabulary, vocabulary

pytest.importorskip("transformers")
SIZE = 400


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return words()


def test_words_and_merges(tokenizer: Any) -> None:
    said = vocabulary(tokenizer, SIZE)
    tokens, kinds, known = (
        said["tokenizer.ggml.tokens"],
        said["tokenizer.ggml.token_type"],
        tokenizer.get_vocab(),
    )
    assert isinstance(tokens, list)
    assert isinstance(kinds, list)
    assert len(tokens) == len(kinds) == SIZE
    assert all(tokens[number] == word for word, number in known.items())
    assert tokens[len(known) :] == [f"[PAD{number}]" for number in range(len(known), SIZE)]
    assert kinds[:2] == [3, 3]
    assert kinds[known["<user>"]] == 4
    assert set(kinds[len(known) :]) == {5}
    assert {kind for number, kind in enumerate(kinds[: len(known)]) if tokens[number][0] != "<"} == {1}
    merges = said["tokenizer.ggml.merges"]
    assert isinstance(merges, list)
    assert len(merges) == len(known) - 3 - 256
    assert all("".join(str(merge).split(" ")) in known for merge in merges)


def test_special_tokens(tokenizer: Any) -> None:
    said = vocabulary(tokenizer, SIZE)
    assert said["tokenizer.ggml.model"] == "gpt2"
    assert said["tokenizer.ggml.bos_token_id"] == 0
    assert said["tokenizer.ggml.eos_token_id"] == 1
    assert said["tokenizer.ggml.add_bos_token"] is False
    assert said["tokenizer.ggml.add_eos_token"] is False
    assert "tokenizer.ggml.padding_token_id" not in said
    assert "tokenizer.chat_template" not in said


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "llama-bpe", "qwen2", "default"])
def test_the_ways_to_split_words(split: str) -> None:
    assert vocabulary(words(split), SIZE)["tokenizer.ggml.pre"] == split


def test_other_tokenizers_are_refused(tokenizer: Any) -> None:
    import tokenizers
    import transformers

    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    for other in (plain, pieces):
        with pytest.raises(ModelError, match="byte-level BPE"):
            vocabulary(transformers.PreTrainedTokenizerFast(tokenizer_object=other), SIZE)
    with pytest.raises(ModelError, match="byte-level BPE"):
        vocabulary(object(), SIZE)
    with pytest.raises(ModelError, match="a model of 10 tokens"):
        vocabulary(tokenizer, 10)


def test_files_without_words() -> None:
    assert no_vocabulary() == {"tokenizer.ggml.model": "no_vocab"}


def test_the_format_s_own_reader_reads_the_words(tokenizer: Any, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    said = vocabulary(tokenizer, SIZE)
    _gguf.write(tmp_path / "m", said, [])
    fields = gguf.GGUFReader(tmp_path / "m").fields
    assert {key: fields[key].contents() for key in said} == said
    assert any(ord(sign) > 127 for word in fields["tokenizer.ggml.tokens"].contents() for sign in word)
