"""One small run from end to end, and what it leaves: the result, the artifact, the report; and what it leaves alone."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from planning import made
from torch import nn

import flyweight
from flyweight.evaluation import timing
from flyweight.inputs.check import digest
from flyweight.records import Goal, Interval, Plan, Result, Step, Task
from flyweight.runtimes import onnxruntime
from flyweight.search.study import Study
from flyweight.stages import verify

pytestmark = pytest.mark.skipif(onnxruntime.available() is not None, reason="needs onnxruntime")
DATA = torch.randn(120, 64, generator=torch.Generator().manual_seed(3))
GOAL = Goal(max_drop=0.05, minimize="size", within=300, runtime="onnxruntime", seed=11)
MEASURED = {
    "score", "score_interval", "latency_ms", "latency_interval", "bytes", "peak_memory_bytes", "runtime", "plan",
}  # fmt: skip
RESULT = {
    "status",
    "goal",
    "machine",
    "baseline",
    "best",
    "front",
    "evaluations",
    "seconds",
    "versions",
    "seed",
}


def model() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Sequential(
            nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.5), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 7)
        )
    made[0].weight.requires_grad = False
    return made.train()


def task(made: nn.Module) -> Task:
    with torch.no_grad():
        wanted = made.eval()(DATA)
    made.train()

    def score(predict: Callable[[Any], Any]) -> list[float]:
        found = predict(DATA)
        return (1 - (found - wanted).square().mean(1) / wanted.square().mean()).tolist()

    return Task(name="end to end", model=made, examples=[DATA[:16], DATA[16:40]], score=score)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Time for moments only: sizes decide here."""
    real = timing.race
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "race", lambda first, second, seconds=0.0: real(first, second, 0.02))
        yield


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished run and what its input was before."""

    out: Path
    result: Result
    model: nn.Module
    before: tuple[object, ...]


def state(made: nn.Module) -> tuple[object, ...]:
    """Everything that a run must leave as it found it."""
    return (
        digest(made.state_dict()),
        [module.training for module in made.modules()],
        [p.requires_grad for p in made.parameters()],
        [type(module) for module in made.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in made.modules()],
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    made = model()
    before = state(made)
    out = tmp_path_factory.mktemp("run") / "out"
    return Done(out, flyweight.optimize(task(made), GOAL, out=out), made, before)


def test_the_goal_is_met_and_said_so(done: Done) -> None:
    result = done.result
    assert result.status == "met"
    assert result.best.verdict == "met"
    assert result.best.drop_interval is not None
    assert result.best.drop_interval.high <= GOAL.max_drop
    assert result.best.bytes < result.baseline.bytes
    assert result.verdict.startswith(f"{result.best.name} on onnxruntime is ")
    assert result.best in result.front
    assert result.evaluations == 1 + sum(trial.measured is not None for trial in result.trials)
    assert 0 < result.seconds_measuring < result.seconds
    assert [choice.site for choice in result.layers] == ["0", "3", "5"]
    assert any("training mode" in note for note in result.notes)


def test_the_result_file_has_every_field_of_the_surface(done: Done) -> None:
    value = json.loads((done.out / "result.json").read_text())
    assert value.keys() >= RESULT
    for measured in (value["baseline"], value["best"], *value["front"]):
        assert measured.keys() >= MEASURED
        assert measured["bytes"] > 0
        assert measured["latency_interval"][0] <= measured["latency_ms"] <= measured["latency_interval"][1]
    assert value["goal"] == GOAL.to_json()
    assert value["seed"] == GOAL.seed
    assert Result.from_json(value) == done.result


def test_what_is_shown_is_what_is_on_the_disk(done: Done) -> None:
    """Bytes are file bytes; trials are those of the study; the report tells the verdict and runs nothing."""
    assert done.result.best.bytes == sum(path.stat().st_size for path in (done.out / "best").iterdir())
    stored = Study.read(done.out / "study.db").trials()
    assert [t.plan for t in stored] == [t.plan for t in done.result.trials if t.state != "skipped"]
    page = html.unescape((done.out / "report.html").read_text())
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert done.result.best.name in page
    assert verify(done.out / "best").startswith("sound: ")
    assert {path.name for path in done.out.iterdir()} == {"best", "report.html", "result.json", "study.db"}


def test_the_input_is_left_as_it_was(done: Done) -> None:
    assert state(done.model) == done.before


def test_the_artifact_runs_in_a_new_process_without_the_task(done: Done, tmp_path: Path) -> None:
    code = f"""
import flyweight, torch
data = torch.randn(120, 64, generator=torch.Generator().manual_seed(3))
torch.save(flyweight.load({str(done.out / "best")!r})(data), "found.pt")
"""
    source = str(Path(flyweight.__path__[0]).parent)
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": source}, check=True
    )
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert torch.equal(found, flyweight.load(done.out / "best")(DATA))
    assert sum(task(model()).score(lambda _: found)) / 120 == pytest.approx(done.result.best.score, abs=1e-9)  # type: ignore[arg-type]


def test_the_artifact_is_a_module_too(done: Done) -> None:
    """The same plan in PyTorch: as close as two runtimes are, from a model whose own weights do not matter."""
    fresh = model()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    with torch.no_grad():
        found = flyweight.load(done.out / "best", fresh)(DATA)
    wanted = flyweight.load(done.out / "best")(DATA)
    assert float((found - wanted).square().sum() / wanted.square().sum()) < 1e-3
    assert all(not parameter.any() for parameter in fresh.parameters())


def test_a_resumed_run_scores_nothing_again(done: Done, tmp_path: Path) -> None:
    calls = []
    again = task(model())
    counted = dataclasses.replace(again, score=lambda predict: calls.append(1) or again.score(predict))  # type: ignore[func-returns-value]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.db").write_bytes((done.out / "study.db").read_bytes())
    result = flyweight.optimize(counted, GOAL, out=tmp_path / "out", resume=True)
    assert calls == []
    assert result.best.plan == done.result.best.plan
    assert [t.plan for t in result.trials] == [t.plan for t in done.result.trials]


def test_the_same_seed_gives_the_same_plan(
    done: Done, tmp_path: Path, figure: Callable[[int, str], None]
) -> None:
    random.seed(99)
    torch.manual_seed(99)
    second = flyweight.optimize(task(model()), GOAL, out=tmp_path / "out")
    assert second.best.plan == done.result.best.plan
    assert second.best.score == done.result.best.score
    files, others = (
        {path.name: path.read_bytes() for path in (out / "best").iterdir() if path.name != "manifest.json"}
        for out in (done.out, tmp_path / "out")
    )  # the manifest tells times too
    assert files == others
    assert "model.onnx" in files
    figure(22, "two runs with one seed: equal plans, scores, and weights and graph to the byte; times differ")


def test_a_recipe_alone_is_measured(tmp_path: Path) -> None:
    plan = Plan((Step("weight_only", "0"), Step("weight_only", "3")))
    goal = dataclasses.replace(GOAL, minimize="latency")
    result = flyweight.optimize(task(model()), goal, out=tmp_path / "out", recipe=plan)
    found = [trial for trial in result.trials if trial.measured is not None]
    assert [trial.plan for trial in found] == [plan]
    assert result.evaluations == 2


def test_a_float_model_in_a_small_time_is_honest(tmp_path: Path) -> None:
    """No time to look at anything: infeasible, the original as it is, and the reason with every candidate."""
    result = flyweight.optimize(task(model()), dataclasses.replace(GOAL, within=1e-3), out=tmp_path / "out")
    assert result.status == "infeasible"
    assert result.best.name == "original"
    assert (tmp_path / "out" / "best" / "manifest.json").exists()


def test_what_turns_out_slower_when_timed_again_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = sys.modules["flyweight.optimize"]
    goal, told = Goal(minimize="latency"), []
    first, second = (made.measured(name, goal, speedup=speed) for name, speed in (("a", 3.0), ("b", 2.0)))
    first = dataclasses.replace(first, runtime="onnxruntime")
    slow = dataclasses.replace(first, speedup=0.9, speedup_interval=Interval(0.8, 1.0))

    def pack(session: Any, best: Any, original: Any, folder: Any, progress: Any) -> Any:
        told.append(best.name)
        return (slow if best.name == "a" else best), original

    monkeypatch.setattr(flow, "pack", pack)
    run = flow.Run(None, goal, None, None, 0.0)
    assert run.packed([first, second], made.ORIGINAL, Path()) == (second, made.ORIGINAL, True)
    assert told == ["a", "b"]
    assert run.notes == ["a on onnxruntime was 0.90 x as fast when it was timed again"]
    assert run.packed([first], made.ORIGINAL, Path())[2] is False
