"""The judge on views of photos measures what it says, and the task is whole."""

from __future__ import annotations

import random

import efficientnet_lite0
import numpy as np
import pytest
import torch
from PIL import Image


def gradient() -> Image.Image:
    """A photo, 400 x 300, whose red is its column and whose green its row."""
    rows, columns = np.mgrid[0:300, 0:400]
    return Image.fromarray(np.stack([columns * 255 // 399, rows * 255 // 299, rows * 0], -1).astype(np.uint8))


def test_a_view_is_a_square_of_the_photo_and_repeats_with_its_seed() -> None:
    mirrored = 0
    for seed in range(40):
        view = efficientnet_lite0.view(gradient(), random.Random(seed))
        assert view.shape == (224, 224, 3)
        assert view.dtype == torch.uint8
        assert torch.equal(view, efficientnet_lite0.view(gradient(), random.Random(seed)))
        left, right = view[:, 0, 0].float().mean(), view[:, -1, 0].float().mean()
        wide, high = (
            abs(right - left) * 400 / 255,
            (view[-1, :, 1].float() - view[0, :, 1].float()).mean() * 300 / 255,
        )
        assert wide == pytest.approx(high, abs=6)
        assert 0.3 < (wide / 300) ** 2 <= 1.01
        mirrored += int(right < left)
    assert 8 < mirrored < 32


def test_pictures_are_scaled_as_the_model_was_trained() -> None:
    views = torch.tensor([0, 127, 255], dtype=torch.uint8).reshape(1, 1, 3, 1).repeat(1, 4, 1, 3)
    found = efficientnet_lite0.normalized(views)
    assert found.shape == (1, 3, 4, 3)
    assert found[0, 0, 0].tolist() == [-127 / 128, 0.0, 1.0]


def test_a_rank_counts_ties_against_the_label() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    assert efficientnet_lite0.reciprocal_rank(logits, torch.tensor([0, 2, 1])) == pytest.approx(
        (1 + 1 / 3 + 1 / 3) / 3
    )


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_the_task_is_whole_and_damage_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet_lite0, "ROUNDS", 4)
    task = efficientnet_lite0.task()
    assert [tuple(batch.shape) for batch in task.examples] == [(1, 3, 224, 224)] + 16 * [(5, 3, 224, 224)]
    seen = []

    def predict(batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch)
        with torch.inference_mode():
            return task.model(batch)

    values = list(task.score(predict))
    assert len(values) == 4
    assert 0.9 < sum(values) / 4 <= 1
    assert [len(batch) for batch in seen] == [15] * 4
    assert not any(torch.equal(seen[0], batch) for batch in seen[1:])
    assert list(task.score(predict)) == values
    wrong = list(task.score(lambda batch: predict(batch).roll(1, dims=1)))
    assert sum(wrong) / 4 < 0.5
