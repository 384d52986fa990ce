"""Artifacts of models with fewer blocks and shared weights: smaller files, loaded again by the plan alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flyweight import stages
from flyweight.artifact.load import load_module, load_predictor
from flyweight.inputs.check import run
from flyweight.records import Goal, Plan, Step, Task

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("one_thread")]
BATCH = torch.arange(40).view(4, 10)


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = (
            nn.LayerNorm(64),
            nn.Linear(64, 128),
            nn.GELU(),
            nn.Linear(128, 64),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Model(nn.Module):
    """A tied table and head around four blocks, of which the last has about the weight of the first."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(40, 64), nn.Linear(64, 40, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        with torch.no_grad():
            self.embed.weight[20:] = 2 * self.embed.weight[:20]
            self.blocks[3].up.weight.copy_(1.5 * self.blocks[0].up.weight)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


STEPS = (
    Step("drop", "blocks.1"),
    Step("activation", "blocks.2.act", {"by": "relu"}),
    Step("share", "blocks.3.up"),
    Step("share_rows", "head"),
    Step("prune", "blocks.2.up:neurons", {"ratio": 0.5}),
    Step("weight_only", "blocks.0.up"),
    Step("weight_only", "head.kept"),
)


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_an_artifact_of_all_methods_of_structure_is_loaded_again(tmp_path: Path, runtime: str) -> None:
    pytest.importorskip(runtime)
    model = Model().eval()
    task = Task(name="shortened", model=model, examples=[BATCH], score=lambda predict: 1.0)
    stages.apply(task, Plan(STEPS), Goal(runtime=runtime, within=60), tmp_path / "out")
    loaded = load_module(tmp_path / "out" / "best", Model(seed=1))
    assert not list(loaded.blocks[1].parameters())
    assert loaded.blocks[3].up.inner.integers.data_ptr() == loaded.blocks[0].up.integers.data_ptr()
    assert loaded.head.kept.integers.data_ptr() == loaded.embed.kept.integers.data_ptr()
    stored = sum(file.stat().st_size for file in (tmp_path / "out" / "best").glob("weights*"))
    assert stored < 0.45 * sum(4 * p.numel() for p in model.parameters())
    if runtime != "torch":
        predict = load_predictor(tmp_path / "out" / "best")
        assert torch.allclose(predict(BATCH), run(loaded, BATCH), atol=1e-3)
