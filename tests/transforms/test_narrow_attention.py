"""PyTorch's attention with some heads gone: what it gives is what the whole gives with those heads silenced."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from flyweight import discover, transforms
from flyweight.analysis.coupling import couple
from flyweight.analysis.sites import analyse
from flyweight.records import Plan, Step
from flyweight.transforms._narrow_attention import NarrowAttention, narrow
from flyweight.transforms._removal import proven, removed, silenced

OPTIONS = {"ratio": 0.5, "importance": "magnitude", "compensate": False}
WAYS = {
    "plain": {},
    "without biases": {"bias": False},
    "longer": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 12, "vdim": 20},
    "sequence first": {"batch_first": False},
}


def attention(**options: object) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(16, 4, **{"batch_first": True, **options}).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def inputs(made: nn.MultiheadAttention) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    lengths = (2, 5), (2, 7), (2, 7)
    widths = 16, made.kdim, made.vdim
    shapes = [
        (*(n if made.batch_first else n[::-1]), width) for n, width in zip(lengths, widths, strict=True)
    ]
    query, key, value = (torch.randn(shape, generator=source) for shape in shapes)
    return query, key, value


def as_narrow(made: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """The same weights in the class that knows other widths."""
    found = copy.deepcopy(made)
    found.__class__ = NarrowAttention
    return found


def masks(kind: str) -> dict[str, torch.Tensor]:
    padding, places = torch.zeros(2, 7, dtype=torch.bool), torch.ones(5, 7).triu(3).bool()
    padding[1, 4:] = True
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "places": {"attn_mask": places},
        "both": {"key_padding_mask": padding, "attn_mask": places},
        "added": {"attn_mask": torch.randn(5, 7, generator=torch.Generator().manual_seed(2))},
        "each head": {"attn_mask": torch.randn(8, 5, 7, generator=torch.Generator().manual_seed(2))},
    }[kind]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["none", "padding", "places", "both", "added", "each head"])
@pytest.mark.parametrize("weights", [False, True])
def test_with_all_heads_it_is_the_base_class(way: str, kind: str, weights: bool) -> None:
    made = attention(**WAYS[way])
    asked = {**masks(kind), "need_weights": weights}
    wanted, found = (one(*inputs(made), **asked) for one in (made, as_narrow(made)))
    assert torch.allclose(found[0], wanted[0], atol=1e-5)
    assert (found[1] is None) == (not weights)
    if weights:
        assert torch.allclose(found[1], wanted[1], atol=1e-5)


def test_arguments_by_place_weights_by_head_and_no_batch() -> None:
    made = attention()
    one = [x[0] for x in inputs(made)]
    for args in ((None, True, None, False), (None, False)):
        wanted, found = made(*one, *args), as_narrow(made)(*one, *args)
        assert torch.allclose(found[0], wanted[0], atol=1e-5)
        assert found[1] is wanted[1] is None or torch.allclose(found[1], wanted[1], atol=1e-5)


class Encoder(nn.Module):
    """(B, L, 16) -> (B, 3), as it is written everywhere."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, **options)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_loses_heads_and_goes_on_without_the_fused_calls() -> None:
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 5, 16)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    coupling = proven(model, couple(model, x), x)
    heads = [group for group in coupling.groups if group.kind == "heads"]
    assert [group.units for group in heads] == [4, 4]
    kept = {group.name: [0, 3] for group in heads}
    small, whole = removed(model, heads, kept), silenced(model, heads, kept)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for given in ((x,), (x, padding)):
        with torch.no_grad():  # where the original takes the fused calls
            assert torch.allclose(small(*given), whole(*given), atol=1e-5)
    first = small.encoder.layers[0].self_attn
    assert (first.num_heads, first.head_dim, tuple(first.in_proj_weight.shape)) == (2, 4, (24, 16))
    small.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())
    again = proven(small.eval(), couple(small, x), x)
    assert [group.units for group in again.groups if group.kind == "heads"] == [2, 2]


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_it_is_quantized_and_goes_to_the_runtimes(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, examples = Encoder().eval(), [torch.randn(n, 5, 16) for n in (2, 3, 4)]
    steps = [Step("prune", f"encoder.layers.{n}.self_attn:heads", OPTIONS) for n in range(2)]
    weights = [f"encoder.layers.0.self_attn.{name}" for name in ("in_proj_weight", "out_proj.weight")]
    coded = [Step("weight_only", name, {"code": "integer", "bits": 8}) for name in weights]
    sites, context = analyse(model, examples).sites, transforms.Context(examples=examples)
    pruned = transforms.apply(model, Plan(tuple(steps)), sites, context)
    small = transforms.apply(model, Plan((*steps, *coded)), sites, context)
    predict = discover.method("runtimes", runtime).prepare(small, examples, tmp_path)
    with torch.no_grad():
        whole, found = pruned(examples[1]), small(examples[1])
    assert 0 < float((found - whole).norm()) < 0.05 * float(whole.norm())
    assert torch.allclose(torch.as_tensor(predict(examples[1])), found, atol=1e-4)


def test_a_model_of_its_old_widths_keeps_its_class() -> None:
    model = Encoder()
    narrow(model)
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention
