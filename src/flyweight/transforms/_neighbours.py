"""Finds layers between which scales can move at no cost: those that read one tensor, and what gives it.

A norm or linear layer gives; linear layers read, directly or behind operations that keep the proportion to each of its
channels (views, products with other tensors, ReLU, attention's mixing of values). What `_covariance` finds in passes over
some examples is proven by numbers: scaling every such channel by a power of two must leave the model's output as it was.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flyweight.analysis.calls import unfused
from flyweight.inputs.check import run
from flyweight.records import Batch
from flyweight.transforms._copies import view
from flyweight.transforms._covariance import Channels, Findings, Follow, matrices

_SLACK = 16
"""Times the type's rounding that outputs may differ by, relative to their norm, and still count as equal."""


@dataclass(frozen=True, eq=False)
class Link:
    """A layer that gives a tensor, and all that read it."""

    giver: str
    free: torch.Tensor
    """(C,) bool: the giver's output channels that can be scaled."""
    readers: Mapping[str, torch.Tensor]
    """By linear layer, in the order in which they run: (I,) int64, the giver's channel that each input is proportional to."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """What can be scaled, and why the rest cannot."""

    links: tuple[Link, ...]
    reasons: Mapping[str, str]
    """By path of a layer, why its inputs cannot be scaled."""
    turned: Mapping[str, bool]
    """By linear layer, whether its weight is (outputs, inputs)."""

    def before(self, path: str) -> Link | str:
        """The link that a layer reads from, or why there is none."""
        for link in self.links:
            if path in link.readers:
                return link
        return self.reasons.get(path, "it was not seen to read anything, or its weight is shared")


def find(model: nn.Module, examples: Sequence[Batch]) -> Neighbours:
    """The links of a model in eval mode, as passes over the first and the last example show them; it is not changed."""
    model, found = view(model, {}).eval(), Findings()
    few = [examples[0], examples[-1]][: len(examples)]
    outputs = [_followed(model, batch, found) for batch in few]
    missed = set(matrices(model)) - set(found.reads) - set(found.misused)
    if found.branches and missed:
        reason = (
            f"the model decides by values which layers run, and no example followed reached {min(missed)}"
        )
        return Neighbours((), dict.fromkeys(found.reads, reason), found.turned)
    return _proven(model, few, outputs, _linked(found))


def _followed(model: nn.Module, batch: Batch, found: Findings) -> list[torch.Tensor]:
    """The tensors of a model's output; findings take what the pass told."""
    with unfused(), Follow(model, found) as follow:
        outputs = list(_leaves(run(model, batch), set()))
    for leaf in outputs:
        found.freeze(follow.of(leaf), "it is an output of the model")
    return outputs


def scaled(
    model: nn.Module, factors: Sequence[tuple[Link, torch.Tensor]], turned: Mapping[str, bool]
) -> dict[str, nn.Module]:
    """Copies of the layers of links, with each giver's channels divided by factors (C,) and its readers' inputs multiplied.

    A layer may read from one link and give to another. Computed in float64 and rounded to the layer's own type at once.
    """
    outputs: dict[str, torch.Tensor] = {}
    inputs: dict[str, torch.Tensor] = {}
    for link, factor in factors:
        outputs[link.giver] = factor
        inputs |= {path: factor[numbers] for path, numbers in link.readers.items()}
    return {
        path: _scaled(model.get_submodule(path), outputs.get(path), inputs.get(path), turned.get(path, True))
        for path in dict.fromkeys((*outputs, *inputs))
    }


def _scaled(
    module: nn.Module, output: torch.Tensor | None, inputs: torch.Tensor | None, turned: bool
) -> nn.Module:
    """A copy of a layer with its output channels divided by factors (O,) and its inputs multiplied by factors (I,)."""
    layer = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in layer.parameters(recurse=False):
            values = parameter.double()
            rows = values if turned or values.ndim == 1 else values.T
            if output is not None:
                rows = rows / (output if values.ndim == 1 else output[:, None])
            if inputs is not None and values.ndim > 1:
                rows = rows * inputs
            parameter.copy_(rows if turned or values.ndim == 1 else rows.T)
    return layer


def _linked(found: Findings) -> Neighbours:
    """The links that findings leave: every reader of a channel reads it always, and nothing else does."""
    for path, by in found.misused.items():
        found.freeze_layer(path, f"its weight is also used by {by}")
    reads = {path: _always(path, calls, found) for path, calls in found.reads.items()}
    links: dict[str, dict[str, torch.Tensor]] = {}
    reasons: dict[str, str] = {}
    for path, read in reads.items():
        if isinstance(read, str):
            reasons[path] = read
        elif _is_frozen(read, found):
            reasons[path] = f"{read.layer} gives its input, but {found.reasons[read.layer]}"
        else:
            links.setdefault(read.layer, {})[path] = read.numbers
    made = tuple(Link(giver, ~found.frozen[giver], readers) for giver, readers in links.items())
    return Neighbours(made, reasons, found.turned)


def _always(path: str, calls: Sequence[Channels | None], found: Findings) -> Channels | str:
    """What a layer reads in every call, or why it cannot be scaled; then what it reads is frozen."""
    known = [one for one in calls if one is not None]
    if not known:
        return "nothing gives its input in proportion to channels of its own"
    alike = all(one.layer == known[0].layer and torch.equal(one.numbers, known[0].numbers) for one in known)
    if path in found.misused:
        reason = f"its weight is also used by {found.misused[path]}"
    elif alike and (len(known) == len(calls) or _is_frozen(known[0], found)):
        return known[0]
    else:
        reason = "it reads other tensors in other calls"
    for one in known:
        found.freeze(one, f"{path} reads it, and cannot be scaled: {reason}")
    return reason


def _is_frozen(channels: Channels, found: Findings) -> bool:
    return bool(found.frozen[channels.layer][channels.numbers].all())


def _proven(
    model: nn.Module, examples: Sequence[Batch], outputs: Sequence[Sequence[torch.Tensor]], found: Neighbours
) -> Neighbours:
    """The neighbours without links that change the model's outputs when they are scaled."""

    def same(links: Sequence[Link]) -> bool:
        other = view(model, scaled(model, [(link, _drawn(link)) for link in links], found.turned))
        with unfused():
            return all(
                _close(wanted, list(_leaves(run(other, batch), set())))
                for batch, wanted in zip(examples, outputs, strict=True)
            )

    if not found.links or same(found.links):
        return found
    good = tuple(link for link in found.links if same((link,)))
    if not same(good):
        good = ()
    lost = {path for link in found.links if link not in good for path in link.readers}
    said = dict.fromkeys(lost, "scaling its input and what gives it changes the model's output")
    return dataclasses.replace(found, links=good, reasons={**found.reasons, **said})


def _drawn(link: Link) -> torch.Tensor:
    """A half, 1 or 2 for each free channel, drawn at random: factors that floats are multiplied with exactly."""
    source = torch.Generator().manual_seed(len(link.free))
    drawn = torch.exp2(torch.randint(-1, 2, link.free.shape, generator=source).double())
    return torch.where(link.free, drawn, 1.0)


def _close(wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> bool:
    """Whether the tensors of two outputs are equal but for rounding."""
    for one, two in zip(wanted, found, strict=True):
        if one.is_floating_point():
            gap = torch.where(one == two, 0.0, one.float() - two.float())  # equal infinities are no gap
            size = one.float().nan_to_num(posinf=0.0, neginf=0.0).norm()
            if not float(gap.norm()) <= _SLACK * torch.finfo(one.dtype).eps * float(size):
                return False
    return True


def _leaves(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors in an output, whatever holds them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, str | type | nn.Module):
        seen.add(id(value))
        parts = value.values() if isinstance(value, Mapping) else value
        if not isinstance(parts, Iterable):
            parts = getattr(value, "__dict__", {}).values()
        for part in parts:
            yield from _leaves(part, seen)
