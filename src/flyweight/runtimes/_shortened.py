"""Models of transformers whose layers were dropped, as their configs can say it: a shorter list, numbered anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from flyweight.errors import ModelError
from flyweight.transforms import view
from flyweight.transforms.drop import Dropped


def shortened(inner: nn.Module) -> tuple[nn.Module, Mapping[str, str]]:
    """The model without its dropped layers, and the old beginning of names by the new one; parameters are the model's own.

    Raises ModelError where something else than whole layers is gone: a config counts layers, and knows no parts of them.
    """
    gone = {path: module for path, module in inner.named_modules() if isinstance(module, Dropped)}
    if not gone:
        return inner, {}
    where = next(iter(gone)).rpartition(".")[0]
    layers = inner.get_submodule(where)
    config = cast(Any, inner).config
    odd = [path for path in gone if path.rpartition(".")[0] != where or gone[path].gives != "input"]
    if (
        odd
        or not isinstance(layers, nn.ModuleList)
        or getattr(config, "num_hidden_layers", None) != len(layers)
    ):
        raise ModelError(
            "a config of transformers says how many layers a model has, and nothing of parts that are gone",
            got=(odd or list(gone))[0],
            way_out="drop whole layers, or choose another runtime",
        )
    kept = [index for index, layer in enumerate(layers) if not isinstance(layer, Dropped)]
    found = view(inner, {where: nn.ModuleList(layers[index] for index in kept)})
    _count(cast(Any, found).config, len(layers), kept)
    return found, {f"{where}.{new}.": f"{where}.{old}." for new, old in enumerate(kept)}


def renamed(tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Tensors of a shortened model by the names of the model that it was made of."""
    starts = {key: next((new for new in names if key.startswith(new)), "") for key in tensors}
    return {names.get(new, "") + key.removeprefix(new): tensors[key] for key, new in starts.items()}


def _count(config: Any, before: int, kept: list[int]) -> None:
    """Make a config say how many layers are left; what it lists for each layer, it lists for those."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == before and name.startswith("layer"):
            setattr(config, name, type(value)(value[index] for index in kept))
    config.num_hidden_layers = len(kept)
