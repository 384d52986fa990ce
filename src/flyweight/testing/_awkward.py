"""The zoo's own modules. In shapes, B counts samples, L places, C channels, D the width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Answer:
    """An output that is a record."""

    logits: Tensor
    hidden: Tensor


class TiedLanguageModel(nn.Module):
    """(B, L) token numbers -> (B, L, vocabulary); the head's weight is the embedding's."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token."""
        hidden: Tensor = functional.gelu(self.mix(self.embed(tokens)))
        logits: Tensor = self.head(hidden)
        return logits


class TiedProducts(nn.Module):
    """(B, L) token numbers -> (B, L, vocabulary); an embedding, a layer and a head of another bias hold one square weight."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(vocabulary, vocabulary), nn.Linear(vocabulary, vocabulary)
        self.head = nn.Linear(vocabulary, vocabulary)
        self.mix.weight = self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token."""
        logits: Tensor = self.head(functional.gelu(self.mix(self.embed(tokens))))
        return logits


class CalledTwice(nn.Module):
    """(B, D) -> (B, D); one layer is called twice with different inputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The layer over itself."""
        y: Tensor = self.out(torch.tanh(self.layer(torch.tanh(self.layer(x)))))
        return y


class TwoHeads(nn.Module):
    """(B, D) -> a "dict", "tuple" or "record" of logits (B, 3) and hidden (B, D)."""

    def __init__(self, width: int, form: str) -> None:
        super().__init__()
        self.body, self.head, self.form = nn.Linear(width, width), nn.Linear(width, 3), form

    def forward(self, x: Tensor) -> dict[str, Tensor] | tuple[Tensor, Tensor] | Answer:
        """Logits and hidden in the chosen form."""
        hidden = torch.relu(self.body(x))
        logits = self.head(hidden)
        if self.form == "dict":
            return {"logits": logits, "hidden": hidden}
        return (logits, hidden) if self.form == "tuple" else Answer(logits, hidden)


class Branching(nn.Module):
    """(B, D) -> (B, 3); which head answers depends on the values of the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.one, self.other = nn.Linear(width, width), nn.Linear(width, 3), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """The answer of one head."""
        hidden = torch.relu(self.body(x))
        chosen = self.one if float(x.sum()) > 0 else self.other
        logits: Tensor = chosen(hidden)
        return logits


class Recurrent(nn.Module):
    """(B, L, D) -> (B, 3) from the last place of what a recurrent layer makes of it."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear((1 + layer.bidirectional) * (layer.proj_size or layer.hidden_size), 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.layer(x)[0][:, -1])
        return logits


class CellByCell(nn.Module):
    """(B, L, D) -> (B, 3): a GRU's cell runs place after place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        state = torch.zeros_like(x[:, 0])
        for place in x.unbind(1):
            state = self.cell(place, state)
        logits: Tensor = self.head(state)
        return logits


class Residual(nn.Module):
    """(B, C, H, W) -> (B, 3): two blocks whose input is added to their output."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
            for _ in range(2)
        )
        self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = torch.relu(x + self.first(x))
        x = torch.relu(x + self.second(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class LengthMean(nn.Module):
    """(B, C, L) -> (B, C): the mean over the length."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean."""
        return x.mean(-1)


class Recommender(nn.Module):
    """users (B,) and items (B, L) by number -> (B,) scores; nearly all weights are tables."""

    def __init__(self, users: int, items: int, width: int) -> None:
        super().__init__()
        self.user, self.history = nn.Embedding(users, width), nn.EmbeddingBag(items, width, mode="mean")
        self.tower = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """One score for each user with the items seen."""
        scores: Tensor = self.tower(torch.cat([self.user(users), self.history(items)], dim=1))
        return scores.squeeze(1)


class SelfAttention(nn.Module):
    """(B, L, D) -> (B, 3) by nn.MultiheadAttention, which reads its layers' weights without calling them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
        return logits


class CrossAttention(nn.Module):
    """(B, L, D) -> (B, 3): attention to other places than its own, by one packed weight and by three."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.packed = nn.MultiheadAttention(width, 2, batch_first=True)
        self.apart = nn.MultiheadAttention(width, 2, batch_first=True, kdim=width // 2, vdim=width // 2)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        memory, half = torch.tanh(x), x[..., : x.shape[-1] // 2]
        hidden = self.packed(x, memory, memory, need_weights=False)[0]
        logits: Tensor = self.head(self.apart(hidden, half, half, need_weights=False)[0].mean(1))
        return logits


class FirstPlace(nn.Module):
    """(B, L, D) -> (B, D): the first place of each sequence."""

    def forward(self, x: Tensor) -> Tensor:
        """The first place."""
        return x[:, 0]


class BareParameter(nn.Module):
    """(B, D) -> (B, 3); parameters that belong to no layer are multiplied with in several ways, and one is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, width))
        self.columns, self.rows = (nn.Parameter(torch.randn(width, width) / 4) for _ in range(2))
        self.offsets = nn.Parameter(torch.randn(1, width))
        self.body = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        hidden = torch.relu(self.body(x) + self.offsets) @ self.columns
        return functional.linear(torch.relu(torch.matmul(hidden, self.rows.T)), self.matrix)


class Scaled(nn.Module):
    """(B, D) -> (B, D): a linear layer on inputs that a buffer scales."""

    def __init__(self, width: int, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        y: Tensor = self.layer(x * self.get_buffer("scale"))
        return y


class ConcatSplit(nn.Module):
    """(B, C, H, W) -> (B, C): two branches put together, taken apart elsewhere, and multiplied."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.narrow = nn.Conv2d(channels, channels, 1)
        self.after = nn.Conv2d(3 * channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The mean over places of the gated half."""
        together = torch.cat([torch.relu(self.wide(x)), self.narrow(x)], dim=1)
        value, gate = self.after(together).split(x.shape[1], dim=1)
        gated: Tensor = value * torch.sigmoid(gate)
        return gated.mean((2, 3))


class Compare(nn.Module):
    """Two inputs (B, D) -> (B,): the same encoder reads both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.head = nn.Bilinear(width, width, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """One score for each pair."""
        scores: Tensor = self.head(self.encoder(left), self.encoder(right))
        return scores.squeeze(1)
