"""A folder and a text become a task that judges what it says; what is no such folder is refused before anything is run."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs.language_folders import byte_tokenizer, encoder, prose, written

from flyweight.errors import DataError, FlyweightError, MachineError, ModelError, UsageError
from flyweight.inputs import language_model
from flyweight.inputs.language_model import Judge, Logits, language_task, likelihoods
from flyweight.runtimes import onnxruntime, openvino
from flyweight.runtimes.torch import caller

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "prose.txt"
    path.write_text(prose(20_000))
    return path


def test_a_folder_and_a_text_become_a_task(model: Path, text: Path) -> None:
    task = language_task(model, text, window=16)
    assert task.name == "tiny, prose.txt"
    assert task.examples[0].shape == (1, 16)  # type: ignore[union-attr]
    assert [len(batch) for batch in task.examples] == [1, *[4] * 7, 3]
    assert isinstance(task.score, Judge)
    assert task.score.windows.shape == (48, 16)
    assert task.score.prompts.shape == (8, 8)
    assert all(any(torch.equal(p, w[:8]) for w in task.score.windows) for p in task.score.prompts)
    assert not any(module.training for module in task.model.modules())
    assert {p.dtype for p in task.model.parameters()} == {torch.float32}


def test_the_model_gives_the_logits_of_transformers(model: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM

    task = language_task(model, text, window=16)
    reference = AutoModelForCausalLM.from_pretrained(model).eval()
    batch = task.examples[1]
    with torch.no_grad():
        found = task.model(batch)
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, reference(input_ids=batch).logits)


def test_calibration_and_judging_come_from_different_parts(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "numbers.txt"
    numbers = " ".join(f"{number:06d}" for number in range(2000))
    path.write_text(numbers)
    task = language_task(model, path, window=32)
    assert isinstance(task.score, Judge)
    spoken = byte_tokenizer()

    def places(windows: torch.Tensor) -> list[int]:
        return [numbers.index(spoken.decode(row)) for row in windows]

    learned, judged = places(torch.cat(list(task.examples))), places(task.score.windows)  # type: ignore[arg-type]
    assert len(set(learned)) == 32
    assert len(set(judged)) == 48
    assert max(learned) + 32 <= 0.6 * len(numbers)
    assert min(judged) >= 0.62 * len(numbers) - 1


def test_a_window_scores_one_over_its_perplexity(model: Path, text: Path) -> None:
    task = language_task(model, text, window=16)
    assert isinstance(task.score, Judge)
    found = task.score(caller(task.model))
    assert len(found) == 48
    for window, value in list(zip(task.score.windows, found, strict=True))[::7]:
        with torch.no_grad():
            logits = task.model(window[None])[0].double().tolist()
        losses = []
        for place in range(15):
            total = sum(math.exp(logit) for logit in logits[place])
            losses.append(-math.log(math.exp(logits[place][int(window[place + 1])]) / total))
        assert value == pytest.approx(math.exp(-sum(losses) / 15), rel=1e-5)


def test_the_score_orders_models_by_perplexity() -> None:
    window = torch.tensor([0, 1, 2, 3])
    judge = Judge(window[None], window[None, :2])

    def predict(weight: float) -> Callable[[Any], torch.Tensor]:
        return lambda batch: weight * torch.nn.functional.one_hot((batch + 1) % 4, 4).float()

    scores = [judge(predict(weight))[0] for weight in (-1.0, 0.0, 1.0, 50.0)]
    assert scores == sorted(scores)
    assert scores[1] == pytest.approx(0.25)
    assert scores[3] == pytest.approx(1.0)
    assert likelihoods(predict(0.0), window).tolist() == pytest.approx([math.log(0.25)] * 3)


def test_marks_in_front_are_kept(tmp_path: Path, text: Path) -> None:
    folder = written(tmp_path / "marked")
    byte_tokenizer(first=True).save_pretrained(folder)
    task = language_task(folder, text, window=16)
    assert isinstance(task.score, Judge)
    for batch in (*task.examples, task.score.windows, task.score.prompts):
        assert (batch[:, 0] == 256).all()  # type: ignore[index, union-attr]
        assert (batch[:, 1:] < 256).all()  # type: ignore[index, union-attr]
    assert task.score.windows.shape == (48, 16)


def test_a_short_text_gives_fewer_windows(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(prose(500))
    task = language_task(model, path, window=16)
    assert isinstance(task.score, Judge)
    assert len(task.score.windows) == 190 // 16
    assert sum(map(len, task.examples)) == 300 // 16


def changed(tiny: Path, folder: Path, **config: Any) -> Path:
    """A copy of the folder with other entries in its config."""
    shutil.copytree(tiny, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def without(tiny: Path, folder: Path, *names: str) -> Path:
    shutil.copytree(tiny, folder)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    return folder


class Bomb:
    """Makes a file when it is read from a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def pickled(tiny: Path, folder: Path) -> Path:
    without(tiny, folder, "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "was-run")))
    return folder


def own_code(tiny: Path, folder: Path) -> Path:
    changed(tiny, folder, model_type="mine", auto_map={"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"})
    (folder / "m.py").write_text(f"import pathlib\npathlib.Path({str(folder / 'was-run')!r}).touch()\n")
    return folder


def fewer_weights(tiny: Path, folder: Path) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny, folder)
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def cut(tiny: Path, folder: Path) -> Path:
    shutil.copytree(tiny, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return folder


def not_json(tiny: Path, folder: Path) -> Path:
    shutil.copytree(tiny, folder)
    (folder / "config.json").write_text("{")
    return folder


def touched(tiny: Path, folder: Path) -> Path:
    folder.write_text("")
    return folder


Make = Callable[[Path, Path], Path]
# fmt: off
BAD: tuple[tuple[str, Make, type[FlyweightError], tuple[str, ...]], ...] = (
    ("nothing there", lambda tiny, folder: folder, MachineError, ("got no such folder", "downloads nothing")),
    ("a file", touched, MachineError, ("got a file",)),
    ("no config", lambda tiny, folder: without(tiny, folder, "config.json"), ModelError,
     ("a Hugging Face model, got no config.json", "save_pretrained")),
    ("a config that is no JSON", not_json, ModelError, ("a Hugging Face model, got JSONDecodeError", "config.json")),
    ("a pickle", pickled, ModelError, ("can run code", "got pytorch_model.bin", "save_pretrained")),
    ("no weights", lambda tiny, folder: without(tiny, folder, "model.safetensors"), ModelError, ("got no weights",)),
    ("no tokenizer", lambda tiny, folder: without(tiny, folder, "tokenizer.json", "tokenizer_config.json"), ModelError,
     ("must hold the model's tokenizer", "tokenizer.save_pretrained")),
    ("quantized weights", lambda tiny, folder: changed(tiny, folder, quantization_config={"bits": 4}), ModelError,
     ("the weights must be floats", "the original model")),
    ("code of its own", own_code, ModelError, ("transformers must be able to read", "code in the folder is not run")),
    ("an unknown type", lambda tiny, folder: changed(tiny, folder, model_type="unheard"), ModelError,
     ("transformers must be able to read",)),
    ("missing weights", fewer_weights, ModelError,
     ("must be complete, got 1 missing, such as model.layers.1.mlp.up_proj.weight",)),
    ("cut weights", cut, ModelError, ("transformers must be able to read a causal language model",)),
    ("an encoder", lambda tiny, folder: encoder(folder), ModelError, ("must not see the tokens", "a task file")),
    ("a tokenizer of another model", lambda tiny, folder: written(folder, vocab_size=64), DataError,
     ("the tokenizer must be the model's own, with tokens below 64",)),
)
# fmt: on


@pytest.mark.parametrize(("name", "make", "kind", "contains"), BAD, ids=[row[0] for row in BAD])
def test_a_bad_folder_gets_its_answer(
    model: Path,
    text: Path,
    tmp_path: Path,
    name: str,
    make: Make,
    kind: type[FlyweightError],
    contains: tuple[str, ...],
) -> None:
    folder = make(model, tmp_path / "given")
    with pytest.raises(FlyweightError) as caught:
        language_task(folder, text, window=16)
    assert type(caught.value) is kind
    for part in (*contains, "given"):
        assert part in str(caught.value)
    assert not (tmp_path / "given" / "was-run").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"window": 65}, "at most 64 tokens, got 65"),
        ({"window": 7}, "window must be an integer from 8 up, got 7"),
        ({"window": 16.0}, "window must be an integer"),
        ({"window": True}, "window must be an integer"),
        ({"window": 16, "judging": 7}, "judging must be an integer from 8 up"),
        ({"window": 16, "calibrating": 0}, "calibrating must be an integer from 2 up"),
    ],
)
def test_a_number_out_of_range_is_refused(model: Path, text: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        language_task(model, text, **given)


def test_too_short_a_text_is_told_before_the_model_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "_model", lambda folder: pytest.fail("the model was read"))
    (tmp_path / "short.txt").write_text(prose(300))
    with pytest.raises(
        DataError, match=r"last 38 % .* 8 windows of 16 tokens, 128 tokens, got 114 tokens .*short\.txt"
    ):
        language_task(model, tmp_path / "short.txt", window=16)


def test_without_transformers_the_extra_is_named(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"pip install 'flyweight\[huggingface\]'"):
        language_task(model, text, window=16)


def test_transformers_is_left_as_talkative_as_it_was(model: Path, text: Path, capfd: Any) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    language_task(model, text, window=16)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr().err == ""


@pytest.mark.heavy
@pytest.mark.parametrize("runtime", [onnxruntime, openvino], ids=["onnxruntime", "openvino"])
def test_the_wrapper_exports_and_runs_at_other_lengths(
    model: Path, text: Path, tmp_path: Path, runtime: Any
) -> None:
    if runtime.available():
        pytest.skip(runtime.available())
    task = language_task(model, text, window=16)
    assert isinstance(task.model, Logits)
    assert isinstance(task.score, Judge)
    predict = runtime.prepare(task.model, task.examples, tmp_path)
    for batch in (task.examples[0], task.examples[1], task.score.prompts[:1], torch.arange(40)[None]):
        with torch.no_grad():
            torch.testing.assert_close(predict(batch), task.model(batch), rtol=1e-4, atol=1e-4)
