"""Models that several tests export: one export each, since that takes seconds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from flyweight import discover, transforms
from flyweight.analysis.bare import layer_at
from flyweight.analysis.sites import analyse
from flyweight.records import Batch, Plan, Step
from flyweight.runtimes._files import Predictor
from flyweight.transforms import Context, _options


@dataclass
class Answer:
    """An output that is a record."""

    logits: torch.Tensor
    parts: tuple[torch.Tensor, list[torch.Tensor]]
    nothing: None = None
    number: float = 3.5


class Words(nn.Module):
    """Tokens (B, L) -> a record; a tied head, three linear layers and a table of places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(40, 32), nn.Embedding(16, 32)
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, unused: torch.Tensor) -> Answer:
        x = self.embed(tokens) + self.places(torch.arange(tokens.shape[1]))
        x = x + self.b(torch.relu(self.a(input=x))) * mask[..., None]
        return Answer(self.head(self.c(x)), (x.mean(1), [mask.sum()]))


class Pictures(nn.Module):
    """Three convolutions with norms, one padded by hand, a sum and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.m = nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.c, self.o = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.n(self.a(x)))
        x = torch.relu(self.m(self.b(functional.pad(x, (1, 1, 1, 1)))))
        x = functional.relu6(self.o(self.c(x)))
        return self.head(x.mean((2, 3)))


class Function(nn.Module):
    """A module whose forward is a function: models of one printed form that compute different things."""

    def __init__(self, body: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.body(self, *inputs)


@functools.cache
def words() -> nn.Module:
    torch.manual_seed(0)
    return Words().eval()


@functools.cache
def pictures() -> nn.Module:
    torch.manual_seed(0)
    model = Pictures()
    for norm in (model.n, model.m, model.o):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return model.eval()


def text(batch: int, length: int) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(batch)
    tokens = torch.randint(40, (batch, length), generator=source)
    return {"tokens": tokens, "mask": torch.ones(batch, length), "unused": torch.zeros(batch, 2)}


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(batch))


TEXTS, IMAGES = (text(1, 5), text(2, 7)), (images(1), images(4))
FOLDS = tuple(
    Step("fold_batch_norm", conv, {"norm": norm}) for conv, norm in (("a", "n"), ("b", "m"), ("c", "o"))
)


def changed(
    model: nn.Module, examples: Any, method: str, options: Any = None, folds: tuple[Step, ...] = ()
) -> nn.Module:
    """The model with a method at every site that takes it."""
    folded = transforms.apply(
        model, Plan(folds), [transforms.plain_site(model, f.site) for f in folds], Context()
    )
    analysis, module = analyse(folded, examples), discover.method("transforms", method)
    read = _options.read(module, options or {}, "")
    takes = [s for s in analysis.sites if module.refuse(s, read, layer_at(folded, s.name)) is None]
    steps = tuple(Step(method, site.name, options or {}) for site in takes)
    assert steps
    return transforms.apply(model, Plan((*folds, *steps)), analysis.sites, Context(analysis.statistics))


def prepared(runtime: str, model: nn.Module, examples: Any, where: Path) -> Predictor:
    found: Predictor = discover.method("runtimes", runtime).prepare(model, examples, where)
    return found


def gap(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Relative Euclidean distance."""
    return float((wanted - found).norm() / wanted.norm())


def first(batch: Batch) -> torch.Tensor:
    return batch if isinstance(batch, torch.Tensor) else next(iter(batch.values()))  # type: ignore[union-attr]
