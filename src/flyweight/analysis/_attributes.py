"""Which of a model's own numbers go into which operations: attributes that have to change when a width changes.

A copy of the model holds numbers that remember which attribute they come from. Where a product of such numbers reaches an
operation, the operation's node in the graph is marked with it. Numbers that the code takes from a tensor's shape need no
mark: they follow by themselves.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
import torch.fx.traceback
import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.overrides import TorchFunctionMode

from flyweight.analysis.calls import ATTENTION

Factor: TypeAlias = tuple[str, int]
"""An attribute, as "path.of.module:name" or "path.of.module:name.name", and its value; a plain number has no name."""
Terms: TypeAlias = tuple[tuple[Factor, ...], ...]
"""A sum of products."""
Mark: TypeAlias = tuple[int, Terms]
"""How many numbers the operation got before this one, and what this one is made of."""
_MARKS = "flyweight_sizes"


class Known(int):
    """A number with the attributes that it is a sum of products of."""

    terms: Terms

    def __mul__(self, other: Any) -> Any:
        """A product of whole numbers remembers what both are made of."""
        return _product(self, other) if isinstance(other, int) else int(self) * other

    def __rmul__(self, other: Any) -> Any:
        return _product(other, self) if isinstance(other, int) else other * int(self)

    def __add__(self, other: Any) -> Any:
        """A sum of whole numbers remembers what both are made of."""
        return _sum(self, other) if isinstance(other, int) else int(self) + other

    def __radd__(self, other: Any) -> Any:
        return _sum(other, self) if isinstance(other, int) else other + int(self)


def known(value: int, terms: Terms) -> Known:
    """A number with what it is made of."""
    number = Known(value)
    number.terms = terms
    return number


def remembering(model: nn.Module) -> nn.Module:
    """A copy on the same tensors, whose modules' whole numbers, and those of their plain objects, remember their names."""
    held = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    found = copy.deepcopy(model, held)
    for path, module in found.named_modules():
        _remember(vars(module), f"{path}:")
        for name, value in list(vars(module).items()):
            if not name.startswith("_") and _is_record(value):
                vars(module)[name] = own = copy.copy(value)
                _remember(vars(own), f"{path}:{name}.")
    return found


class Marking(TorchFunctionMode):
    """Marks the graph's nodes with the attributes that reach their operations."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, with a mark where there is something to remember."""
        named = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return ATTENTION(*args, **named)
        numbers = enumerate(_numbers((args, tuple(named.values()))))
        found = tuple((place, n.terms) for place, n in numbers if isinstance(n, Known) and n > 1)
        if not found:
            return func(*args, **named)
        with torch.fx.traceback.annotate({_MARKS: found}):
            return func(*args, **named)


def marks(node: Node) -> tuple[Mark, ...]:
    """What is known of the numbers of a node's operation."""
    found: tuple[Mark, ...] = node.meta.get("custom", {}).get(_MARKS, ())
    return found


def _product(one: int, two: int) -> Known:
    return known(int(one) * int(two), tuple((*a, *b) for a in _terms(one) for b in _terms(two)))


def _sum(one: int, two: int) -> Known:
    return known(int(one) + int(two), (*_terms(one), *_terms(two)))


def _terms(number: int) -> Terms:
    if isinstance(number, Known):
        return number.terms
    return ((("", int(number)),),) if number else ()


def _remember(held: dict[str, Any], before: str) -> None:
    for name, value in held.items():
        if type(value) is int:
            held[name] = known(value, (((before + name, value),),))


def _is_record(value: Any) -> bool:
    """Whether it is an object with plain attributes, as configurations are."""
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, nn.Module | torch.Tensor | type)
        and not callable(value)
    )


def _numbers(values: Iterable[Any]) -> Iterator[int]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _numbers(value)
        elif isinstance(value, slice):
            yield from _numbers((value.start, value.stop))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield value
