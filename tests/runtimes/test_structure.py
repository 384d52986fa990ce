"""Outputs taken apart and put together again."""

from __future__ import annotations

import collections
import json

import pytest
import torch
from runtimes import nets

from flyweight.errors import ModelError
from flyweight.runtimes import _structure

A, B = torch.zeros(1), torch.ones(2)
Pair = collections.namedtuple("Pair", "first second")
OUTPUTS = [
    A, (A, B), [A, (B, None)], {"x": A, "y": {"z": [B]}}, Pair(A, B), nets.Answer(A, (B, [A])), {"n": 3, "s": "a", "t": A},
    collections.OrderedDict(x=A), (), torch.return_types.max((A, B)),
]  # fmt: skip


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: type(output).__name__)
def test_rebuilt_outputs_are_the_same(output: object) -> None:
    leaves = _structure.leaves(output)
    found = _structure.rebuild(output, iter([leaf + 1 for leaf in leaves]))
    assert type(found) is type(output)
    assert _structure.describe(found) == _structure.describe(output)
    for one, other in zip(leaves, _structure.leaves(found), strict=True):
        assert torch.equal(one + 1, other)


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: type(output).__name__)
def test_described_outputs_go_through_json(output: object) -> None:
    described = json.loads(json.dumps(_structure.describe(output)))
    found = _structure.restore(described, iter(_structure.leaves(output)))
    assert [id(leaf) for leaf in _structure.leaves(found)] == [id(leaf) for leaf in _structure.leaves(output)]


def test_other_outputs_are_refused_by_type() -> None:
    with pytest.raises(ModelError, match="got set"):
        _structure.leaves({A})
