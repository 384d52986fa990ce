"""Which layers are sites, what they cost, and what one pass over the examples says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from flyweight.analysis.sites import analyse, kind_of, model_bytes, plain_site
from flyweight.errors import DataError
from flyweight.inputs.check import run
from flyweight.testing.zoo import ZOO, missing


class Net(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.body = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def linear() -> nn.Linear:
    return nn.Linear(16, 16)


def test_costs_are_exact() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Flatten(),
        nn.Linear(8 * 4, 5),
    ).eval()  # fmt: skip
    found = analyse(model, [torch.randn(2, 3, 8, 8), torch.randn(5, 3, 8, 8)])
    by_name = {site.name: site for site in found.sites}
    assert by_name["0"].macs == 2 * 8 * 4 * 4 * 3 * 9
    assert by_name["0"].parameters == 8 * 3 * 9 + 8
    assert by_name["1"].macs == 2 * 8 * 2 * 2 * 9
    assert by_name["1"].bytes == 4 * 8 * 9
    assert by_name["3"].macs == 2 * 32 * 5
    assert by_name["3"].kind == "linear"
    assert found.macs == sum(site.macs for site in found.sites)
    assert found.bytes == model_bytes(model) == 4 * (216 + 8 + 72 + 160 + 5)


def test_a_sequence_counts_every_place() -> None:
    found = analyse(nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 4)), [torch.randint(10, (2, 7))])
    assert [(site.kind, site.macs) for site in found.sites] == [("embedding", 0), ("linear", 2 * 7 * 16 * 4)]


def test_statistics_are_those_of_all_examples() -> None:
    model, examples = nn.Sequential(linear()).eval(), [torch.randn(4, 16), 3 * torch.randn(2, 16)]
    seen = analyse(model, examples).statistics["0"]
    every = torch.cat(examples)
    assert seen.input.low == float(every.min())
    assert seen.input.high == float(every.max())
    assert torch.allclose(seen.energy, every.square().mean(0))
    assert seen.output.high == pytest.approx(float(model(every).detach().max()), rel=1e-5)
    assert sorted(seen.input.sample.tolist()) == sorted(every.flatten().tolist())


@pytest.mark.parametrize("kind", ["linear", "conv2d", "grouped", "conv1d"])
def test_the_mean_of_what_weights_are_multiplied_with(kind: str) -> None:
    """The reference lays out every patch."""
    torch.manual_seed(0)
    layer, shape = {
        "linear": (nn.Linear(6, 3), (4, 5, 6)),
        "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=2, padding=(2, 1), dilation=(1, 2)), (3, 4, 9, 9)),
        "grouped": (nn.Conv2d(4, 6, 3, padding="same", groups=2), (3, 4, 7, 7)),
        "conv1d": (nn.Conv1d(4, 6, 5, padding=1), (3, 4, 12)),
    }[kind]
    data = [torch.randn(shape) + 0.5, torch.randn(shape)]
    mean = analyse(nn.Sequential(layer).eval(), data).statistics["0"].mean
    assert mean is not None
    assert mean.shape == (2 if kind == "grouped" else 1, layer.weight[0].numel())
    with torch.no_grad():
        found = torch.cat([layer.double()(x.double()) for x in data])
        wanted = (
            found.flatten(0, -2).mean(0) if kind == "linear" else found.transpose(0, 1).flatten(1).mean(1)
        )
        weight = layer.weight.flatten(1).unflatten(0, (len(mean), -1))
        assert torch.allclose((weight @ mean.double()[..., None]).flatten() + layer.bias, wanted, atol=1e-6)


def test_energy_of_a_convolution_is_per_channel() -> None:
    x = torch.randn(3, 4, 5, 5)
    seen = analyse(nn.Sequential(nn.Conv2d(4, 2, 3)), [x]).statistics["0"]
    assert torch.allclose(seen.energy, x.square().mean((0, 2, 3)))


def test_a_layer_used_twice_merges_both_inputs() -> None:
    model = Net(lambda self, x: self.a(10 * self.a(x)), a=linear())
    x = torch.randn(4, 16)
    found = analyse(model, [x])
    seen = found.statistics["a"]
    assert seen.calls == 2
    assert found.sites[0].macs == 2 * 4 * 16 * 16
    assert seen.input.high == pytest.approx(
        max(float(x.max()), float((10 * model.a(x).detach()).max())), rel=1e-5
    )


class OwnPadding(nn.Conv2d):
    """Pads by itself, so that its size is that of TensorFlow's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(functional.pad(x, (1, 2, 1, 2)), self.weight, self.bias, self.stride)


def test_a_subclass_that_pads_by_itself_is_a_site() -> None:
    found = analyse(nn.Sequential(OwnPadding(3, 4, 4)), [torch.randn(1, 3, 8, 8)])
    assert [site.kind for site in found.sites] == ["conv"]
    assert found.statistics["0"].own_input


def test_a_circular_padding_changes_what_the_operation_sees() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))
    assert not analyse(model, [torch.randn(1, 3, 8, 8)]).statistics["0"].own_input


def test_the_model_itself_and_layers_called_by_keyword_are_sites() -> None:
    assert analyse(linear(), [torch.randn(2, 16)]).sites[0].name == ""
    assert len(analyse(Net(lambda self, x: self.a(input=x), a=linear()), [torch.randn(2, 16)]).sites) == 1


def test_an_input_without_a_batch() -> None:
    model = Net(lambda self, x: self.a(x[0])[None], a=linear())
    x = torch.randn(1, 16)
    assert torch.allclose(analyse(model, [x]).statistics["a"].energy, x[0].square())


def together(forward: Callable[..., Any], **parts: nn.Module) -> nn.Module:
    """A model whose parts hold one weight."""
    model = Net(forward, **parts)
    for part in parts.values():
        part.weight = next(iter(parts.values())).weight
    return model


class Turned(nn.Module):
    """A linear layer whose weight is (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).reshape(x.shape)


TOKENS, VECTORS, IMAGES = torch.randint(16, (2, 3)), torch.randn(2, 16), torch.randn(1, 3, 8, 8)
LEFT = {
    "tied otherwise": (lambda: together(lambda self, x: self.b(self.a(x)), a=nn.Embedding(16, 16), b=Turned()), TOKENS,
                       {"a": "a and b read it in different ways", "b": "a and b read it in different ways"}),
    "tied with idle": (lambda: together(lambda self, x: self.a(x), a=linear(), b=Turned()), VECTORS,
                       {"a": "tied with that of b, which no example ran"}),
    "tied and outside": (
        lambda: together(lambda self, x: self.b(self.a(x)) @ self.a.weight, a=nn.Embedding(16, 16), b=linear()), TOKENS,
        {"a": "in different ways", "b": "in different ways"}),
    "functional": (lambda: Net(lambda self, x: functional.linear(self.a(x), self.a.weight.t()), a=linear()), VECTORS,
                   {"a": "in different ways"}),
    "squared": (lambda: Net(lambda self, x: self.a(x) * self.a.weight.square().sum(), a=linear()), VECTORS,
                {"a": "also used by square"}),
    "looked up": (lambda: Net(lambda self, x: functional.embedding(x, self.a.weight), a=linear()), TOKENS,
                  {"a": "looked up by no embedding layer"}),
    "left factor": (lambda: Net(lambda self, x: self.a.weight @ x.T, a=linear()), VECTORS, {"a": "also used by"}),
    "recurrent and otherwise": (
        lambda: Net(lambda self, x: self.a(x)[0] + self.a.weight_hh_l0.sum(), a=nn.GRU(16, 4)), torch.randn(2, 3, 16),
        {"a.weight_hh_l0": "also used by sum"}),
    "normed": (lambda: Net(lambda self, x: self.a(x)[0], a=weight_norm(nn.LSTM(16, 4), "weight_hh_l0")),
               torch.randn(2, 3, 16), {"a.parametrizations.weight_hh_l0.original1": "also used by"}),
    "output": (lambda: Net(lambda self, x: {"y": self.a(x), "w": self.a.weight}, a=linear()), VECTORS,
               {"a": "an output of the model"}),
    "idle": (lambda: Net(lambda self, x: self.a(x), a=linear(), b=linear()), VECTORS, {"b": "no example ran it"}),
    "max_norm": (lambda: nn.Sequential(nn.Embedding(16, 4, max_norm=1.0)), TOKENS, {"0": "max_norm"}),
    "no batch": (lambda: Net(lambda self, x: self.a(x[0])[None], a=nn.Conv2d(3, 4, 3)), IMAGES, {"a": "no batch dimension"}),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), IMAGES, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_site_is_left_alone_and_said(name: str) -> None:
    make, x, reasons = LEFT[name]
    model = make().eval()
    found = analyse(model, [x])
    assert not {site.name for site in found.sites} & set(reasons)
    for path, why in reasons.items():
        assert any(note.startswith(f"{path} stays as it is") and why in note for note in found.notes), (
            found.notes
        )
    if not reasons:
        assert not found.sites


def test_an_encoder_s_layers_are_seen_though_pytorch_would_fuse_them() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    found = analyse(model, [torch.randn(2, 5, 16)])
    read = ["self_attn.in_proj_weight", "self_attn.out_proj.weight"]
    assert [site.name for site in found.sites] == [*read, "linear1", "linear2"]
    assert torch.backends.mha.get_fastpath_enabled() == before


@pytest.mark.parametrize(
    "entry", [entry for entry in ZOO if entry.needs is None], ids=lambda entry: entry.name
)
def test_analysing_leaves_the_model_as_it_is(entry: Any) -> None:
    model, examples = entry.build().eval(), entry.examples()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wanted = run(model, examples[0])
    random = torch.random.get_rng_state()
    found = analyse(model, examples)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in state.items())
    assert type(run(model, examples[0])) is type(wanted)
    again = analyse(model, examples)
    assert found.sites == again.sites
    assert found.notes == again.notes
    for name, seen in found.statistics.items():
        assert torch.equal(seen.output.sample, again.statistics[name].output.sample)


def test_gpt2_s_own_linear_layers_are_sites() -> None:
    entry = next(entry for entry in ZOO if entry.name == "tiny_gpt2")
    if missing(entry):
        pytest.skip(str(missing(entry)))
    found = analyse(entry.build().eval(), list(entry.examples()))
    kinds = {site.name.split(".", 2)[-1]: site.kind for site in found.sites}
    assert kinds["0.attn.c_attn"] == kinds["1.mlp.c_proj"] == "linear"
    head = next(site for site in found.sites if site.name == "lm_head")
    assert head.tied == ("transformer.wte",)


def test_modules_that_hold_one_weight_are_one_site() -> None:
    model = together(
        lambda self, x: self.c(self.b(self.a(x))), a=nn.Embedding(16, 16), b=linear(), c=nn.Linear(16, 16)
    )
    x = torch.randint(16, (2, 3))
    found = analyse(model, [x])
    site = found.sites[0]
    assert len(found.sites) == 1
    assert (site.name, site.kind, site.tied) == ("b", "linear", ("a", "c"))
    assert site.parameters == 16 * 16 + 2 * 16  # the weight once, both biases
    assert site.bytes == 4 * site.parameters == found.bytes
    assert site.macs == 2 * (2 * 3 * 16 * 16)
    assert any(
        note == "b and a and c hold one weight: it is changed once, and stays tied" for note in found.notes
    )
    assert plain_site(model, "b").tied == site.tied
    assert plain_site(model, "a").tied == ("b", "c")


def test_a_shared_table_that_is_never_called_is_tied_all_the_same() -> None:
    model = together(
        lambda self, x: self.c(self.b(x)), a=nn.Embedding(16, 16), b=nn.Embedding(16, 16), c=linear()
    )
    found = analyse(model, [TOKENS])
    assert [(site.name, site.tied) for site in found.sites] == [("c", ("a", "b"))]
    assert not any("stays as it is" in note for note in found.notes)


def test_statistics_of_a_tied_weight_are_of_all_products() -> None:
    model = together(
        lambda self, x: self.c(3 * self.b(self.a(x))), a=nn.Embedding(16, 16), b=linear(), c=linear()
    )
    x = torch.randint(16, (2, 3))
    seen = analyse(model, [x]).statistics["b"]
    with torch.no_grad():
        first = model.a(x).reshape(-1, 16)
        both = torch.cat((first, 3 * model.b(first)))
    assert torch.allclose(seen.energy, both.square().mean(0), rtol=1e-5)
    assert seen.input.high == pytest.approx(float(both.max()), rel=1e-5)
    assert seen.calls == 2


def test_a_table_of_bags_is_a_site_and_one_with_max_norm_is_none() -> None:
    found = analyse(nn.Sequential(nn.EmbeddingBag(16, 4, mode="sum")), [TOKENS])
    assert [(site.kind, site.macs, site.parameters) for site in found.sites] == [("embedding", 0, 64)]
    limited = analyse(nn.Sequential(nn.EmbeddingBag(16, 4, max_norm=1.0)), [TOKENS])
    assert not limited.sites
    assert "max_norm" in limited.notes[0]


def test_tied_lookups_alone_are_a_site_of_their_own() -> None:
    model = together(lambda self, x: self.a(x) + self.b(x), a=nn.Embedding(16, 4), b=nn.Embedding(16, 4))
    found = analyse(model, [TOKENS])
    assert [(site.name, site.kind, site.tied, site.macs) for site in found.sites] == [
        ("a", "embedding", ("b",), 0)
    ]


def test_convolutions_of_other_strides_are_one_site_and_of_other_groups_none() -> None:
    x = torch.randn(1, 4, 9, 9)
    same = together(lambda self, x: self.b(self.a(x)), a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 3, stride=2))
    assert analyse(same, [x]).sites[0].tied == ("b",)
    other = together(
        lambda self, x: self.a(torch.cat((x, x), 1)) + self.b(x),
        a=nn.Conv2d(8, 8, 3, groups=2),
        b=nn.Conv2d(4, 8, 3),
    )
    found = analyse(other, [x])
    assert not found.sites
    assert any("read it in different ways" in note for note in found.notes)


def test_activations_that_are_not_finite_name_the_layer() -> None:
    model = nn.Sequential(linear(), linear())
    with torch.no_grad():
        model[0].bias[3] = float("inf")
    with pytest.raises(DataError, match="layer 0"):
        analyse(model, [torch.randn(2, 16)])


def test_kinds_are_told_by_class_or_by_the_weight() -> None:
    assert [kind_of(m) for m in (linear(), nn.Conv1d(2, 2, 1), nn.Embedding(2, 2))] == [
        "linear",
        "conv",
        "embedding",
    ]
    assert plain_site(nn.Sequential(linear()), "0").kind == "linear"
