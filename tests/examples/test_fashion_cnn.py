"""The small network is built and trained as it says, once for each recipe, and the task is whole."""

from __future__ import annotations

from pathlib import Path

import fashion_cnn
import pytest
import torch


def two_classes(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of 32 pictures: light below or light above."""
    labels = torch.arange(32) % 2
    batches = []
    for seed in range(count):
        pictures = 0.3 * torch.randn(32, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
        pictures[labels == 0, :, :14] += 1
        pictures[labels == 1, :, 14:] += 1
        batches.append((pictures, labels))
    return batches


def test_the_network_has_the_stated_size_and_shape() -> None:
    model = fashion_cnn.network()
    assert round(sum(p.numel() for p in model.parameters()), -3) == 109_000
    assert model.eval()(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_training_learns_and_repeats() -> None:
    first, second = fashion_cnn.network(), fashion_cnn.network()
    fashion_cnn.learn(first, two_classes(12))
    fashion_cnn.learn(second, two_classes(12))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    pictures, labels = two_classes(1)[0]
    assert (first.eval()(pictures).argmax(1) == labels).float().mean() > 0.95


def test_each_recipe_is_trained_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def learn(model: torch.nn.Module, train: object) -> None:
        calls.append(1)
        torch.nn.init.constant_(model[-1].bias, float(len(calls)))

    monkeypatch.setattr(fashion_cnn, "learn", learn)
    assert fashion_cnn.trained("A", [])[-1].bias[0] == 1
    again = fashion_cnn.trained("A", [])
    assert again[-1].bias[0] == 1
    assert not again.training
    assert fashion_cnn.trained("B", [])[-1].bias[0] == 2
    assert len(calls) == 2
    assert {path.suffix for path in empty_cache.iterdir()} == {".safetensors"}
    assert len(list(empty_cache.iterdir())) == 2


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_the_task_is_whole_and_damage_shows() -> None:
    task = fashion_cnn.task()
    assert task.examples[0].shape == (1, 1, 28, 28)
    assert task.train is not None
    assert task.loss is not None

    def predict(batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return task.model(batch)

    values = list(task.score(predict))
    assert len(values) == 10_000
    assert set(values) == {0.0, 1.0}
    assert sum(values) / 10_000 > 0.88
    assert sum(task.score(lambda batch: predict(-batch))) / 10_000 < 0.7
    pictures, labels = next(iter(task.train))
    assert next(iter(task.train))[0] is pictures
    assert float(task.loss(predict(pictures), labels)) < 0.6
