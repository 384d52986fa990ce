"""Chains of blocks: found where they are, refused where running them one by one is something else, and replayed exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from flyweight.analysis import blocks
from flyweight.analysis.blocks import Chain
from flyweight.errors import ModelError
from flyweight.inputs.check import digest, run
from flyweight.testing.zoo import ZOO, missing

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Backbone(nn.Module):
    """Layers in a list, called as the given function says."""

    def __init__(self, call: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self._call = call
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> Any:
        for index, layer in enumerate(self.layers):
            x = self._call(layer, x, index)
        return self.head(x)


class Kinds(nn.Module):
    """A block that takes its state by name and gives it first in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, scale: float = 1.0, hidden_states: torch.Tensor | None = None) -> tuple[Any, ...]:
        return self.inner(hidden_states) * scale, "something else"


class Counting(nn.Linear):
    """A block that remembers how often it was called."""

    times = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.times += 1
        return super().forward(x) * self.times


def linears(count: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(8, 8) for _ in range(count)]


def plainly(layer: nn.Module, x: torch.Tensor, index: int) -> Any:
    return layer(x)


def expect(model: nn.Module, *paths: str, example: Any = X) -> None:
    found = blocks.blocks(model.eval(), example)
    assert (() if found is None else found.paths) == paths


LISTED = {
    "mlp": "0 1 2", "residual_conv": "first.0 first.1", "encoder": "0 1 2 3", "recommender": "tower.0 tower.1 tower.2",
    "conv_norm": "0 1 2 3 4 5 6 7 8", "tiny_bert": "encoder.layer.0 encoder.layer.1",
    "tiny_llama": "model.layers.0 model.layers.1", "tiny_gpt2": "transformer.h.0 transformer.h.1",
    "called_twice": "", "attention": "", "branching": "", "tuple_input": "",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LISTED)
def test_the_chain_of_a_model_of_the_zoo(name: str) -> None:
    entry = next(one for one in ZOO if one.name == name)
    if missing(entry):
        pytest.skip(str(missing(entry)))
    model = entry.build().eval()
    before = digest(model.state_dict())
    expect(model, *LISTED[name].split(), example=entry.examples()[0])
    assert digest(model.state_dict()) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_vision_transformer() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **sizes)).eval()
    found = blocks.blocks(model, torch.randn(2, 3, 8, 8))
    assert found is not None
    assert [path.rpartition(".")[2] for path in found.paths] == ["0", "1", "2"]


def test_pytorchs_encoder_with_a_mask() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 3).eval()
    mask = torch.tensor([[False, False, True], [False, False, False]])
    example = {"src": torch.randn(2, 3, 8), "src_key_padding_mask": mask}
    expect(model, "layers.0", "layers.1", "layers.2", example=example)


def test_state_by_name_and_in_a_tuple() -> None:
    model = Backbone(lambda layer, x, index: layer(scale=index + 1.0, hidden_states=x)[0], Kinds(), Kinds())
    expect(model, "layers.0", "layers.1")


def test_a_deep_chain_is_preferred_to_a_long_one_inside_a_block_and_to_a_coarse_one_around_it() -> None:
    torch.manual_seed(0)
    inner = [nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(3)]) for _ in range(4)]

    class Residual(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body, self.out = body, nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.out(self.body(x) + 0)

    deep = Backbone(plainly, *[Residual(body) for body in inner])
    expect(nn.Sequential(deep, nn.Linear(2, 2)), *[f"0.layers.{index}" for index in range(4)])


def test_a_chain_goes_through_sequences_in_sequences() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8)))
    expect(model, "0.0", "0.1", "1.0")


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x, index: layer(x) + 0,
        lambda layer, x, index: layer(x).mul_(2),
        lambda layer, x, index: layer(layer(x)),
    ],
    ids=["something between", "changed in place", "called twice"],
)
def test_no_chain(call: Callable[..., Any]) -> None:
    expect(Backbone(call, *linears()))


def test_a_block_with_a_memory_is_refused() -> None:
    expect(Backbone(plainly, Counting(8, 8), Counting(8, 8)))


def test_a_block_that_fails_when_it_runs_by_itself_is_refused() -> None:
    def call(layer: nn.Module, x: torch.Tensor, index: int) -> Any:
        layer.allowed = True
        try:
            return layer(x)
        finally:
            layer.allowed = False

    class Guarded(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.allowed:
                raise KeyError("not by itself")
            return super().forward(x)

    expect(Backbone(call, Guarded(8, 8), Guarded(8, 8)))


def test_blocks_that_run_one_by_one_give_what_the_model_gives() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Hardtanh(inplace=True))
    expect(model, "0", "1", "2")  # the last one has no weights, and nothing comes after it
    chain, examples = Chain(("0", "1", "2", "3")), [X, X[:1], 2 * X]
    found = blocks.stream(model, chain, examples)
    assert found is not None
    for index, example in enumerate(examples):
        state = found.states[index]
        for path, arguments in zip(chain.paths, found.arguments, strict=True):
            before = state.clone()
            after = blocks.leaving(model.get_submodule(path), arguments[index], state)
            assert torch.equal(state, before)
            state = after
        assert torch.equal(state, run(model, example))


def test_arguments_are_each_blocks_own() -> None:
    def call(layer: nn.Module, x: torch.Tensor, index: int) -> Any:
        return layer(scale=index + 1.0, hidden_states=x)[0]

    found = blocks.stream(Backbone(call, Kinds(), Kinds()), Chain(("layers.0", "layers.1")), [X, X])
    assert found is not None
    assert [[one.kwargs for one in block] for block in found.arguments] == [
        [{"scale": 1.0}] * 2,
        [{"scale": 2.0}] * 2,
    ]


def test_examples_that_take_another_way_have_no_stream() -> None:
    def call(layer: nn.Module, x: torch.Tensor, index: int) -> Any:
        return x if len(x) == 1 and index == 1 else layer(x)

    model = Backbone(call, *linears())
    chain = blocks.blocks(model, X)
    assert chain is not None
    assert len(chain.paths) == 3
    assert blocks.stream(model, chain, [X, X[:1]]) is None
    assert blocks.entering(model, chain, [X, X[:1]]) is not None  # the first block is reached either way


def test_what_enters_is_a_copy_and_nothing_after_is_run() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), Counting(8, 8))
    states = blocks.entering(model, Chain(("1", "2")), [X, -X])
    assert states is not None
    assert [torch.equal(state, model[0](x)) for state, x in zip(states, (X, -X), strict=True)] == [True, True]
    assert model[2].times == 0
    assert blocks.entering(model, Chain(("2", "1")), [X]) is not None


def test_calls_come_in_their_order_and_number() -> None:
    model = Backbone(lambda layer, x, index: layer(layer(x)) if index else layer(x), *linears(2))
    assert blocks.calls(model, {"head", "layers.0", "layers.1"}, X) == (
        "layers.0",
        "layers.1",
        "layers.1",
        "head",
    )


def test_a_pass_ends_where_it_has_told_all() -> None:
    model = nn.Sequential(Counting(8, 8), Counting(8, 8), Counting(8, 8))
    blocks.reach(model, blocks.Arguments((None,), {}), X, ["0", "1"])
    assert [layer.times for layer in model] == [1, 1, 0]


def test_a_block_without_a_tensor_is_named() -> None:
    class Silent(nn.Module):
        def forward(self, x: torch.Tensor) -> str:
            return "nothing"

    with pytest.raises(ModelError, match="Silent"):
        blocks.leaving(Silent(), blocks.Arguments((None,), {}), X)
