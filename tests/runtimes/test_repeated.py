"""A graph in which equal blocks were exported once computes what PyTorch does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from runtimes.talkers import rounded, talker, tokens
from torch import nn

from flyweight.analysis.sites import analyse
from flyweight.runtimes import _export, _repeated
from flyweight.runtimes import onnxruntime as runtime

EXAMPLES = [torch.randn(1, 5, 16), torch.randn(3, 7, 16)]


class Block(nn.Module):
    """A residual layer with a norm, scaled by what kind of block it is."""

    def __init__(self, number: int, sign: float, pair: bool) -> None:
        super().__init__()
        self.layer_idx, self.sign, self.pair = number, sign, pair
        self.norm, self.inner = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, scale: float, mask: torch.Tensor) -> Any:
        by_number = 2.0 if self.layer_idx == 99 else 1.0
        found = x + self.sign * by_number * scale * self.inner(torch.tanh(self.norm(x))) * mask
        return (found, None) if self.pair else found


class Stack(nn.Module):
    """Blocks between two layers."""

    def __init__(
        self, numbers: range = range(4), signs: tuple[float, ...] = (1.0,), pair: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(
            Block(number, signs[place % len(signs)], pair) for place, number in enumerate(numbers)
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = (x.sum(-1, keepdim=True) > 0).float()
        x = self.first(x)
        for block in self.blocks:
            found = block(x, 0.5, mask)
            x = found[0] if isinstance(found, tuple) else found
        return self.last(x)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the modules that are exported, in order; nothing that was exported before is known."""
    seen: list[str] = []
    program = _export._program

    def noted(module: nn.Module, *rest: Any) -> Any:
        seen.append(type(module).__name__)
        return program(module, *rest)

    monkeypatch.setattr(_export, "_program", noted)
    monkeypatch.setattr(_export, "_SKELETONS", {})
    return seen


def leaders(model: nn.Module, example: torch.Tensor = EXAMPLES[0]) -> dict[str, str]:
    sites = [site.name for site in analyse(model.eval(), [example]).sites]
    found = _repeated.equal(model, copy.deepcopy(model), sites, example)
    return {} if found is None else dict(found.leaders)


def gap(model: nn.Module, examples: list[torch.Tensor], unseen: torch.Tensor, where: Path) -> float:
    predict = runtime.prepare(model.eval(), examples, where)
    with torch.no_grad():
        pairs = [(wanted(predict(x)), wanted(model(x))) for x in (*examples, unseen)]
    return max(float((found - own).norm() / own.norm()) for found, own in pairs)


def wanted(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


def test_blocks_of_one_code_are_led_by_the_first() -> None:
    assert leaders(Stack()) == {f"blocks.{index}": "blocks.0" for index in range(4)}


def test_blocks_of_two_kinds_have_two_leaders() -> None:
    assert leaders(Stack(range(6), (1.0, -1.0))) == {f"blocks.{i}": f"blocks.{i % 2}" for i in range(6)}


def test_a_block_that_computes_by_its_number_is_not_led_by_another() -> None:
    found = leaders(Stack(range(95, 103)))
    assert {path for path, leader in found.items() if path == leader} == {"blocks.0", "blocks.4"}


def test_few_or_different_blocks_are_exported_whole() -> None:
    assert leaders(Stack(range(2))) == {}
    assert leaders(Stack(range(4), (1.0, 2.0, 3.0, 4.0))) == {}


@pytest.mark.parametrize("pair", [False, True])
def test_the_graph_computes_what_pytorch_does(pair: bool, programs: list[str], tmp_path: Path) -> None:
    model = Stack(range(6), (1.0, -1.0), pair).eval()
    assert gap(model, EXAMPLES, torch.randn(2, 3, 16), tmp_path) < 1e-5
    assert programs == ["_Flat", "_Alone", "_Alone"]


def test_a_language_model_of_integers_too(programs: list[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = talker(num_hidden_layers=4)
    examples = [tokens(1, 7), tokens(3, 7)]
    assert gap(model, examples, tokens(2, 11), tmp_path) < 1e-4
    assert programs == ["_Flat", "_Alone"]
    (tmp_path / "rounded").mkdir()
    assert gap(rounded(model, 8), examples, tokens(2, 11), tmp_path / "rounded") < 1e-4
    assert programs == ["_Flat", "_Alone"]


def test_what_cannot_be_put_together_is_exported_whole(
    programs: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*given: Any) -> None:
        raise ValueError

    monkeypatch.setattr(_repeated, "_fill", broken)
    assert gap(Stack(), EXAMPLES, torch.randn(2, 3, 16), tmp_path) < 1e-5
    assert programs == ["_Flat", "_Alone", "_Flat"]
