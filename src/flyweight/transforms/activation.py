"""Activation functions replaced by cheaper ones: ReLU, or piecewise ones in the place of those with exponentials.

As in Howard et al., "Searching for MobileNetV3" (arXiv 1905.02244, 2019), which has h-swish for swish. A step's site is a
module without parameters that treats each value of its input by itself. Which of the cheaper ones takes its place is told by
what it does to the model's output.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from flyweight.analysis.influence import Passage, answers_of, damage, passages
from flyweight.codes._options import require_one_of
from flyweight.errors import FlyweightError, ModelError, UsageError, foreign
from flyweight.records import Batch, Plan, Site, Step
from flyweight.transforms._contract import Context
from flyweight.transforms._copies import substitute, view

CHEAPER: Mapping[str, type[nn.Module]] = MappingProxyType(
    {"relu": nn.ReLU, "hard_swish": nn.Hardswish, "hard_sigmoid": nn.Hardsigmoid, "hard_tanh": nn.Hardtanh}
)
"""What takes the place of an activation function, by name."""
_CHEAP = (*CHEAPER.values(), nn.ReLU6, nn.LeakyReLU, nn.Identity)
_EXAMPLES = 4
"""Examples on which the output is compared."""
_NO_FUNCTION = "an activation function is a module without parameters that treats each value by itself"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What takes its place."""

    by: str = ""
    """A name in CHEAPER; empty: the one that changes the model's output least."""

    def __post_init__(self) -> None:
        """Check the name."""
        require_one_of(self.by, "by", ("", *CHEAPER))


def levels(site: Site) -> Sequence[Options]:
    """None at a layer: `proposals` says which functions there are."""
    return ()


def refuse(site: Site, options: Options, module: nn.Module) -> str | None:
    """Why no layer can be a site of this method."""
    return _NO_FUNCTION


def closeness(options: Options) -> float:
    """How far outputs may move: another function may change anything."""
    return math.inf


def proposals(model: nn.Module, examples: Sequence[Batch]) -> Iterator[Plan]:
    """One plan: every activation function that is not among the cheaper ones, if there is any."""
    model = copy.deepcopy(model).eval()
    seen = passages(model, examples)
    steps = [Step("activation", path) for path in seen if not _misfit(model, path, seen[path])]
    yield from [Plan(tuple(steps))] if steps else []


def complete(model: nn.Module, options: Mapping[str, Options], context: Context) -> Mapping[str, Options]:
    """The options by site, with the function that changes the model's output least.

    Raises UsageError for what is no activation function, or one of the cheaper ones already, or without examples.
    """
    open_ones = [path for path, chosen in options.items() if not chosen.by]
    if not open_ones:
        return options
    if not len(context.examples):
        raise UsageError("a function is chosen by examples", got="none", where=open_ones[0])
    model, examples = copy.deepcopy(model).eval(), context.examples[:_EXAMPLES]
    seen = passages(model, examples)
    done = {**options}
    for path in open_ones:
        reason = _misfit(model, path, seen.get(path))
        if reason:
            raise UsageError(_NO_FUNCTION, got=reason, where=path)
        found = damages(model, path, examples)
        done[path] = dataclasses.replace(options[path], by=min(found, key=lambda name: found[name]))
    return done


def damages(model: nn.Module, path: str, examples: Sequence[Batch]) -> dict[str, float]:
    """What each of the cheaper functions at a module's place does to the output of a model in eval mode, by name."""
    wanted = answers_of(model, examples)
    return {
        name: damage(wanted, answers_of(view(model, {path: make()}), examples))
        for name, make in CHEAPER.items()
    }


def cut(model: nn.Module, options: Mapping[str, Options], context: Context) -> nn.Module:
    """A new model in eval mode with the other functions; raises as `complete` does."""
    known = dict(model.named_modules())
    for path in options:
        if not path or path not in known or list(known[path].parameters()):
            raise UsageError(_NO_FUNCTION, got=repr(path), where=path)
    decided = complete(model, options, context)
    return substitute(model, {path: CHEAPER[chosen.by]() for path, chosen in decided.items()}).eval()


def _misfit(model: nn.Module, path: str, seen: Passage | None) -> str:
    """Why a module is no activation function that could be replaced; empty where it is one."""
    if seen is None:
        return "it is no module that runs on the examples"
    module = model.get_submodule(path)
    if isinstance(module, _CHEAP):
        return f"{type(module).__name__} is cheap already"
    if any(True for _ in module.parameters()) or module._buffers or module._modules or seen.elements:
        return f"{type(module).__name__} holds or gives more than that"
    return "" if _by_value(module) else f"{type(module).__name__} changes no value, or not each by itself"


def _by_value(module: nn.Module) -> bool:
    """Whether a module gives for each value of its input what it gives for that value alone, and not the value itself."""
    x = torch.linspace(-4, 4, 24).view(2, 3, 4)
    with contextlib.suppress(FlyweightError), foreign(ModelError, "it must take any tensor"), torch.no_grad():
        whole = module(x.clone())
        each = torch.cat([module(value.view(1, 1, 1)).flatten() for value in x.flatten()]).view(x.shape)
        return bool(torch.allclose(whole, each, atol=1e-6)) and not torch.equal(whole, x)
    return False
