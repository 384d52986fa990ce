"""Small relatives of the convolutional families, for methods that change widths: each couples its channels in another way.

Pictures are (B, 3, 16, 16); outputs (B, 5), of the U-Net (B, 2, 16, 16). Builds are seeded, and norms have statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5


class ResNet(nn.Module):
    """Two residual blocks: channels are coupled through sums, the second's through its own shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = _block(3, 16), nn.Sequential(_block(16, 16), _norm(16, 16))
        self.second, self.shortcut = (
            nn.Sequential(_block(16, 32, stride=2), _norm(32, 32)),
            _norm(16, 32, 1, 2),
        )
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.stem(x)
        x = F.relu(x + self.first(x))
        x = F.relu(self.shortcut(x) + self.second(x))
        return _scores(self.head, x)


class DenseNet(nn.Module):
    """Each layer reads all channels before it, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = _block(3, 8), nn.ModuleList(_block(8 + 4 * i, 4) for i in range(3))
        self.join, self.head = _block(20, 12, 1), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return _scores(self.head, self.join(x))


class Inception(nn.Module):
    """Branches of several kernels, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = _block(3, 12), _block(12, 8, 1)
        self.three = nn.Sequential(_block(12, 6, 1), _block(6, 8))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), _block(12, 4, 1))
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.stem(x)
        return _scores(self.head, torch.cat([self.one(x), self.three(x), self.pooled(x)], 1))


class ShuffleNet(nn.Module):
    """Half of the channels goes by, and then all are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(3, 16)
        self.branches = nn.ModuleList(
            nn.Sequential(_block(8, 8, 1), _norm(8, 8, groups=8), _block(8, 8, 1)) for _ in range(2)
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.stem(x)
        for branch in self.branches:
            one, two = x.chunk(2, 1)
            x = torch.cat([one, branch(two)], 1).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return _scores(self.head, x)


class UNet(nn.Module):
    """A picture goes in and one comes out; what was seen early joins what was seen late."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom = _block(3, 8), _block(8, 16)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, 2), _block(16, 8)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """A score for each place."""
        wide = self.down(x)
        deep = self.up(self.bottom(F.max_pool2d(wide, 2)))
        found: Tensor = self.last(self.out(torch.cat([wide, deep], 1)))
        return found


class SqueezeExcite(nn.Module):
    """Channels are weighed by what the picture as a whole shows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = _block(3, 16), _block(16, 16, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.out, self.head = _block(16, 8, 1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.depth(self.stem(x))
        weights = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return _scores(self.head, self.out(x * torch.sigmoid(weights)))


class Grouped(nn.Module):
    """Norms and convolutions by groups: only whole groups can go."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, 1, 1), nn.GroupNorm(4, 16)
        self.groups, self.head = nn.Conv2d(16, 32, 3, 1, 1, groups=4), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return _scores(self.head, F.silu(self.groups(F.silu(self.norm(self.conv(x))))))


def vgg() -> nn.Module:
    """Convolutions in a row, and a classifier that reads every place of every channel."""
    return nn.Sequential(
        _block(3, 8), nn.MaxPool2d(2), _block(8, 16), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, CLASSES),
    )  # fmt: skip


FAMILIES: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "vgg": vgg, "resnet": ResNet, "densenet": DenseNet, "inception": Inception, "shufflenet": ShuffleNet,
        "unet": UNet, "squeeze_excite": SqueezeExcite, "grouped": Grouped,
    }
)  # fmt: skip


def family(name: str) -> nn.Module:
    """A new model of a family in eval mode, the same at each call; KeyError for an unknown name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)  # type: ignore[arg-type]  # None only without statistics
                nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return model.eval()


@functools.cache
def pictures(count: int) -> Tensor:
    """Random pictures (count, 3, 16, 16), the same at each call."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def _block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(*_norm(inputs, outputs, kernel, stride, groups), nn.ReLU())


def _scores(head: nn.Linear, x: Tensor) -> Tensor:
    found: Tensor = head(x.mean((2, 3)))
    return found
