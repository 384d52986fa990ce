"""A small convolutional network for clothes: trained here, in a minute, then made faster or smaller.

The data is Fashion-MNIST (60,000 pictures to learn from, 10,000 to judge, 28 x 28, ten classes), or MNIST
where only that can be had. The first use trains the network for two epochs and keeps the weights in
FLYWEIGHT_CACHE, under the digest of this file and the data's name: another recipe is another file. A sample
is a test picture, right or wrong: 10,000 of them know a drop to +-0.2 % (95 %, paired). The examples are
training pictures; `train` and `loss` are given as well, so that a damaged candidate can be healed.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch
from _assets import cache, fashion_mnist, read_idx
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from flyweight import Task
from flyweight.records import Predict

EPOCHS, BATCH, RATE = 2, 256, 5e-3
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def task() -> Task:
    """The trained network, training pictures and the judge on test pictures; MachineError when no data can be had."""
    name, folder = fashion_mnist()
    train, test = pairs(folder, "train", BATCH), pairs(folder, "t10k", 500)

    def score(predict: Predict) -> list[float]:
        """One value for each test picture: 1 when its class comes out on top."""
        return (
            torch.cat([predict(pictures).argmax(1) == labels for pictures, labels in test]).float().tolist()
        )

    examples = [train[0][0][:1], *(pictures for pictures, _ in train[:16])]  # timed: one picture
    return Task(
        name=f"CNN on {name}",
        model=trained(name, train),
        examples=examples,
        score=score,
        train=train,
        loss=functional.cross_entropy,
    )


def pairs(folder: Path, part: str, size: int) -> Pairs:
    """Batches of pictures (n, 1, 28, 28), float32 around 0, and of their classes (n), of the part "train" or "t10k"."""
    pictures = (read_idx(folder, f"{part}-images-idx3-ubyte")[:, None].float() - 73) / 90
    labels = read_idx(folder, f"{part}-labels-idx1-ubyte").long()
    return list(zip(pictures.split(size), labels.split(size), strict=True))


def network() -> nn.Sequential:
    """The untrained network, 109,000 parameters: pictures (n, 1, 28, 28) to logits (n, 10)."""
    layers = [convolution(1, 24, 2), convolution(24, 48, 2), Residual(48), convolution(48, 128, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def convolution(before: int, after: int, stride: int) -> nn.Sequential:
    """A 3 x 3 convolution with batch norm and ReLU."""
    layer = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU())


class Residual(nn.Module):
    """Two convolutions whose result is added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = convolution(channels, channels, 1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, channels, h, w) to the same shape."""
        return functional.relu(x + self.norm(self.second(self.first(x))))


def trained(name: str, train: Pairs) -> nn.Module:
    """The network with the weights that this recipe gives: from the cache, or trained now."""
    recipe = hashlib.sha256(Path(__file__).read_bytes() + name.encode()).hexdigest()
    kept = cache() / f"fashion_cnn-{recipe[:16]}.safetensors"
    model = network()
    if kept.is_file():
        model.load_state_dict(load_file(kept))
        return model.eval()
    print(f"training the network on {name} once, about a minute", file=sys.stderr)
    learn(model, train)
    kept.parent.mkdir(parents=True, exist_ok=True)
    whole = kept.with_suffix(f".{os.getpid()}.tmp")
    save_file(model.state_dict(), whole)
    whole.replace(kept)
    return model.eval()


def learn(model: nn.Module, train: Pairs) -> None:
    """Train in place by AdamW with a one-cycle rate; seeded, so that one machine gives one result."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()  # so that the seed decides where the weights start
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * len(train))
    model.train()
    for _ in range(EPOCHS):
        for index in torch.randperm(len(train)):
            pictures, labels = train[index]
            optimizer.zero_grad()
            functional.cross_entropy(model(pictures), labels).backward()
            optimizer.step()
            schedule.step()
