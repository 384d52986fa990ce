"""The retrieval judge measures what it says, and the task is whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import minilm
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def test_the_help_text_gives_enough_sentences_each_once() -> None:
    every = minilm.sentences()
    assert len(set(every)) == len(every) > 1900
    assert all(8 <= len(minilm.words(text)) <= 40 for text in every)
    short = [text for index, text in enumerate(every) if index % 10 and len(minilm.words(text)) <= 20]
    assert len(short) >= minilm.SENTENCES


def test_a_query_is_six_words_of_its_sentence_in_order() -> None:
    texts = ["one two three four five six seven eight", "alpha beta gamma delta epsilon zeta eta theta"]
    asked = minilm.queries(texts)
    assert len(asked) == 2 * minilm.QUERIES
    assert len(set(asked)) > 2
    for index, query in enumerate(asked):
        known = texts[index // minilm.QUERIES].split()
        places = [known.index(word) for word in query.split()]
        assert len(places) == 6
        assert places == sorted(set(places))
    assert minilm.queries(texts) == asked


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 30000), min_size=1, max_size=40), min_size=1, max_size=40),
    st.integers(1, 9),
)
def test_batches_hold_every_text_once_and_vectors_keep_their_order(
    tokens: list[list[int]], size: int
) -> None:
    encoded = minilm.batches(tokens, size)
    assert sorted(place for places, _ in encoded for place in places) == list(range(len(tokens)))
    for places, batch in encoded:
        assert batch["input_ids"].shape[1] % 8 == 0
        assert batch["attention_mask"].sum(1).tolist() == [len(tokens[place]) for place in places]
    found = minilm.vectors(echo, encoded)
    means = torch.tensor([[sum(row) / len(row), 1.0] for row in tokens])
    torch.testing.assert_close(found, torch.nn.functional.normalize(means, dim=1))


def echo(batch: dict[str, torch.Tensor]) -> Any:
    """A model whose output at a token is the token; padding is made to look important."""
    ids = batch["input_ids"].float()
    values = torch.where(batch["attention_mask"] == 1, ids, 1e6)
    return SimpleNamespace(last_hidden_state=torch.stack([values, torch.ones_like(values)], dim=-1))


def test_ranks_agree_with_a_plain_count_and_a_collapsed_model_scores_worst() -> None:
    searched = torch.nn.functional.normalize(
        torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), dim=1
    )
    asked = searched.repeat_interleave(minilm.QUERIES, 0)
    assert minilm.reciprocal_ranks(asked, searched).tolist() == [1.0] * 20
    noisy = asked + 0.5 * torch.randn(asked.shape, generator=torch.Generator().manual_seed(1))
    found = minilm.reciprocal_ranks(noisy, searched)
    for text in range(20):
        rows = noisy[text * minilm.QUERIES : (text + 1) * minilm.QUERIES]
        ranks = [sum(float(row @ other) >= float(row @ searched[text]) for other in searched) for row in rows]
        assert found[text] == pytest.approx(sum(1 / rank for rank in ranks) / minilm.QUERIES)
    alike = torch.ones(20, 4)
    assert minilm.reciprocal_ranks(
        alike.repeat_interleave(minilm.QUERIES, 0), alike
    ).tolist() == pytest.approx([1 / 20] * 20)


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_the_task_is_whole_and_damage_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "SENTENCES", 200)
    task = minilm.task()
    assert task.examples[0]["input_ids"].shape == (1, 128)
    assert len({batch["input_ids"].shape for batch in task.examples}) > 3
    assert 16 <= len(task.examples) <= 40

    calibrating = {text for batch in task.examples for text in texts(batch)}
    seen: set[tuple[int, ...]] = set()

    def judged(noise: float) -> float:
        torch.manual_seed(0)

        def predict(batch: dict[str, torch.Tensor]) -> Any:
            seen.update(texts(batch))
            with torch.inference_mode():
                hidden = task.model(**batch).last_hidden_state
            return SimpleNamespace(last_hidden_state=hidden + noise * torch.randn(hidden.shape))

        values = list(task.score(predict))
        assert len(values) == 200
        return sum(values) / 200

    clean = judged(0.0)
    assert 0.8 < clean < 0.97
    assert judged(0.0) == clean
    assert judged(3.0) < 0.9 * clean
    assert len(seen) > 1000
    assert not seen & calibrating


def texts(batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """The tokens of each text in a batch."""
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [tuple(ids[mask == 1].tolist()) for ids, mask in rows]
