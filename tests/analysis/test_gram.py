"""Gram matrices against what the layers themselves compute, and against plain sums; what is shared, bounded and refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from runtimes.nets import Function
from torch import nn
from torch.nn import functional

from flyweight.analysis import _patches, gram
from flyweight.analysis.gram import both, grams
from flyweight.errors import DataError, ModelError, UsageError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


def examples(*shape: int, count: int = 3, seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=random) + 0.3 for _ in range(count)]


def test_a_linear_layer_by_plain_sums() -> None:
    model, given = nn.Sequential(nn.Linear(6, 4)), examples(2, 5, 6)
    found = grams(model, ["0"], given)["0"]
    rows = torch.cat([one.reshape(-1, 6) for one in given]).double()
    expected = sum(torch.outer(row, row) for row in rows) / len(rows)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5)
    assert torch.equal(found, found.T)


def test_examples_of_other_lengths_count_by_their_rows() -> None:
    given = [*examples(1, 2, 3), *examples(7, 3)]
    found = grams(nn.Sequential(nn.Linear(3, 2)), ["0"], given)["0"]
    rows = torch.cat([one.reshape(-1, 3) for one in given])
    assert torch.allclose(found, rows.T @ rows / len(rows), rtol=1e-5)


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, bias=False), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)), (2, 4, 9, 8)),
    (nn.Conv2d(4, 6, (4, 3), padding="same", dilation=2), (1, 4, 9, 8)),
    (nn.Conv1d(4, 6, 4, padding="same"), (1, 4, 9)),
    (nn.Conv2d(4, 6, 3, padding="valid"), (1, 4, 5, 5)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (1, 4, 5, 5)),
    (nn.Conv2d(4, 6, 1), (3, 4, 5, 5)),
    (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 6)),
    (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4), (2, 4, 7, 7)),
    (nn.Conv3d(2, 3, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 1)), (2, 2, 4, 5, 3)),
]


@pytest.mark.parametrize(
    ("layer", "shape"), CONVOLUTIONS, ids=lambda value: str(value) if isinstance(value, nn.Module) else ""
)
@pytest.mark.parametrize("room", [1, 4096, 32 << 20])
def test_the_mean_square_of_a_convolutions_outputs_is_told_by_its_matrix(
    layer: nn.Module, shape: tuple[int, ...], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_patches, "_ROOM", room)
    given = examples(*shape)
    matrix = grams(nn.Sequential(layer), ["0"], given)["0"].double()
    weight = layer.weight.detach().double().flatten(1)
    bias = 0.0 if layer.bias is None else layer.bias.detach().double().reshape(1, -1, *[1] * (len(shape) - 2))
    outputs = (
        torch.cat([layer.double()(one.double()) - bias for one in given]).detach().transpose(0, 1).flatten(1)
    )
    layer.float()
    parts = matrix if matrix.ndim == 3 else matrix[None]
    assert len(parts) == layer.groups
    told = [row @ parts[k * layer.groups // len(weight)] @ row for k, row in enumerate(weight)]
    assert torch.allclose(torch.stack(told), outputs.square().mean(1), rtol=1e-4)


def test_a_convolution_agrees_with_unfold() -> None:
    layer, given = nn.Conv2d(3, 4, 3, stride=2, padding=1), examples(2, 3, 8, 7)
    rows = torch.cat(
        [functional.unfold(one, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 27) for one in given]
    )
    assert torch.allclose(
        grams(nn.Sequential(layer), ["0"], given)["0"], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5
    )


def test_a_transposed_linear_layer_counts_its_inputs() -> None:
    weight = nn.Linear(4, 3)
    model = Function(lambda self, x: torch.addmm(self.a.bias[:4], x, self.a.weight), a=nn.Linear(4, 3))
    model.a.bias = nn.Parameter(torch.zeros(4))
    given = examples(5, 3)
    rows = torch.cat(given)
    assert torch.allclose(grams(model, ["a"], given)["a"], rows.T @ rows / len(rows), rtol=1e-5)
    assert weight.weight.shape == (3, 4)


def test_sites_that_read_one_tensor_share_one_matrix() -> None:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.q(x) * self.k(x) + self.v(x)) + self.apart(x.clone())

    layers = {name: nn.Linear(4, 4) for name in ("q", "k", "v", "o", "apart")}
    found = grams(Function(run, **layers), list(layers), examples(3, 4))
    assert found["q"] is found["k"]
    assert found["q"] is found["v"]
    assert found["q"] is not found["o"]
    assert found["apart"] is not found["q"]
    assert torch.equal(found["apart"], found["q"])


def test_what_is_shared_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, add = [], gram._add
    monkeypatch.setattr(gram, "_add", lambda *args: (counted.append(args[1]), add(*args)))
    model = Function(lambda self, x: self.a(x) + self.b(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    grams(model, ["a", "b"], examples(3, 4, count=5))
    assert counted == ["a"] * 5


def test_convolutions_share_only_when_they_read_alike() -> None:
    layers = {
        "a": nn.Conv2d(2, 3, 3, padding=1),
        "b": nn.Conv2d(2, 5, 3, padding=1),
        "c": nn.Conv2d(2, 3, 3, padding=1, dilation=1, stride=2),
        "d": nn.Conv2d(2, 3, 1),
    }
    model = Function(lambda self, x: [self.a(x), self.b(x), self.c(x), self.d(x)], **layers)
    found = grams(model, list(layers), examples(1, 2, 6, 6))
    assert found["a"] is found["b"]
    assert len({id(one) for one in found.values()}) == 3


def test_sites_that_part_ways_in_a_later_example_are_told_apart() -> None:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x if x.shape[0] == 3 else 2 * x) + self.c(x)

    layers = {name: nn.Linear(4, 2) for name in "abc"}
    given = [*examples(3, 4, count=2), *examples(5, 4, count=2)]
    found = grams(Function(run, **layers), list(layers), given)
    assert found["a"] is found["c"]
    rows = torch.cat([one if len(one) == 3 else 2 * one for one in given])
    assert torch.allclose(found["b"], rows.T @ rows / len(rows), rtol=1e-5)


def test_a_tensor_changed_in_place_is_another() -> None:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        first = self.a(x)
        return first + self.b(x.mul_(3))

    found = grams(Function(run, a=nn.Linear(4, 2), b=nn.Linear(4, 2)), ["a", "b"], examples(3, 4))
    assert torch.allclose(9 * found["a"], found["b"], rtol=1e-5)


def test_tensors_that_follow_each_other_in_memory_are_told_apart() -> None:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.a(x + 0) + self.b(x * 2) + self.c(x * 3)  # each is gone before the next is made

    found = grams(Function(run, **{name: nn.Linear(4, 2) for name in "abc"}), list("abc"), examples(3, 4))
    for name, factor in (("b", 4), ("c", 9)):
        assert torch.allclose(found[name], factor * found["a"], rtol=1e-5)


def test_numbers_are_not_taken_over_from_tensors_that_are_gone() -> None:
    number = gram._numbering()
    assert len({number(torch.ones(1)) for _ in range(100)}) == 100
    kept = torch.ones(1)
    assert number(kept) == number(kept)


def test_a_site_that_runs_twice_counts_both_times() -> None:
    model, given = Function(lambda self, x: self.a(self.a(x)), a=nn.Linear(4, 4)), examples(3, 4)
    rows = torch.cat([torch.cat([one, model.a(one)]) for one in given]).detach()
    assert torch.allclose(grams(model, ["a"], given)["a"], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_the_models_fused_paths_are_seen_through() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    found = grams(model, ["linear1", "linear2"], examples(2, 5, 8))
    assert found["linear1"].shape == (8, 8)
    assert found["linear2"].shape == (16, 16)


@pytest.mark.parametrize("room", [1, 1000, 32 << 20])
def test_every_row_is_taken_once(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_patches, "_ROOM", room)
    taken, mean = [], gram._mean
    monkeypatch.setattr(gram, "_mean", lambda path, found: (taken.append(found.rows), mean(path, found))[1])
    grams(nn.Sequential(nn.Conv2d(2, 3, 3)), ["0"], examples(2, 2, 9, 8, count=4))
    assert taken == [4 * 2 * 7 * 6]


def test_embeddings_and_what_no_example_reaches_have_none() -> None:
    layers = {"e": nn.Embedding(9, 4), "a": nn.Linear(4, 4), "idle": nn.Linear(4, 4)}
    model = Function(lambda self, x: self.a(self.e(x)), **layers)
    assert set(grams(model, list(layers), [torch.arange(9)[None]])) == {"a"}
    assert grams(model, [], [torch.arange(9)[None]]) == {}


def test_half_precision_is_summed_in_float32() -> None:
    model, given = nn.Sequential(nn.Linear(4, 2)).bfloat16(), [one.bfloat16() for one in examples(64, 4)]
    rows = torch.cat(given).float()
    assert torch.allclose(grams(model, ["0"], given)["0"], rows.T @ rows / len(rows), rtol=1e-5)


def test_an_empty_example_is_fine_among_others() -> None:
    given = examples(3, 4)
    model = nn.Sequential(nn.Linear(4, 2))
    assert torch.equal(grams(model, ["0"], given)["0"], grams(model, ["0"], [*given, torch.zeros(0, 4)])["0"])
    assert grams(model, ["0"], [torch.zeros(0, 4)]) == {}


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grams(model, ["0", "2"], examples(3, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(DataError, match="there must be examples"):
        grams(model, ["0"], [])
    with pytest.raises(ModelError, match=r"weight of its own, got ReLU \(at layer 1\)"):
        grams(model, ["1"], examples(3, 4))
    with pytest.raises(UsageError, match="a site must be a layer of the model, got 'nowhere'"):
        grams(model, ["nowhere"], examples(3, 4))
    with pytest.raises(DataError, match="the model must accept every example"):
        grams(model, ["0"], examples(3, 5))
    with pytest.raises(DataError, match=r"activations must be finite, .* \(at layer 0\)"):
        grams(model, ["0"], [torch.full((3, 4), float("nan"))])


def changed_pair() -> tuple[nn.Module, nn.Module]:
    """Two models of one structure that change the input of a layer after it; only the first layer differs."""

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = self.a(x).relu_()
        found = self.b(hidden) + self.c(x)
        return found + hidden.mul_(0).sum()

    torch.manual_seed(0)
    shared, last = nn.Linear(4, 3), nn.Linear(4, 3)
    first, second = (Function(run, a=nn.Linear(4, 4), b=shared, c=last) for _ in range(2))
    return first, second


def test_the_cross_matrix_is_that_of_both_models_inputs() -> None:
    (original, model), given = changed_pair(), examples(5, 4)
    _, found = both(original, model, ["a", "b", "c"], given)
    rows = [torch.cat([m.a(one).relu() for one in given]).detach() for m in (original, model)]
    assert torch.allclose(found["b"], rows[0].T @ rows[1] / len(rows[0]), rtol=1e-5, atol=1e-6)
    assert found["a"] is found["c"]
    assert torch.allclose(found["a"], grams(model, ["a"], given)["a"], rtol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"), CONVOLUTIONS, ids=lambda value: str(value) if isinstance(value, nn.Module) else ""
)
def test_with_itself_the_cross_matrix_is_the_gram_matrix(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model, given = nn.Sequential(layer), examples(*shape)
    own, found = both(model, model, ["0"], given)
    assert torch.allclose(found["0"], own["0"], rtol=1e-4, atol=1e-5)


def test_models_that_call_a_site_otherwise_are_refused() -> None:
    once = Function(lambda self, x: self.a(x), a=nn.Linear(4, 4))
    twice = Function(lambda self, x: self.a(self.a(x)), a=nn.Linear(4, 4))
    longer = Function(lambda self, x: self.a(torch.cat([x, x])), a=nn.Linear(4, 4))
    for original, model in ((once, twice), (twice, once), (once, longer)):
        with pytest.raises(
            ModelError, match=r"call a site alike, got other inputs in examples\[0\] \(at layer a\)"
        ):
            both(original, model, ["a"], examples(3, 4))


@pytest.mark.parametrize(
    ("layer", "shape"), CONVOLUTIONS[:1] + CONVOLUTIONS[8:9], ids=lambda value: type(value).__name__
)
def test_both_at_once_are_what_each_is_by_itself(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    original = Function(lambda self, x: (self.a(x), self.b(x)), a=layer, b=copy.deepcopy(layer))
    model = Function(lambda self, x: (self.a(x + 0.2 * x.sin()), self.b(x)), a=layer, b=original.b)
    given = examples(*shape)
    own, cross = both(original, model, ["a", "b"], given)
    for path in "ab":
        assert torch.equal(own[path], grams(model, [path], given)[path])
        assert torch.equal(cross[path], both(original, model, [path], given)[1][path])
    assert not torch.allclose(own["a"], cross["a"], rtol=1e-2)


def test_both_share_where_both_models_read_one_tensor() -> None:
    model, given = (
        Function(lambda self, x: self.a(x) + self.b(x), a=nn.Linear(4, 3), b=nn.Linear(4, 3)),
        examples(5, 4),
    )
    own, cross = both(model, copy.deepcopy(model), ["a", "b"], given)
    assert own["a"] is own["b"]
    assert cross["a"] is cross["b"]


def test_moments_leave_out_lines_of_large_pictures() -> None:
    """Against the plain products of every fourth line of outputs, from the third on."""
    model, picture = nn.Sequential(nn.Conv2d(2, 3, 1)), examples(1, 2, 32, 16, count=1)
    found = gram.moments(model, model, ["0"], picture)["0"]
    rows = picture[0][:, :, 2::4].permute(0, 2, 3, 1).reshape(-1, 2).double()
    assert found.rows == len(rows) == 8 * 16
    assert torch.allclose(found.gram[0], rows.T @ rows / len(rows), rtol=1e-5)
    assert torch.allclose(found.mean[0], rows.mean(0), rtol=1e-5)
    assert torch.equal(found.gram, found.cross)
