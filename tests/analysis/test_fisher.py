"""The importance of output channels against slopes taken one by one, and against the divergence that it foretells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runtimes.nets import Function
from torch import nn

from flyweight.analysis import fisher as module
from flyweight.analysis.bare import layer_at
from flyweight.analysis.fisher import fisher, lazily
from flyweight.analysis.sites import analyse
from flyweight.errors import DataError, ModelError, UsageError
from flyweight.testing.zoo import ZOO

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(*layers: nn.Module) -> None:
    """Weights that do not depend on what ran before."""
    random = torch.Generator().manual_seed(5)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=random) / parameter.shape[-1] ** 0.5


def classifier(inplace: bool = False) -> Function:
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 5)}
    seeded(*layers.values())
    return Function(lambda self, x: {"logits": self.b(F.relu(self.a(x), inplace=inplace))}, **layers).eval()


def examples(*shape: int, count: int = 4) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=random) for _ in range(count)]


def expected(model: Function, given: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The expectation over labels, by the slope of each label's log-likelihood, a row at a time."""
    sums = {"a": torch.zeros(8).double(), "b": torch.zeros(5).double()}
    rows = torch.cat(given).double()
    weights = {name: value.double() for name, value in model.state_dict().items()}
    for row in rows:
        a = (weights["a.weight"] @ row + weights["a.bias"]).requires_grad_()
        b = weights["b.weight"] @ a.relu() + weights["b.bias"]
        likelihoods = b.log_softmax(0)
        for label in range(5):
            slopes = torch.autograd.grad(likelihoods[label], [a, b], retain_graph=True)
            for name, slope in zip(sums, slopes, strict=True):
                sums[name] += likelihoods[label].exp().detach() * slope.square()
    return {name: total / len(rows) for name, total in sums.items()}


def test_it_is_the_expectation_over_labels() -> None:
    model, given = classifier(), examples(50, 6)
    wanted = expected(model, given)
    draws = [fisher(model, ["a", "b"], given, seed=seed) for seed in range(60)]
    for name in ("a", "b"):
        mean = torch.stack([draw[name] for draw in draws]).mean(0).double()
        assert torch.allclose(mean, wanted[name], rtol=0.08)
    logits = torch.cat([model(one)["logits"] for one in given]).softmax(-1)
    assert torch.allclose(wanted["b"].float(), (logits * (1 - logits)).mean(0), rtol=1e-4)


def test_other_outputs_are_means_of_normal_numbers() -> None:
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 5)}
    seeded(*layers.values())
    model = Function(lambda self, x: self.b(self.a(x)), **layers)
    found = fisher(model, ["a", "b"], examples(500, 6, count=8), seed=0)
    assert torch.allclose(found["a"], layers["b"].weight.detach().square().sum(0), rtol=0.15)
    assert torch.allclose(found["b"], torch.ones(5), rtol=0.15)


def test_logits_over_the_vocabulary_are_known_by_their_length() -> None:
    table, head = nn.Embedding(40, 8), nn.Linear(8, 40)
    seeded(table, head)
    given = [torch.randint(40, (8, 32), generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    plain = fisher(Function(lambda self, x: self.b(self.a(x)), a=table, b=head), ["b"], given, seed=0)["b"]
    named = fisher(
        Function(lambda self, x: {"logits": self.b(self.a(x))}, a=table, b=head), ["b"], given, seed=0
    )["b"]
    assert torch.equal(plain, named)
    assert float(plain.mean()) < 0.1  # p (1 - p) of 40 labels; of normal numbers it were 1


def divergence(logits: torch.Tensor, others: torch.Tensor) -> float:
    logits, others = logits.detach(), others.detach()
    return float(
        F.kl_div(others.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="sum")
    ) / (logits.numel() / logits.shape[-1])


def test_it_foretells_the_divergence_of_changed_rows() -> None:
    model, given = classifier(), examples(2000, 6)
    found = fisher(model, ["a"], given, seed=1)["a"]
    size, random = 0.05, torch.Generator().manual_seed(2)
    told = 0.5 * size**2 * float(found.sum())
    changes = []
    for one in given:
        hidden = model.a(one)
        moved = hidden + size * torch.randn(hidden.shape, generator=random)
        changes.append(divergence(model.b(hidden.relu()), model.b(moved.relu())))
    assert sum(changes) / len(changes) == pytest.approx(told, rel=0.1)


@pytest.mark.parametrize("groups", [1, 2])
def test_it_foretells_the_divergence_of_changed_places_of_a_convolution(groups: int) -> None:
    conv, head = nn.Conv2d(2, 4, 3, padding=1, groups=groups), nn.Linear(4, 5)
    seeded(conv, head)
    model = Function(lambda self, x: {"logits": self.b(F.silu(self.a(x)).mean((2, 3)))}, a=conv, b=head)
    given = examples(1000, 2, 4, 4)
    found = fisher(model, ["a", "b"], given, seed=1)
    size, random = 0.1, torch.Generator().manual_seed(2)
    changes = []
    for one in given:
        hidden = conv(one)
        moved = hidden + size * torch.randn(hidden.shape, generator=random)
        changes.append(divergence(*(head(F.silu(h).mean((2, 3))) for h in (hidden, moved))))
    assert sum(changes) / len(changes) == pytest.approx(0.5 * size**2 * float(found["a"].sum()), rel=0.15)


def test_changes_in_place_behind_a_layer_do_not_matter() -> None:
    given = examples(20, 6)
    plain, inplace = (fisher(classifier(way), ["a", "b"], given, seed=3) for way in (False, True))
    assert all(torch.equal(plain[name], inplace[name]) for name in ("a", "b"))


def test_the_model_and_the_state_of_pytorch_are_as_before() -> None:
    model = classifier()
    model.train()
    model.a.eval()
    model.b.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        fisher(model, ["a", "b"], examples(7, 6), seed=0)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model.a.training, model.b.training) == (True, False, True)
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_model_comes_back_when_it_fails() -> None:
    model = Function(lambda self, x: self.a(x).numpy(), a=nn.Linear(3, 2)).train()
    with pytest.raises(DataError, match=r"the model must accept every example, with gradients"):
        fisher(model, ["a"], examples(2, 3), seed=0)
    assert model.training
    assert model.a.weight.requires_grad


def test_dropout_is_off() -> None:
    layers = {"a": nn.Linear(6, 8), "drop": nn.Dropout(0.5)}
    seeded(layers["a"])
    model = Function(lambda self, x: self.drop(self.a(x)), **layers).train()
    assert torch.allclose(fisher(model, ["a"], examples(2000, 6), seed=0)["a"], torch.ones(8), rtol=0.1)


def test_equal_seeds_give_equal_answers() -> None:
    model, given = classifier(), examples(9, 6)
    first, again, other = (fisher(model, ["a"], given, seed=seed)["a"] for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float32
    assert first.shape == (8,)


@dataclass
class Answer:
    logits: torch.Tensor
    note: str = ""


def test_logits_in_a_record_are_found() -> None:
    model, given = classifier(), examples(9, 6)
    record = Function(lambda self, x: Answer(**self.inner(x)), inner=model)
    assert torch.equal(
        fisher(record, ["inner.a"], given, seed=0)["inner.a"], fisher(model, ["a"], given, seed=0)["a"]
    )


def test_what_has_no_slopes_is_left_out() -> None:
    layers = {"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 6), "d": nn.Embedding(3, 6)}

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        steps = self.b(x).round().long().clamp(0, 2)
        return self.a(x) + self.d(steps[:, 0]) + self.b(x).detach()

    found = fisher(Function(run, **layers), list(layers), examples(5, 6), seed=0)
    assert set(found) == {"a"}


def test_a_layer_that_runs_twice_counts_both() -> None:
    layer = nn.Linear(4, 4)
    seeded(layer)
    once, twice = (
        fisher(Function(run, a=layer), ["a"], examples(800, 4), seed=0)["a"].sum()
        for run in (lambda self, x: self.a(x), lambda self, x: torch.cat([self.a(x), self.a(2 * x)], 1))
    )
    assert float(twice) == pytest.approx(2 * float(once), rel=0.1)


def test_what_is_not_known_is_refused() -> None:
    model = classifier()
    with pytest.raises(DataError, match="there must be examples"):
        fisher(model, ["a"], [], seed=0)
    with pytest.raises(UsageError, match="a site must be a layer of the model"):
        fisher(model, ["z"], examples(2, 6), seed=0)
    with pytest.raises(ModelError, match="a site must have a weight of its own"):
        fisher(nn.Sequential(nn.ReLU()), ["0"], examples(2, 6), seed=0)
    infinite = Function(lambda self, x: self.a(x) * float("inf"), a=nn.Linear(6, 4))
    with pytest.raises(DataError, match=r"slopes must be finite.* \(at layer a\)"):
        fisher(infinite, ["a"], examples(2, 6), seed=0)


def test_it_is_collected_when_it_is_asked_for_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        return fisher(*given, **named)

    monkeypatch.setattr(module, "fisher", counted)
    found = lazily(classifier(), ["a"], examples(3, 6, count=50), seed=0)
    assert not calls
    assert found("a") is not None
    assert found("b") is None
    assert calls == [1]


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_every_model_of_the_zoo(entry: Any) -> None:
    model, given = entry.build().eval(), entry.examples()
    sites = [site.name for site in analyse(model, given).sites]
    found = fisher(model, sites, given, seed=0)
    for path, importance in found.items():
        layer = layer_at(model, path)
        weight = layer.weight
        transposed = not isinstance(layer, nn.Linear) and weight.ndim == 2
        assert importance.shape == (weight.shape[1 if transposed else 0],)
        assert bool((importance >= 0).all())


def test_it_ends_with_enough_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    given = [torch.randn(6, 4) for _ in range(5)]
    wanted = fisher(model, ["0"], given[:2], seed=0)["0"]
    monkeypatch.setattr("flyweight.analysis.fisher.ENOUGH", 12)
    assert torch.equal(fisher(model, ["0"], given, seed=0)["0"], wanted)
