"""What a method gets besides the model, the site and its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from flyweight.analysis.gram import Moments
from flyweight.analysis.sites import SiteStatistics
from flyweight.records import Batch


def unheard(note: str) -> None:
    """Nobody listens."""


def _unseen(site: str) -> None:
    """Nothing is known of any site."""
    return


@dataclass(frozen=True)
class Context:
    """What is known of the model's sites."""

    statistics: Mapping[str, SiteStatistics] = field(default_factory=dict)
    """Per site, from the one streamed pass over the examples."""
    gram: Callable[[str], torch.Tensor | None] = _unseen
    """The mean outer product of a site's inputs, (I, I), or (P, I, I) of P groups of a convolution; None: not known."""
    cross: Callable[[str], torch.Tensor | None] = _unseen
    """The mean outer product of a site's inputs in the original with its new ones, shaped as gram; None: they are equal."""
    moments: Callable[[str], tuple[Moments, Moments] | None] = _unseen
    """A site's inputs and the original's, on examples that teach and on others that judge; None: not known."""
    rows: Callable[[str], torch.Tensor | None] = _unseen
    """What each output channel of a site counts for the model's output, (O,), as `analysis.fisher` says; None: not known."""
    examples: Sequence[Batch] = ()
    """If any, layers that learn from their inputs are changed in order, each learning behind the changes before it."""
    original: nn.Module | None = None
    """The model as it was before any step, for methods that change structure."""
    rebuilding: bool = False
    """A stored artifact is rebuilt: only the structure counts, its weights are loaded afterwards."""
    say: Callable[[str], None] = unheard
    """Takes a note on what a method did otherwise than one would think, for the notes of the result."""
    training: bool = False
    """The model will be trained: layers that learn keep what they need for it, until `transforms.frozen`."""
