"""Similar rows of a table or a layer share one stored row; a map says which, and a factor for each row how much of it.

Tables of rare words, and heads with many outputs, hold rows that point the same way (in Shi et al., "Compositional
embeddings", arXiv 1909.02107, 2020, rows share without being alike). Rows go one after another to the first stored row to
which their cosine reaches the threshold; that becomes their common direction. A layer multiplies with stored rows only. Tied
modules share rows, map and factors. The stored rows are a layer of their own, `kept`, for later stages.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import normalize

from flyweight.codes._options import require
from flyweight.errors import UsageError
from flyweight.records import Batch, Plan, Site, Step
from flyweight.transforms._contract import Context
from flyweight.transforms._copies import substitute
from flyweight.transforms._quantized import Decoded

KEPT = "kept"
"""The layer of the stored rows, inside the new module."""
INSIDE = (KEPT,)
_BLOCK = 1024
"""Rows that are compared at a time."""
_PLACE = 4
"""Bytes of a row's place in the map."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How alike."""

    threshold: float = 0.95
    """The least cosine of a row and the stored one that it is given, in (0, 1]."""
    rows: int = 0
    """How many rows are stored: written by `transforms.complete`; 0: as many as it takes."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(0 < self.threshold <= 1, "threshold", "in (0, 1]", self.threshold)
        require(self.rows >= 0, "rows", "at least 0", self.rows)


class SharedRows(nn.Module):
    """A table or layer of fewer rows, read as one of many."""

    places: torch.Tensor

    def __init__(
        self, kept: nn.Module, places: torch.Tensor, scale: nn.Parameter, bias: nn.Parameter | None
    ) -> None:
        """kept: the table or layer (K, I), without a bias; places: (O,) int32 below K; scale, bias: (O,)."""
        super().__init__()
        self.kept, self.scale, self.bias = kept, scale, bias
        self.looked_up = isinstance(kept, nn.Embedding)
        self.register_buffer("places", places)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the table or layer of all rows gives."""
        if self.looked_up:
            rows: torch.Tensor = self.kept(self.places[x].long())
            return rows * self.scale[x].unsqueeze(-1)
        found: torch.Tensor = self.kept(x).index_select(-1, self.places) * self.scale
        return found if self.bias is None else found + self.bias

    @property
    def weight(self) -> torch.Tensor:
        """All rows (O, I), for code that asks for them."""
        stored: torch.Tensor = self.kept.weight  # type: ignore[assignment]
        return (stored.index_select(0, self.places) * self.scale[:, None]).as_subclass(Decoded)


def levels(site: Site) -> Sequence[Options]:
    """None at a layer by itself: `proposals` says where rows are alike."""
    return ()


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why rows of a layer cannot be shared, or None; whether they are alike, `complete` tells."""
    return None if _plain(module) else "rows are those of embeddings and linear layers of PyTorch"


def closeness(options: Options) -> float:
    """How far outputs may move: rows may be as unlike as the threshold says."""
    return math.inf


def proposals(model: nn.Module, examples: Sequence[Batch]) -> Iterator[Plan]:
    """A plan for each table or layer that gets smaller where rows at an angle of up to 60 degrees are shared."""
    named: set[str] = set()
    for path in sorted(
        dict(model.named_modules()), key=lambda path: isinstance(model.get_submodule(path), nn.Embedding)
    ):
        with contextlib.suppress(UsageError):
            holders = _holders(model, path)  # of a tied weight, the layer that multiplies with it is the site
            if named.isdisjoint(holders):
                named |= {*holders}
                done = complete(model, {path: Options(threshold=0.5)}, Context())
                yield Plan((Step("share_rows", path, {"threshold": 0.5, "rows": done[path].rows}),))


def complete(model: nn.Module, options: Mapping[str, Options], context: Context) -> Mapping[str, Options]:
    """The options by layer, with the number of rows that are stored; no examples are needed.

    Raises UsageError for what is no layer of plain rows, and where sharing them would save nothing.
    """
    return {
        path: chosen if chosen.rows else _counted(model, path, chosen) for path, chosen in options.items()
    }


def cut(model: nn.Module, options: Mapping[str, Options], context: Context) -> nn.Module:
    """A new model in eval mode with shared rows; raises as `complete` does, and for a completed step of other weights."""
    changes: dict[str, nn.Module] = {}
    for path, chosen in complete(model, options, context).items():
        holders = _holders(model, path)
        weight = model.get_submodule(path).get_parameter("weight").detach()
        if context.rebuilding:
            places = torch.zeros(len(weight), dtype=torch.int64)
            kept, scale = weight.new_zeros(chosen.rows, weight.shape[1]), weight.new_ones(len(weight))
        else:
            places = grouped(weight, chosen.threshold)
            kept, scale = _fitted(weight, places)
        if len(kept) != chosen.rows:
            raise UsageError(f"a completed step stores {chosen.rows} rows", got=f"{len(kept)}", where=path)
        shared = nn.Parameter(kept), places.int(), nn.Parameter(scale)
        changes |= {holder: _module(model.get_submodule(holder), *shared) for holder in holders}
    return substitute(model, changes).eval()


def left(known: Mapping[str, Site], site: str, options: Options) -> Mapping[str, Site]:
    """The layers that are sites afterwards: that of the stored rows, tied as all of them were.

    Raises UsageError where the weight is a site by another of its modules' names.
    """
    other = next((name for name, one in known.items() if site in one.tied), None)
    if other is not None:
        raise UsageError("a tied weight goes by one name", got=site, where=site, way_out=f"name {other}")
    found: dict[str, Site] = {}
    for name, one in known.items():
        tied = tuple(f"{path}.{KEPT}" for path in one.tied) if name == site else one.tied
        new = f"{name}.{KEPT}" if name == site else name
        found[new] = dataclasses.replace(one, name=new, tied=tied)
    return found


def grouped(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """For each row of a weight (O, I) the group that it is in, (O,) int64: the first whose first row it is as near to."""
    units = normalize(weight.float(), dim=1)
    firsts, places = units[:0], torch.zeros(len(units), dtype=torch.int64)
    for start in range(0, len(units), _BLOCK):
        block = units[start : start + _BLOCK]
        near = block @ firsts.T >= threshold
        found = (
            torch.where(near.any(1), near.int().argmax(1), -1)
            if len(firsts)
            else torch.full((len(block),), -1)
        )
        found[block.square().sum(1) == 0] = 0  # a row of zeros is nothing of any other
        alike = block @ block.T >= threshold
        for row in range(len(block)):
            if found[row] < 0:
                found[(found < 0) & alike[row]] = len(firsts)
                found[row] = len(firsts)
                firsts = torch.cat([firsts, block[row : row + 1]])
        places[start : start + _BLOCK] = found
    return places


def _fitted(weight: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The common direction (K, I) of each group, and how much of it each row is, (O,)."""
    units = normalize(weight.float(), dim=1)
    sums = torch.zeros(int(places.max()) + 1, weight.shape[1]).index_add(0, places, units)
    kept = normalize(sums, dim=1)
    return kept.to(weight.dtype), (weight.float() * kept[places]).sum(1).to(weight.dtype)


def _counted(model: nn.Module, path: str, chosen: Options) -> Options:
    """The options with how many rows are stored."""
    _holders(model, path)
    weight = model.get_submodule(path).get_parameter("weight").detach()
    rows = int(grouped(weight, chosen.threshold).max()) + 1
    width = weight.element_size()
    before = weight.numel() * width
    after = rows * weight.shape[1] * width + len(weight) * (_PLACE + width)
    if after >= before:
        got = f"{rows} of {len(weight)} rows stay, {after:,} bytes with their map, {before:,} without"
        raise UsageError(
            "shared rows must be smaller", got=got, where=path, way_out="choose a lower threshold"
        )
    return dataclasses.replace(chosen, rows=rows)


def _holders(model: nn.Module, path: str) -> list[str]:
    """The paths of all modules that hold a layer's weight, its own first; UsageError where one is no layer of plain rows."""
    known = dict(model.named_modules(remove_duplicate=False))
    module = known.get(path)
    if not path or module is None or not _plain(module):
        rule = "rows are those of embeddings and linear layers of PyTorch"
        raise UsageError(rule, got=repr(path) if module is None else type(module).__name__, where=path)
    weight = module.get_parameter("weight")
    holders = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
    others = [one for name in holders if (one := name.removesuffix(".weight")) != path]
    odd = [one for one in others if one not in known or not _plain(known[one])]
    if odd:
        raise UsageError("all who hold a weight must read its rows", got=f"{odd[0]} does not", where=path)
    return [path, *others]


def _plain(module: nn.Module) -> bool:
    """Whether a module looks up rows, or multiplies with them, and nothing else."""
    if isinstance(module, nn.Embedding):
        return module.max_norm is None
    return type(module).forward is nn.Linear.forward


def _module(module: nn.Module, kept: nn.Parameter, places: torch.Tensor, scale: nn.Parameter) -> SharedRows:
    """A module of the stored rows that does with them what a module did with all."""
    bias = module._parameters.get("bias")
    fewer = copy.deepcopy(module, {id(module.weight): None, id(bias): None})
    fewer.register_parameter("weight", kept)
    if isinstance(fewer, nn.Embedding):
        fewer.num_embeddings, fewer.padding_idx = len(kept), None
    elif isinstance(fewer, nn.Linear):
        fewer.out_features = len(kept)
    own = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return SharedRows(fewer, places, scale, own).train(module.training)
