"""What the calibration examples told of a layer, as far as a rounding can use it.

Shapes: the weight is (O, I), output channels by inputs of one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Seen:
    """Statistics of one layer's inputs x (I,), the inputs that it will get: those of the model as changed so far."""

    energy: torch.Tensor | None = None
    """(I,) mean square of each input: the diagonal of gram."""
    gram: torch.Tensor | None = None
    """(I, I) mean of x x^T."""
    cross: torch.Tensor | None = None
    """(I, I) mean of x_original x^T, x_original being the same example's input in the original model; None: it is x."""
    rows: torch.Tensor | None = None
    """(O,) importance of each output channel. Roundings that treat each channel by itself have no use for it."""
