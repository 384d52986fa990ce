"""Rows that point the same way are stored once: which, how near, how small, tied or not, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flyweight import transforms
from flyweight.analysis.sites import analyse, model_bytes
from flyweight.errors import UsageError
from flyweight.inputs.check import run
from flyweight.records import Plan, Step
from flyweight.runtimes._state import unique_state
from flyweight.transforms import Context, QuantizedLayer, share_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def alike(rows: int, kinds: int, width: int = 16) -> torch.Tensor:
    """Rows that are one of a few, each times its own factor."""
    source = torch.Generator().manual_seed(0)
    which = torch.arange(rows) % kinds
    return torch.randn(kinds, width, generator=source)[which] * (torch.rand(rows, 1, generator=source) + 0.5)


class Table(nn.Module):
    """An embedding and a head; tied if asked."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
        with torch.no_grad():
            self.embed.weight.copy_(alike(40, 5))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(x)))


EXAMPLES = [torch.arange(40).view(4, 10)]


def applied(model: nn.Module, *steps: Step) -> nn.Module:
    found = analyse(model, EXAMPLES)
    return transforms.apply(model, Plan(steps), found.sites, Context(found.statistics, examples=EXAMPLES))


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_one_direction_are_stored_once_and_nothing_changes(tied: bool) -> None:
    torch.manual_seed(0)
    model = Table(tied).eval()
    small = applied(model, Step("share_rows", "head" if tied else "embed"))
    assert torch.allclose(run(small, EXAMPLES[0]), run(model, EXAMPLES[0]), atol=1e-5)
    assert small.embed.kept.weight.shape == (5, 16)
    assert torch.allclose(small.embed.weight.as_subclass(torch.Tensor), model.embed.weight, atol=1e-5)
    assert isinstance(small.head, share_rows.SharedRows) is tied
    if tied:
        assert small.head.kept.weight is small.embed.kept.weight
        assert sum(t.numel() for t in unique_state(small).values()) == 5 * 16 + 40 + 40 + 40
    assert model_bytes(small) < model_bytes(model)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.floats(0.05, 1.0), st.integers(0, 100))
def test_every_row_is_as_near_to_the_first_of_its_group_as_the_threshold_says(
    rows, width, threshold, seed
) -> None:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    places = share_rows.grouped(weight, threshold)
    assert places.unique().tolist() == list(range(int(places.max()) + 1))
    firsts = [int((places == group).nonzero()[0]) for group in range(int(places.max()) + 1)]
    cosine = nn.functional.cosine_similarity(weight, weight[firsts][places], dim=1)
    assert bool((cosine >= threshold - 1e-5).all())


def test_blocks_of_rows_find_the_groups_of_blocks_before(monkeypatch) -> None:
    weight = alike(40, 5)
    whole = share_rows.grouped(weight, 0.95)
    monkeypatch.setattr(share_rows, "_BLOCK", 7)
    assert torch.equal(share_rows.grouped(weight, 0.95), whole)
    weight[3], weight[20] = 0, 0
    assert int(share_rows.grouped(weight, 0.95)[20]) == 0


def test_stored_rows_are_quantized_once_for_all_who_read_them_and_a_plan_is_rebuilt() -> None:
    model = Table(True).eval()
    steps = Plan((Step("share_rows", "head"), Step("weight_only", "head.kept", {"bits": 8})))
    plan = transforms.complete(model, steps, Context())
    small = applied(model, *plan.steps)
    assert isinstance(small.head.kept, QuantizedLayer)
    assert small.head.kept.integers.data_ptr() == small.embed.kept.integers.data_ptr()
    gap = (run(small, EXAMPLES[0]) - run(model, EXAMPLES[0])).norm() / run(model, EXAMPLES[0]).norm()
    assert gap < 0.02
    sites = analyse(model, EXAMPLES).sites
    fresh = transforms.apply(copy.deepcopy(model), plan, sites, Context(rebuilding=True))
    fresh.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(run(fresh, EXAMPLES[0]), run(small, EXAMPLES[0]))


@pytest.mark.parametrize(
    ("site", "options", "words"),
    [
        ("embed", {}, "goes by one name"),
        ("head", {"threshold": 1.5}, "threshold"),
        ("head", {"rows": 7}, "stores 7 rows"),
        ("body", {}, "embeddings and linear layers"),
        ("", {}, "embeddings and linear layers"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_the_reason(site, options, words) -> None:
    with pytest.raises(UsageError, match=words):
        applied(Table(True).eval(), Step("share_rows", site, options))


def test_rows_that_are_not_alike_stay() -> None:
    torch.manual_seed(0)
    model = Table(False).eval()
    with pytest.raises(UsageError, match="must be smaller"):
        applied(model, Step("share_rows", "head"))


def test_a_tied_weight_is_proposed_once() -> None:
    model = Table(True).eval()
    assert [plan.steps[0].site for plan in share_rows.proposals(model, EXAMPLES)] == ["head"]


def test_a_weight_that_another_module_reads_otherwise_stays() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Bilinear(4, 4, 2)).eval()
    model[1].register_parameter("other", model[0].weight)
    with pytest.raises(UsageError, match="must read its rows"):
        share_rows.complete(model, {"0": share_rows.Options()}, Context())
