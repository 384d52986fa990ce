"""The quantized layer computes what its integers say, whatever layer it was made of."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from flyweight.codes import integer
from flyweight.transforms import Context, plain_site, weight_only
from flyweight.transforms._int8 import int8
from flyweight.transforms._quantized import QuantizedLayer, round_to, shell


def quantized(layer: nn.Module, kind: str, input_scale: float | None = None) -> QuantizedLayer:
    return int8(layer, kind, reduced=False, input_scale=input_scale)


def seeded(make: object) -> nn.Module:
    torch.manual_seed(0)
    return make()  # type: ignore[operator]


LAYERS = {
    "linear": (lambda: nn.Linear(16, 5), "linear", (3, 16)),
    "linear without bias": (lambda: nn.Linear(16, 5, bias=False), "linear", (3, 16)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), "conv", (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), "conv", (2, 4, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4), "conv", (2, 4, 9, 9)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), "conv", (2, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), "conv", (1, 2, 4, 4, 4)),
    "embedding": (lambda: nn.Embedding(20, 6), "embedding", None),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_computes_with_its_decoded_weight(name: str) -> None:
    make, kind, shape = LAYERS[name]
    layer = seeded(make)
    x = torch.randint(20, (2, 3)) if shape is None else torch.randn(shape)
    found = quantized(layer, kind)
    plain = copy.deepcopy(layer)
    integers, on = found.encoded()
    rows = on.values(integers)
    plain.weight = nn.Parameter(rows.reshape(layer.weight.shape))
    assert torch.equal(found(x), plain(x))
    assert integers.abs().max() == 127
    assert found.scales.shape == (layer.weight.shape[0], 1)
    assert (found.bias is None) == (getattr(layer, "bias", None) is None)


def test_a_transposed_linear_layer_has_scales_per_output() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(16, 5)), nn.Parameter(torch.randn(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x, self.weight)

    layer = seeded(Turned)
    found = quantized(layer, "linear")
    assert found.scales.shape == (5, 1)
    assert found.weight.shape == (16, 5)
    x = torch.randn(3, 16)
    assert torch.equal(found(x), torch.addmm(layer.bias, x, found._decoded()))


def test_four_bits_take_half_a_byte() -> None:
    layer = seeded(lambda: nn.Linear(64, 8))
    options = weight_only.Options(coding=integer.Options(bits=4, group=32, symmetric=False))
    found = weight_only.replace(layer, plain_site(layer, ""), options, Context())[""]
    assert found.integers.shape == (8, 32)
    assert found.integers.dtype == torch.uint8
    assert found.scales.shape == (8, 2)
    assert found.zeros.shape == (8, 1)
    assert float((found._decoded() - layer.weight.detach()).abs().max()) < float(found.scales.max())


def test_dynamic_rounding_is_dynamic_quantize_linear() -> None:
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(3)) * 2 + 0.5
    layer = quantized(seeded(lambda: nn.Linear(16, 4)), "linear").dynamic()
    values = x.numpy().astype(np.float32)
    low, high = min(0, values.min()), max(0, values.max())
    scale = np.float32((high - low) / np.float32(255))
    zero = np.clip(np.rint(-low / scale), 0, 255)
    codes = np.clip(np.rint(values / scale) + zero, 0, 255)
    assert np.allclose(layer._round(x).numpy(), (codes - zero) * scale, atol=1e-6)


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 16), torch.full((2, 16), 3.0), torch.full((2, 16), -3.0), torch.zeros(0, 16)]
)
def test_dynamic_rounding_takes_constant_and_empty_inputs(x: torch.Tensor) -> None:
    layer = quantized(seeded(lambda: nn.Linear(16, 4)), "linear").dynamic()
    assert torch.allclose(layer._round(x), x, atol=1e-6)
    assert torch.isfinite(layer(x)).all()


def test_static_rounding_is_quantize_linear() -> None:
    x = torch.tensor([-9.0, -1.0, -0.05, 0.0, 0.05, 0.15, 0.149, 1.0, 99.0])
    found = round_to(x, torch.tensor(0.1), torch.tensor(20.0))
    wanted = (np.clip(np.rint(x.numpy() / np.float32(0.1)) + 20, 0, 255) - 20) * 0.1
    assert np.allclose(found.numpy(), wanted, atol=1e-6)
    assert torch.equal(x[:1], torch.tensor([-9.0]))


def test_rounding_does_not_write_into_its_input() -> None:
    x = torch.randn(4, 16)
    kept = x.clone()
    layer = quantized(seeded(lambda: nn.Linear(16, 4)), "linear").static((0.02, 128), None)
    layer(x)
    assert torch.equal(x, kept)


def test_the_bias_of_a_dead_channel_still_fits_into_32_bits() -> None:
    layer = seeded(lambda: nn.Conv2d(4, 8, 3))
    with torch.no_grad():
        layer.weight[3] *= 1e-12
        layer.bias[3] = 50.0
    step = 0.01
    found = quantized(layer, "conv", input_scale=step)
    integers = layer.bias.detach().double() / (found.scales[:, 0].double() * step)
    assert float(integers.abs().max()) < 2**31
    x = torch.randn(2, 4, 9, 9)
    assert torch.allclose(found(x)[:, 3], layer(x)[:, 3], atol=1e-6)


def test_keyword_arguments_are_rounded_too() -> None:
    layer = quantized(seeded(lambda: nn.Linear(16, 4)), "linear").static((0.5, 128), None)
    x = torch.randn(2, 16)
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_come_out_as_they_went_in(dtype: torch.dtype) -> None:
    layer = seeded(lambda: nn.Linear(16, 4)).to(dtype)
    for found in (
        quantized(layer, "linear"),
        quantized(layer, "linear").dynamic(),
        quantized(layer, "linear").static((0.05, 128), None),
    ):
        x = torch.randn(3, 16).to(dtype)
        assert found(x).dtype == found.weight.dtype == dtype
        assert torch.allclose(found(x).float(), layer(x).float(), atol=0.15)


@pytest.mark.parametrize("weight", [torch.randn(16, 8).T, torch.randn(8, 32)[:, ::2]])
def test_weights_that_are_not_contiguous(weight: torch.Tensor) -> None:
    layer = nn.Linear(16, 8)
    layer.weight = nn.Parameter(weight)
    found = quantized(layer, "linear")
    assert bool(((found._decoded() - weight).abs() <= found.scales * 0.51).all())


def test_energy_of_grouped_convolutions_is_left_out() -> None:
    layer = seeded(lambda: nn.Conv2d(4, 4, 3, groups=4))
    assert weight_only._spread(torch.rand(4) + 0.1, layer, "conv") is None
    assert weight_only._spread(torch.rand(4) + 0.1, seeded(lambda: nn.Conv2d(4, 4, 3)), "conv").shape == (36,)


def test_a_shell_has_all_but_the_weight() -> None:
    layer = nn.Linear(16, 4)
    hollow = shell(layer)
    assert hollow.weight is None
    assert torch.equal(hollow.bias, layer.bias)
    assert layer.weight is not None
    assert hollow.bias.data_ptr() != layer.bias.data_ptr()


def test_fused_transformer_layers_do_not_compute_past_the_layer() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    rounded = []
    for name in ("linear1", "linear2"):
        layer = quantized(getattr(encoder, name), "linear").static((0.5, 128), None)
        layer.register_buffer("mark", torch.zeros(1))
        setattr(encoder, name, layer)
        original = layer._round
        layer._round = lambda value, original=original: rounded.append(1) or original(value)  # type: ignore[method-assign]
    with torch.no_grad():
        encoder(x)
    assert len(rounded) == 2


def test_code_that_reads_the_weight_gets_the_decoded_one() -> None:
    layer = quantized(seeded(lambda: nn.Linear(16, 4)), "linear")
    x = torch.randn(2, 16)
    assert torch.allclose(functional.linear(x, layer.weight, layer.bias), layer(x), atol=1e-6)
    assert isinstance(layer, QuantizedLayer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_layer_computes_the_same_to_the_bit(dtype: torch.dtype) -> None:
    layer = seeded(lambda: nn.Conv2d(4, 6, 3, groups=2)).to(dtype)
    found = quantized(layer, "conv")
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(4)).to(dtype)
    assert type(found.plain()) is nn.Conv2d
    assert torch.equal(found.plain()(x), found(x))
    assert found.inner._parameters["weight"] is None


def test_a_layer_that_rounds_its_inputs_has_no_plainer_one() -> None:
    layer = quantized(seeded(lambda: nn.Linear(16, 4)), "linear").dynamic()
    assert layer.plain() is layer


def tied_pair() -> tuple[QuantizedLayer, QuantizedLayer]:
    embed, head = nn.Embedding(20, 16), nn.Linear(16, 20)
    head.weight = embed.weight
    layer = quantized(head, "linear").dynamic()
    return layer, layer.beside(embed, rounding=False)


def test_a_layer_beside_another_computes_with_the_same_stored_tensors() -> None:
    head, embed = tied_pair()
    assert all(head.get_buffer(name) is embed.get_buffer(name) for name in head.names)
    assert torch.equal(embed(torch.arange(20)), head._decoded())
    assert (head.activations, embed.activations) == ("dynamic", "float")
    assert embed.bias is None
    assert head.bias is not None
    handle = head.register_forward_hook(lambda *_: pytest.fail("a hook of another layer ran"))
    embed(torch.arange(3))
    handle.remove()


def test_what_is_rounded_for_one_layer_is_rounded_alike_beside_it() -> None:
    first, second = nn.Linear(16, 20), nn.Linear(16, 20, bias=False)
    second.weight = first.weight
    layer = quantized(first, "linear").static((0.1, 7), (0.2, 3))
    other = layer.beside(second, rounding=True)
    x = torch.randn(3, 16)
    assert torch.allclose(other(x) + first.bias, layer(x), atol=1e-6)
    assert torch.equal(other.input_grid, layer.input_grid)


@pytest.mark.parametrize("moved", [0, 1])
def test_layers_share_their_weight_after_a_cast_of_either_or_of_both(moved: int) -> None:
    pair = tied_pair()
    pair[moved].double()
    assert pair[0].scales is pair[1].scales
    assert pair[0].scales.dtype == torch.float64
    nn.ModuleList(pair).half()
    assert pair[0].scales is pair[1].scales


def test_a_copy_of_a_model_shares_within_itself_alone() -> None:
    pair = nn.ModuleList(tied_pair())
    twin = copy.deepcopy(pair)
    assert twin[0].integers is twin[1].integers
    assert twin[0].integers is not pair[0].integers
    twin.double()
    assert pair[0].scales.dtype == torch.float32
    assert len({t.data_ptr() for k, t in twin.state_dict().items() if k.endswith("integers")}) == 1
