"""What can be scaled between layers: found where it can, refused with the reason where it cannot, and always exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flyweight.inputs.check import run
from flyweight.records import Batch
from flyweight.runtimes._structure import leaves
from flyweight.testing.zoo import ZOO, Zoo, missing
from flyweight.transforms import _neighbours
from flyweight.transforms._copies import view
from flyweight.transforms._neighbours import Link, find, scaled

pytestmark = pytest.mark.usefixtures("one_thread")


class Between(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.function, self.last = nn.Linear(4, 8), function, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def drawn(link: Link, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    factor = torch.exp(torch.randn(len(link.free), generator=source, dtype=torch.float64))
    return torch.where(link.free, factor, 1.0)


def distance(model: nn.Module, other: nn.Module, batch: Batch) -> float:
    pairs = zip(leaves(run(model, batch)), leaves(run(other, batch)), strict=True)
    return max(float((a - b).norm() / a.norm().clamp(min=1e-9)) for a, b in pairs if a.is_floating_point())


def told(function: Callable[[Tensor], Tensor], width: int = 8) -> Link | str:
    torch.manual_seed(1)
    return find(Between(function, width), [torch.randn(5, 4), torch.randn(2, 4)]).before("last")


KEPT: dict[str, tuple[Callable[[Tensor], Tensor], list[int]]] = {
    "nothing": (lambda x: x, list(range(8))),
    "relu": (torch.relu, list(range(8))),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.2), list(range(8))),
    "a product": (lambda x: x * torch.arange(1.0, 9.0), list(range(8))),
    "a product in place": (lambda x: x.mul_(3.0), list(range(8))),
    "a quotient": (lambda x: x / 7, list(range(8))),
    "turned round": (lambda x: x.flip(-1), list(range(8))[::-1]),
    "views": (lambda x: x.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8), [0, 4, 1, 5, 2, 6, 3, 7]),
    "a part": (lambda x: x[:, 2:5], [2, 3, 4]),
    "parts": (lambda x: torch.cat(x.chunk(2, -1)[::-1], -1), [4, 5, 6, 7, 0, 1, 2, 3]),
    "repeated": (lambda x: x[:, :3].repeat(1, 2), [0, 1, 2, 0, 1, 2]),
    "indices": (lambda x: x[:, torch.tensor([7, 7, 1])], [7, 7, 1]),
    "mixed samples": (lambda x: torch.softmax(torch.ones(len(x), len(x)), -1) @ x, list(range(8))),
    "added to itself": (lambda x: x + 2 * x, list(range(8))),
    "negated": (torch.neg, list(range(8))),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_keeps_the_proportion_is_followed(name: str) -> None:
    function, numbers = KEPT[name]
    link = told(function, len(numbers))
    assert isinstance(link, Link)
    assert link.giver == "first"
    assert link.readers["last"].tolist() == numbers


LOST: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "gelu": (F.gelu, "gelu reads its output"),
    "a sum": (lambda x: x + 1, "add reads its output"),
    "a sum in place": (lambda x: x.add_(1), "add_ reads its output"),
    "its square": (lambda x: x * x, "mul reads its output"),
    "a divisor": (lambda x: 1 / (x + 10), "add reads its output"),
    "mixed channels": (lambda x: x @ torch.ones(8, 8), "mm reads its output"),
    "neighbours summed": (lambda x: x + x.roll(1, -1), "add reads its output"),
    "softmax": (lambda x: x.softmax(-1), "_softmax reads its output"),
    "a copy into another": (lambda x: torch.zeros(len(x), 8).copy_(x), "copy_ reads its output"),
    "overwritten": (lambda x: x.fill_(1.0) * 2, "fill_ reads its output"),
    "a value read": (lambda x: x if float(x.sum()) > 1e9 else x * 2, "sum reads its output"),
    "a norm": (lambda x: F.layer_norm(x, (8,)), "a norm reads its output"),
    "rounded quotient": (lambda x: torch.div(x, 0.1, rounding_mode="floor"), "div reads its output"),
    "in integers": (lambda x: x.view(torch.int32).float(), "view reads its output"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_does_not_is_refused_with_the_operation(name: str) -> None:
    function, reason = LOST[name]
    found = told(function)
    assert isinstance(found, str)
    assert reason in found or "nothing gives" in found


def test_a_part_that_is_used_otherwise_is_frozen_and_the_rest_is_free() -> None:
    link = told(lambda x: torch.cat((x[:, :3].tanh(), x[:, 3:]), -1)[:, 3:], 5)
    assert isinstance(link, str)  # put together with what is in no proportion
    link = told(lambda x: x[:, 3:] * x[:, :3].tanh().sum(-1, keepdim=True), 5)
    assert isinstance(link, Link)
    assert link.free.tolist() == [False] * 3 + [True] * 5
    assert link.readers["last"].tolist() == [3, 4, 5, 6, 7]


class Tokens(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.one, self.two = norm, nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return self.one(normed) * self.two(normed).sigmoid()


class Gains(nn.Module):
    """A root mean square norm of a class that nobody knows, with its gain plain or around 1."""

    def __init__(self, around: float) -> None:
        super().__init__()
        self.gamma, self.around = nn.Parameter(torch.rand(8) + 0.5), around

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return normed * (self.gamma + self.around) if self.around else normed * self.gamma


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.RMSNorm(8), Gains(0.0)])
def test_norms_give_by_what_they_do(norm: nn.Module) -> None:
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 2)
    model, x = Tokens(norm).eval(), torch.randn(2, 5, 8)
    found = find(model, [x])
    assert [(link.giver, list(link.readers)) for link in found.links] == [("norm", ["one", "two"])]
    other = view(model, scaled(model, [(found.links[0], drawn(found.links[0]))], found.turned))
    assert distance(model, other, x) < 1e-6
    assert not torch.equal(other.one.weight, model.one.weight)


def test_a_gain_around_one_is_no_proportion() -> None:
    found = find(Tokens(Gains(1.0)).eval(), [torch.randn(2, 5, 8)])
    assert not found.links
    assert "nothing gives its input" in str(found.before("one"))


def test_a_norm_without_weight_gives_nothing() -> None:
    assert not find(Tokens(nn.LayerNorm(8, elementwise_affine=False)), [torch.randn(2, 8)]).links


class Shared(nn.Module):
    """A norm read by two layers, whose weights are one, or by one layer and the output."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.norm, self.one, self.two, self.case = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), case
        if case == "tied":
            self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Any:
        normed = self.norm(x)
        if self.case == "output":
            return {"sum": self.one(normed) + self.two(normed), "kept": [normed]}
        if self.case == "elsewhere":
            return self.one(normed) + self.two(normed) + self.two(x)
        if self.case == "weight":
            return self.one(normed) + self.two(normed) @ self.two.weight
        return self.one(normed) + self.two(normed)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("tied", "its weight is shared"),
        ("output", "it is an output of the model"),
        ("elsewhere", "two reads it, and cannot be scaled: it reads other tensors in other calls"),
        ("weight", "two reads it, and cannot be scaled: its weight is also used by mm"),
    ],
)
def test_whoever_reads_besides_rules_it_out(case: str, reason: str) -> None:
    found = find(Shared(case).eval(), [torch.randn(3, 8)])
    assert not found.links
    assert reason in str(found.before("one"))


def test_a_layer_that_no_example_reaches_rules_out_where_values_decide() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one, self.two = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return (self.one if float(x.sum()) > 0 else self.two)(self.norm(x))

    high, low = torch.ones(2, 8) + torch.randn(2, 8) / 9, -torch.ones(2, 8) + torch.randn(2, 8) / 9
    assert "no example followed reached two" in str(find(Chooses(), [high]).before("one"))
    assert list(find(Chooses(), [high, low]).links[0].readers) == ["one", "two"]


@pytest.mark.parametrize(
    "entry", [entry for entry in ZOO if not missing(entry)], ids=lambda entry: entry.name
)
def test_all_that_is_found_in_the_zoo_is_exact_without_the_proof_by_numbers(
    entry: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_neighbours, "_proven", lambda model, examples, outputs, found: found)
    model, examples = entry.build().eval(), list(entry.examples())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = find(model, examples)
    other = view(model, scaled(model, [(link, drawn(link)) for link in found.links], found.turned))
    bound = 0.05 if any(p.dtype == torch.bfloat16 for p in model.parameters()) else 2e-5
    for batch in examples:
        assert not found.links or distance(model, other, batch) < bound
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_wrong_link_is_found_out_by_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy() + 1)  # nothing that the dispatcher sees

        @staticmethod
        def backward(ctx: Any, *slopes: Tensor) -> Tensor:
            raise NotImplementedError

    class Sneaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            normed = self.norm(x)
            return self.one(normed) + Hidden.apply(normed)

    found = find(Sneaky(), [torch.randn(3, 8)])
    assert not found.links
    assert "changes the model's output" in str(found.before("one"))


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "turn": lambda x: x.flip(-1),
    "swap": lambda x: x.reshape(-1, 2, 4).transpose(1, 2).reshape(-1, 8),
    "relu": torch.relu,
    "scale": lambda x: x * torch.linspace(-1, 2, 8),
    "gate": lambda x: x * torch.sigmoid(torch.linspace(-1, 2, 8)),
    "double": lambda x: x + x,
    "shift": lambda x: x + 0.5,
    "mix": lambda x: x + x.flip(-1),
    "in place": lambda x: x.clone().relu_().mul_(2),
    "half": lambda x: torch.cat((x[..., :4], x[..., :4]), -1),
    "write": lambda x: torch.index_fill(x, -1, torch.tensor([2]), 1.0),
    "tanh": torch.tanh,
}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=4))
def test_chains_of_operations_are_followed_exactly_or_not_at_all(names: list[str]) -> None:
    def function(x: Tensor) -> Tensor:
        for name in names:
            x = STEPS[name](x)
        return x

    model, x = Between(function).eval(), torch.randn(5, 4)
    for proof in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not proof:
                patch.setattr(_neighbours, "_proven", lambda model, examples, outputs, found: found)
            found = find(model, [x])
        for link in found.links:
            other = view(model, scaled(model, [(link, drawn(link))], found.turned))
            assert distance(model, other, x) < 1e-5
    if not {"shift", "mix", "write", "tanh"} & set(names):
        assert len(found.links) == 1
