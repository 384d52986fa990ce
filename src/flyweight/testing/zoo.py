"""A zoo of small awkward models: each has a trait that compression tools stumble over.

A method's test runs over ZOO: it must work on each, or refuse by name. Builds are seeded and leave the global
random state alone; all are in eval mode, except the one that is there for being in training mode.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flyweight.records import Batch
from flyweight.testing import _awkward as awkward

TRAITS = {
    "attention": "attends",
    "batchnorm": "a batch norm with running statistics that are not 0 and 1",
    "bfloat16": "parameters and floating inputs in bfloat16",
    "branching": "the values of the input decide which layers run: it cannot be traced",
    "constant_channel": "an output channel whose weights all have one value",
    "conv1d": "a Conv1d",
    "depthwise": "a convolution with one group for each channel",
    "dict_input": "examples are dicts",
    "dict_output": "the output is a dict",
    "dropout": "a dropout with a probability above 0",
    "dynamic": "examples differ in more than the number of samples",
    "embedding": "more than half of the weights are in tables",
    "frozen": "a parameter that asks for no gradient",
    "functional": "a parameter that belongs to the model itself, not to a layer",
    "grouped": "a convolution with groups, more than 1 and fewer than channels",
    "hf_conv1d": "linear layers of a foreign class, with the weight transposed",
    "layernorm": "a layer norm",
    "no_parameters": "nothing to optimize",
    "outside": "a layer whose weight is read without calling the layer",
    "record_output": "the output is a dataclass",
    "recurrent": "an LSTM, a GRU or a cell of one",
    "relu6": "a ReLU6",
    "residual": "a sum of two branches",
    "reused": "a layer that one forward pass calls more than once",
    "row": "a weight with one row",
    "shared_buffer": "two modules hold one buffer",
    "tied": "two layers hold one parameter",
    "training": "left in training mode",
    "transposed": "a transposed convolution",
    "tuple_input": "examples are tuples",
    "tuple_output": "the output is a tuple",
    "wide_range": "weights of one layer that differ by a factor above 10**9",
    "zero_channel": "an output channel whose weights and bias are all 0",
}
"""What each trait means."""


@dataclass(frozen=True)
class Zoo:
    """One model of the zoo."""

    name: str
    build: Callable[[], nn.Module]
    """A new model, the same at each call."""
    examples: Callable[[], Sequence[Batch]]
    """3 to 6 inputs, the same at each call; the first has one sample."""
    traits: frozenset[str]
    """What is awkward about it: names in TRAITS."""
    note: str
    """What goes wrong with such models, in a few words."""
    needs: str | None = None
    """A package that the model comes from, or None for torch alone."""


def missing(entry: Zoo) -> str | None:
    """Why this model cannot be built here, with the way out, or None."""
    if entry.needs is None or importlib.util.find_spec(entry.needs) is not None:
        return None
    return f"{entry.name} needs the package {entry.needs}: pip install {entry.needs}"


def _build(make: Callable[[], nn.Module], *, training: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)  # type: ignore[arg-type]  # None only without statistics
                nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
                nn.init.uniform_(module.weight, 0.5, 2.0)
    return model.train(training)


def _zoo(
    name: str, make: Callable[[], nn.Module], examples: Callable[[], Sequence[Batch]], traits: str, note: str
) -> Zoo:
    found = frozenset(traits.split())
    return Zoo(name, functools.partial(_build, make, training="training" in found), examples, found, note)


def _normal(*shapes: tuple[int, ...], seed: int = 1) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source) for shape in shapes]


def _numbers(below: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    source = torch.Generator().manual_seed(1)
    return [torch.randint(below, shape, generator=source) for shape in shapes]


def _vectors() -> list[Tensor]:
    return _normal((1, 16), (2, 16), (7, 16), (4, 16))


def _pairs() -> list[Batch]:
    shapes = (1, 16), (2, 16), (7, 16)
    return list(zip(_normal(*shapes), _normal(*shapes, seed=2), strict=True))


def _images() -> list[Tensor]:
    return _normal((1, 8, 12, 12), (2, 8, 12, 12), (5, 8, 12, 12), (3, 8, 12, 12))


def _signals() -> list[Tensor]:
    return _normal((1, 4, 20), (2, 4, 33), (3, 4, 20), (1, 4, 64))


def _sequences() -> list[Tensor]:
    return _normal((1, 5, 16), (2, 5, 16), (3, 9, 16), (2, 1, 16))


def _tokens() -> list[Tensor]:
    return _numbers(50, (1, 6), (2, 6), (3, 11), (1, 2))


def _baskets() -> list[Batch]:
    users, items = _numbers(100, (1,), (2,), (5,)), _numbers(200, (1, 3), (2, 3), (5, 8))
    return [{"users": user, "items": item} for user, item in zip(users, items, strict=True)]


def _masked() -> list[Batch]:
    return [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} for tokens in _tokens()]


def _halves() -> list[Tensor]:
    return [x.bfloat16() for x in _vectors()]


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3))


def _grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 6, 1, groups=2))


def _depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def _conv_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, stride=2, bias=True), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 6, 3),
        nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def _conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(),
        nn.Conv1d(8, 8, 3, dilation=2, padding=2), awkward.LengthMean(), nn.Linear(8, 3),
    )  # fmt: skip


def _transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 4, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
        nn.ReLU(), nn.ConvTranspose2d(6, 6, 2, groups=3),
    )  # fmt: skip


def _lstm() -> nn.Module:
    return awkward.Recurrent(nn.LSTM(16, 16, num_layers=2, bidirectional=True, batch_first=True))


def _gru() -> nn.Module:
    return awkward.Recurrent(nn.GRU(16, 8, bias=False, batch_first=True))


def _encoder() -> nn.Module:
    layers = [
        nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", norm_first=first, batch_first=True)
        for first in (False, True)
    ]
    return nn.Sequential(*layers, awkward.FirstPlace(), nn.Linear(16, 3))


def _layer_norm() -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), nn.LayerNorm(16), nn.Linear(16, 3)
    )


def _shared_buffer() -> nn.Module:
    scale = torch.rand(16) + 0.5
    model = nn.Sequential(awkward.Scaled(16, scale), nn.ReLU(), awkward.Scaled(16, scale))
    next(model.parameters()).requires_grad_(False)
    return model


def _forgotten() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 3)
    )  # fmt: skip


def _changed(change: Callable[[nn.Linear], object]) -> nn.Module:
    """An MLP whose first layer is changed in place."""
    model = _mlp()
    first = model[0]
    if isinstance(first, nn.Linear):
        with torch.no_grad():
            change(first)
    return model


def _widen(layer: nn.Linear) -> None:
    layer.weight *= torch.logspace(-8, 2, 16)  # by input, so that every output channel has the whole range


def _empty(layer: nn.Linear) -> None:
    layer.weight[5] = 0
    layer.bias[5] = 0


def _flatten(layer: nn.Linear) -> None:
    layer.weight[5] = 0.5


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=400, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=32,
        )
    )  # fmt: skip


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=32, max_position_embeddings=32, tie_word_embeddings=True, use_cache=False,
        )
    )  # fmt: skip


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, use_cache=False)
    )


def _foreign(name: str, make: Callable[[], nn.Module], traits: str, note: str) -> Zoo:
    return dataclasses.replace(_zoo(name, make, _masked, traits, note), needs="transformers")


ZOO: tuple[Zoo, ...] = (
    _zoo("mlp", _mlp, _vectors, "", "nothing: the control"),
    _zoo("tied_embedding", lambda: awkward.TiedLanguageModel(50, 16), _tokens, "tied embedding dynamic",
         "one weight, two uses: changing one unties it or changes both"),
    _zoo("tied_products", lambda: awkward.TiedProducts(50), _tokens, "tied embedding dynamic",
         "one weight in three places, two of which multiply with it and have biases of their own"),
    _zoo("called_twice", lambda: awkward.CalledTwice(16), _vectors, "reused",
         "statistics of two calls must be merged"),
    _zoo("dict_output", lambda: awkward.TwoHeads(16, "dict"), _vectors, "dict_output",
         "the output is no tensor"),
    _zoo("tuple_output", lambda: awkward.TwoHeads(16, "tuple"), _vectors, "tuple_output",
         "the output is no tensor"),
    _zoo("record_output", lambda: awkward.TwoHeads(16, "record"), _vectors, "record_output",
         "the output is no tensor, and no dict or tuple either"),
    _zoo("tuple_input", lambda: awkward.Compare(16), _pairs, "tuple_input reused",
         "two inputs, one encoder, and a layer that is no Linear but holds a weight of three dimensions"),
    _zoo("grouped_conv", _grouped, _images, "grouped", "a channel count that must divide"),
    _zoo("depthwise_conv", _depthwise, _images, "depthwise batchnorm relu6",
         "few weights for each channel: one grid for all ruins them"),
    _zoo("conv_norm", _conv_norm, _images, "batchnorm relu6", "a norm to fold into a layer with a bias"),
    _zoo("residual_conv", lambda: awkward.Residual(8), _images, "residual batchnorm",
         "channels that are coupled through a sum"),
    _zoo("conv1d", _conv1d, _signals, "conv1d batchnorm dynamic", "lengths differ from example to example"),
    _zoo("transposed_conv", _transposed, _images, "transposed grouped",
         "the output channels are the weight's second dimension"),
    _zoo("concat_split", lambda: awkward.ConcatSplit(8), _images, "",
         "channels that move: put together, taken apart elsewhere"),
    _zoo("branching", lambda: awkward.Branching(16), _vectors, "branching", "no trace shows the whole model"),
    _zoo("lstm", _lstm, _sequences, "recurrent dynamic",
         "weights in no Linear, and a flat copy of them inside"),
    _zoo("gru", _gru, _sequences, "recurrent dynamic",
         "gates that runtimes want in another order, and a product within a gate"),
    _zoo("gru_cell", lambda: awkward.CellByCell(16), _sequences, "recurrent reused dynamic",
         "a loop of the model's own over places: a graph holds one length"),
    _zoo("recommender", lambda: awkward.Recommender(100, 200, 16), _baskets, "embedding dict_input dynamic",
         "the bytes are in tables, which no matrix product touches"),
    _zoo("attention", lambda: awkward.SelfAttention(16), _sequences, "attention outside dynamic",
         "the output projection is read, never called: replacing its module breaks it"),
    _zoo("cross_attention", lambda: awkward.CrossAttention(16), _sequences, "attention outside dynamic",
         "parts of one weight read different inputs; others are weights of their own"),
    _zoo("encoder", _encoder, _sequences, "attention outside layernorm dropout dynamic",
         "in eval mode a fused path reads all weights without calling a layer"),
    _zoo("layer_norm", _layer_norm, _vectors, "layernorm", "scales that can move into the next layer"),
    _zoo("one_row", lambda: nn.Sequential(nn.Linear(16, 1), nn.Tanh(), nn.Linear(1, 1)), _vectors, "row",
         "nothing to share among channels, and a weight of one value"),
    _zoo("no_parameters", lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), _vectors, "no_parameters",
         "nothing to optimize"),
    _zoo("bare_parameter", lambda: awkward.BareParameter(16), _vectors, "functional",
         "weights in no layer, some of them turned: a walk over layers does not see them"),
    _zoo("shared_buffer", _shared_buffer, _vectors, "shared_buffer frozen",
         "a buffer that two modules hold, and a parameter that must not be trained"),
    _zoo("forgotten_eval", _forgotten, _vectors, "training dropout batchnorm",
         "a forward pass changes the norm's statistics and gives another answer each time"),
    _zoo("bfloat16", lambda: _mlp().bfloat16(), _halves, "bfloat16",
         "half the bytes to begin with, in a type that NumPy lacks"),
    _zoo("wide_range", lambda: _changed(_widen), _vectors, "wide_range", "one grid cannot hold all weights"),
    _zoo("zero_channel", lambda: _changed(_empty), _vectors, "zero_channel", "a range of 0: a scale of 0"),
    _zoo("constant_channel", lambda: _changed(_flatten), _vectors, "constant_channel",
         "a range of 0 away from 0: the smallest value is the largest"),
    _foreign("tiny_bert", _bert, "attention layernorm dropout embedding record_output dict_input dynamic",
             "an encoder as it comes: dict in, record out, masks"),
    _foreign("tiny_llama", _llama, "attention tied record_output dict_input dynamic",
             "fewer key than query heads, a tied head, and norms of a foreign class"),
    _foreign("tiny_gpt2", _gpt2,
             "attention layernorm dropout tied hf_conv1d record_output dict_input dynamic",
             "linear layers that are no nn.Linear"),
)  # fmt: skip
