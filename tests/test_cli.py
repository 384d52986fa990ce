"""The command line where all goes well; bad_inputs/ holds the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inputs.language_folders import prose, written

from flyweight.cli import duration, main, percent, read_plan
from flyweight.errors import UsageError
from flyweight.evaluation import timing
from flyweight.records import Goal, Plan, Result, Step

TASK = """
import torch
from torch import nn
from flyweight import Task

def task() -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5)).eval()
    data = torch.randn(40, 32)
    return Task(name="small", model=model, examples=[data], score=lambda p: (1 - 0.01 * p(data).square().mean(1)).tolist())
"""
PLAN = Plan(
    (Step("weight_only", "0"), Step("weight_only", "2", {"bits": 4, "group": 32, "symmetric": False}))
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timing.race
    monkeypatch.setattr(timing, "race", lambda first, second, seconds=0.0: real(first, second, 0.02))


@pytest.fixture
def task(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(TASK)
    return str(tmp_path / "mine.py")


def test_from_a_task_to_a_report(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert (
        main(["optimize", task, "--runtime", "torch", "--max-drop", "2%", "--within", "1m", "-o", str(out)])
        == 0
    )
    said = capsys.readouterr()
    result = Result.from_json(json.loads((out / "result.json").read_text()))
    assert said.out.startswith(f"{result.status}: ")
    assert "study.db" in said.out
    assert "timing every candidate" in said.err
    assert (result.goal.max_drop, result.goal.within) == (0.02, 60)
    assert {path.name for path in out.iterdir()} == {"result.json", "report.html", "study.db", "best"}

    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == page
    assert capsys.readouterr().out == said.out

    assert main(["optimize", task, "--runtime", "torch", "--max-drop", "2%", "-o", str(out), "--resume"]) == 0
    assert Result.from_json(json.loads((out / "result.json").read_text())).best.plan == result.best.plan

    assert main(["verify", str(out / "best")]) == 0
    assert "sound: " in capsys.readouterr().out


def test_a_recipe_becomes_an_artifact_that_can_be_judged(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(PLAN.to_json()))
    out = tmp_path / "out"
    assert (
        main(["apply", task, "--recipe", str(tmp_path / "recipe.json"), "--runtime", "torch", "-o", str(out)])
        == 0
    )
    said = capsys.readouterr().out
    assert "2 steps applied" in said
    size = sum(path.stat().st_size for path in (out / "best").iterdir())
    assert f"{size:,} bytes" in said
    assert main(["evaluate", task, str(out / "best")]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[1:3]] == ["original", "artifact"]
    assert "on torch" in said
    assert "other weights" not in said
    assert read_plan(str(out / "best" / "manifest.json")) == PLAN


def test_a_model_is_profiled(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", task, "--runtime", "torch"]) == 0
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in said.splitlines() if line and line[0].isdigit()}
    assert rows["0"][1:3] == ["linear", f"{(32 * 64 + 64) * 4:,}"]
    assert rows["2"][-1] == f"{100 * 64 * 5 / (64 * 5 + 32 * 64):.1f}"
    assert max(map(len, said.splitlines())) <= 110


def test_the_original_alone_is_evaluated(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", task]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("original")
    assert len(lines) == 2


def test_a_dry_run_writes_nothing(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimize", task, "--dry-run", "--runtime", "onnxruntime", "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "float32 on onnxruntime" in said
    assert "at most 20 min" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", ["", "optimize", "profile", "apply", "evaluate", "stream", "verify", "report", "doctor"]
)
def test_help_is_there_for_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert f"usage: flyweight {command}".strip() in capsys.readouterr().out


def test_a_language_model_is_streamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "model", hidden_size=32, max_position_embeddings=256)
    (tmp_path / "text.txt").write_text(prose(4000))
    given = ["stream", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--windows", "2"]
    assert main([*given, "--rounding", "nearest", "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "14 layers of 2 blocks" in said.out
    assert "model.layers.1" in said.err
    assert (tmp_path / "out" / "config.json").is_file()
    assert main([*given, "--group", "x", "-o", str(tmp_path / "other")]) == 2
    assert "a whole number, got 'x' (at --group)" in capsys.readouterr().err


@pytest.mark.heavy
def test_the_doctor_says_what_is_fast(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for part in ("cores", "torch: ready", "linear layers", "convolutions", "float32"):
        assert part in said


@given(st.floats(0, 0.99999))
def test_a_drop_is_read_as_a_share_or_in_percent(value: float) -> None:
    assert percent(f"{value:.12f}") == pytest.approx(value, abs=1e-11)
    assert percent(f" {100 * value:.12f} % ") == pytest.approx(value, abs=1e-11)


@given(st.integers(1, 10**6))
def test_a_time_has_a_unit_or_is_in_seconds(value: int) -> None:
    assert duration(f"{value}") == duration(f"{value}s") == value
    assert duration(f"{value}m") == 60 * value
    assert duration(f"{value}h") == 3600 * value


@given(st.text(max_size=8))
def test_a_drop_is_read_or_refused(text: str) -> None:
    try:
        assert 0 <= percent(text) < 1
    except UsageError as error:
        assert error.where == "--max-drop"
    try:
        assert duration(text) > 0
    except UsageError as error:
        assert error.where == "--within"


def test_a_recipe_may_be_a_plan_a_manifest_or_a_result(tmp_path: Path) -> None:
    plan = PLAN.to_json()
    for value in (plan, {"plan": plan, "task": "x"}, {"best": {"plan": plan}, "goal": Goal().to_json()}):
        (tmp_path / "recipe.json").write_text(json.dumps(value))
        assert read_plan(str(tmp_path / "recipe.json")) == PLAN


@pytest.mark.parametrize(
    "value", [{}, {"best": 3}, {"best": {"plan": []}}, {"plan": None}, None, 1, "x", [[]]]
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(value))
    with pytest.raises(UsageError) as caught:
        read_plan(str(tmp_path / "recipe.json"))
    assert "recipe.json" in caught.value.where


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments that name a tiny language model and its text."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("language")
    (folder / "text.txt").write_text(prose(8_000))
    model = written(folder / "model", max_position_embeddings=256)
    return ["--model", str(model), "--text", str(folder / "text.txt")]


FIGURES = {
    "perplexity_of_original", "perplexity", "kl_in_nats_a_token", "kl_standard_error", "agreement_of_generated_tokens",
}  # fmt: skip


@pytest.mark.usefixtures("one_thread")
def test_a_language_model_is_a_folder_and_a_text(
    language: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = ["--runtime", "torch", "--max-drop", "5%", "--minimize", "size", "--within", "1m", "-o", str(out)]
    assert main(["optimize", *language, *asked]) == 0
    said = capsys.readouterr().out
    result = Result.from_json(json.loads((out / "result.json").read_text()))
    assert result.task == "model, text.txt"
    assert set(result.further) == FIGURES
    assert 1 < result.further["perplexity"] < 1.05 * result.further["perplexity_of_original"]
    assert "best: agreement of generated tokens" in " ".join(said.split())
    assert "kl in nats a token" in (out / "report.html").read_text()


@pytest.mark.usefixtures("one_thread")
def test_an_artifact_of_a_language_model_is_compared_token_by_token(
    language: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Step("weight_only", "model.model.layers.0.mlp.up_proj", {"bits": 4, "group": 16})
    (tmp_path / "recipe.json").write_text(json.dumps(Plan((step,)).to_json()))
    recipe = ["--recipe", str(tmp_path / "recipe.json"), "--runtime", "torch", "-o", str(tmp_path / "out")]
    assert main(["apply", *language, *recipe]) == 0
    capsys.readouterr()
    assert main(["evaluate", *language, str(tmp_path / "out" / "best")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told[1:3]] == ["original", "artifact"]
    found = {line.rpartition(" ")[0].replace(" ", "_"): line.rpartition(" ")[2] for line in told}
    assert set(found) >= FIGURES
    assert 0 < float(found["kl_in_nats_a_token"]) < 0.1
    assert float(found["perplexity"]) == pytest.approx(float(found["perplexity_of_original"]), rel=0.05)


def test_a_language_model_is_profiled(language: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *language, "--runtime", "torch"]) == 0
    assert "model.model.layers.1.mlp.down_proj" in capsys.readouterr().out
