"""The measuring place: what counts as the same output, what fails, and that failures are answers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from flyweight.analysis.sites import analyse
from flyweight.errors import DataError, ModelError
from flyweight.evaluation import timing
from flyweight.evaluation.bench import Bench, deviation, exact, measured_of, survey_from
from flyweight.records import Goal, Plan, Step, Task
from flyweight.runtimes import torch as eager
from flyweight.transforms import Context

INT8 = Plan((Step("weight_only", "0"),))
DATA = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timing.race
    monkeypatch.setattr(timing, "race", lambda first, second, seconds=0.0: real(first, second, 0.02))


def agreement(predict: object) -> list[float]:
    return (1 - predict(DATA).square().mean(1)).tolist()  # type: ignore[operator]


def bench(folder: Path, score: object = agreement, goal: Goal | None = None) -> Bench:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    task = Task(name="t", model=model, examples=[DATA], score=score)  # type: ignore[arg-type]
    found = analyse(model, [DATA])
    return Bench(task, goal or Goal(max_drop=0.5), found.sites, Context(found.statistics), folder)


def test_a_candidate_is_measured_in_full(tmp_path: Path) -> None:
    made = bench(tmp_path)
    original = made.baseline()
    trial = made.measure(3, "int8", "torch", INT8)
    assert (trial.number, trial.state) == (3, "measured")
    found = trial.measured
    assert found is not None
    assert found.plan == INT8
    assert 0 < abs(found.drop) < 0.01
    assert found.drop_interval is not None
    assert found.drop_interval.low <= found.drop <= found.drop_interval.high
    assert found.bytes < original.bytes
    assert found.verdict == "met"
    assert "within the bound of 50.00%" in trial.reason
    assert made.evaluations == 2
    assert 0 < made.measuring < 30
    made.forget()
    assert list(tmp_path.iterdir()) == []


def test_the_original_is_its_own_measure(tmp_path: Path) -> None:
    found = bench(tmp_path).baseline()
    assert (found.drop, found.speedup, found.verdict) == (0, 1, "met")
    assert found.plan == Plan()
    assert found.peak_memory_bytes is None or found.peak_memory_bytes >= 0


def test_a_score_that_fails_on_a_candidate_is_a_failed_trial(tmp_path: Path) -> None:
    calls: Iterator[int] = iter(range(9))
    made = bench(tmp_path, lambda predict: [1.0, 0.5] if next(calls) == 0 else [1.0])
    made.score_original()
    trial = made.measure(0, "int8", "torch", INT8)
    assert trial.state == "failed"
    assert "the same samples each time, got 2 and 1" in trial.reason
    assert measured_of([trial]) == []


def test_an_original_that_scores_0_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must not be 0"):
        bench(tmp_path, lambda predict: [0.0, 0.0]).score_original()


def test_an_output_without_a_tensor_is_refused_at_once(tmp_path: Path) -> None:
    class Wordy(nn.Sequential):
        def forward(self, x: torch.Tensor) -> dict[str, float]:
            return {"mean": float(super().forward(x).mean())}

    made = bench(tmp_path)
    made.task.__dict__["model"] = Wordy(nn.Linear(16, 4)).eval()
    with pytest.raises(ModelError, match="must hold a tensor"):
        made.score_original()


def test_a_runtime_that_fails_is_a_survey_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("no such kernel\nand a long list of others")

    monkeypatch.setattr(eager, "prepare", refuse)
    found = bench(tmp_path).survey("torch", INT8, 0.1)
    assert found.failure == "torch must load the model, got ValueError: no such kernel"
    assert survey_from(found.to_json()) == found


def test_a_runtime_that_gives_nan_is_a_survey_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench(tmp_path)
    monkeypatch.setattr(eager, "caller", lambda model: lambda batch: torch.full((40, 4), math.nan))
    assert made.survey("torch", INT8, 0.1).failure.startswith("a runtime's output must be finite, got NaN")


def test_a_survey_tells_speed_and_bytes(tmp_path: Path) -> None:
    found = bench(tmp_path).survey("torch", INT8, 0.1)
    assert not found.failure
    assert found.latency_ms > 0
    assert found.speedup > 0
    assert survey_from(found.to_json()) == found


def test_files_are_kept_from_the_survey_to_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench(tmp_path)
    _, first = made.prepare("torch", INT8)
    assert made.prepare("torch", INT8)[1] is first
    monkeypatch.setattr("flyweight.evaluation.bench.KEEP", 0)
    made.prepare("torch", Plan())
    assert not first.files[0].exists()  # the oldest goes


def test_the_original_is_never_changed(tmp_path: Path) -> None:
    made = bench(tmp_path)
    before = {name: value.clone() for name, value in made.task.model.state_dict().items()}
    made.measure(0, "int8", "torch", INT8)
    assert all(torch.equal(value, before[name]) for name, value in made.task.model.state_dict().items())


def test_only_structure_is_exact() -> None:
    assert exact(Plan())
    assert exact(Plan((Step("fold_batch_norm", "conv", {"norm": "bn"}),)))
    assert not exact(INT8)


@pytest.mark.parametrize(
    ("wanted", "found", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([3.0, 4.0], [3.0, 5.0], 1 / 25),
        ([1.0, -math.inf], [1.0, -math.inf], 0.0),
        ([1.0, 2.0], [1.0, math.nan], math.inf),
        ([1.0, 2.0], [1.0], math.inf),
    ],
)
def test_a_deviation_is_relative_and_squared(
    wanted: list[float], found: list[float], expected: float
) -> None:
    one, two = torch.tensor(wanted), torch.tensor(found)
    assert deviation({"a": one, "b": torch.tensor([1])}, {"a": two, "b": torch.tensor([7])}) == pytest.approx(
        expected
    )
    assert deviation((torch.ones(2), one), (torch.ones(2), two)) == pytest.approx(expected)
