"""A language model from a Hugging Face folder, with a text, as a task: needs the extra flyweight[huggingface].

Nothing is downloaded, no code in the folder is run, and weights are read from safetensors only. The first 60 % of the
text calibrate, the last 38 % judge.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from flyweight.errors import DataError, MachineError, ModelError, UsageError, first_line, foreign
from flyweight.inputs._text import parts, read_text, require, windows
from flyweight.records import Predict, Task

CALIBRATING, JUDGING = 32, 48
"""Windows that calibrate and that judge; a short text gives fewer."""
LEAST_CALIBRATING, LEAST_JUDGING = 2, 8
"""Windows without which there is no task."""
SMALLEST_WINDOW = 8
_BATCH = 4
_LEAK = 1e-4
"""Change of a logit, as a share of the largest, from which it counts as one: rounding errors are a hundredth of that."""
_PROMPTS, _PROMPT = 8, 32
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, eq=False)
class Judge:
    """Scores each window of text by the geometric mean of the probabilities that the model gives to the right tokens.

    That is exp(-mean negative log-likelihood) = 1 / perplexity of the window: higher is better, as a score must be, and a
    relative drop of 1 % says that the perplexity became 1.01 times as high.
    """

    windows: torch.Tensor
    """(windows, tokens) int64, from the last part of the text."""
    prompts: torch.Tensor
    """(prompts, tokens) int64: the beginnings of some of the windows, to go on from."""

    def __call__(self, predict: Predict) -> list[float]:
        """One value in (0, 1] for each window; predict takes (1, tokens) ids and gives (1, tokens, vocabulary) logits."""
        return [math.exp(float(likelihoods(predict, window).mean())) for window in self.windows]


class Logits(nn.Module):
    """A causal language model of transformers as a function of token ids alone, so that exporters see a clean graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (samples, tokens, vocabulary) float32 of ids (samples, tokens) int64."""
        logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False, return_dict=True).logits
        return logits


def language_task(
    folder: str | Path,
    text: str | Path,
    *,
    window: int = 256,
    calibrating: int = CALIBRATING,
    judging: int = JUDGING,
) -> Task:
    """A task from a Hugging Face folder and a UTF-8 text; its model gives logits, its score is a Judge.

    window: tokens in a window, from 8 up to what the model takes. calibrating, judging: the most windows that are taken of
    the first and of the last part of the text; the first example is one window, the others hold four each. Raises
    MachineError, ModelError, DataError or UsageError that names what is missing or wrong.
    """
    folder, text = Path(folder), Path(text)
    _check_count("window", window, SMALLEST_WINDOW)
    _check_count("calibrating", calibrating, LEAST_CALIBRATING)
    _check_count("judging", judging, LEAST_JUDGING)
    _check_installed()
    _check_folder(folder, window)
    with quiet():
        learned, judged = _windows(folder, text, window, (calibrating, judging))
        model = _model(folder)
    _check_model(model, torch.cat((learned, judged)), folder)
    prompts = judged[:: -(-len(judged) // _PROMPTS), : min(_PROMPT, window // 2)]
    return Task(
        name=f"{folder.resolve().name}, {text.name}",
        model=model,
        examples=in_batches(learned),
        score=Judge(judged, prompts),
    )


def calibrating_windows(
    folder: str | Path, text: str | Path, *, window: int = 256, calibrating: int = CALIBRATING
) -> torch.Tensor:
    """The windows that `language_task` calibrates with, (windows, tokens) int64; the model's weights are not read.

    Raises as `language_task` does.
    """
    folder, text = Path(folder), Path(text)
    _check_count("window", window, SMALLEST_WINDOW)
    _check_count("calibrating", calibrating, LEAST_CALIBRATING)
    _check_installed()
    _check_folder(folder, window)
    first, _ = parts(read_text(text))
    with quiet():
        return _part(tokenizer(folder), first, (calibrating, window), (LEAST_CALIBRATING, "first 60 %", text))


def hollow_model(folder: Path) -> Logits:
    """The folder's model with its parameters on the meta device, where they take no memory, and its buffers real.

    Raises ModelError when transformers does not know it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    make: Any = AutoModelForCausalLM.from_config
    with _reading("know the causal language model", folder, "model"), quiet(), _parameters_on_meta():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with _EmptyOnMeta():
            model = make(config, dtype=torch.float32, trust_remote_code=False)
        if any(buffer.is_meta for buffer in model.buffers()):  # one that was empty at first
            model = make(config, dtype=torch.float32, trust_remote_code=False)
    model.config.use_cache = False
    return Logits(model).eval().requires_grad_(False)


def in_batches(learned: torch.Tensor) -> list[torch.Tensor]:
    """Calibrating windows as examples: the first by itself, the others four at a time."""
    return [learned[:1], *learned[1:].split(_BATCH)]


def likelihoods(predict: Predict, window: torch.Tensor) -> torch.Tensor:
    """The log-probability of each token of a window but the first, given those before it: (tokens - 1,) float64, nats."""
    return of_right_tokens(predict(window[None])[0], window)


def of_right_tokens(logits: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """The log-probability that logits (tokens, vocabulary) give to the tokens that follow: (tokens - 1,) float64, nats."""
    return -nn.functional.cross_entropy(logits[:-1].float(), window[1:], reduction="none").double()


def _check_count(name: str, value: int, least: int) -> None:
    if type(value) is not int or value < least:
        raise UsageError(f"{name} must be an integer from {least} up", got=repr(value), where=name)


def _check_installed() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise MachineError(
            "a Hugging Face folder needs the package transformers",
            got="not installed",
            way_out="pip install 'flyweight[huggingface]'",
        )


def _check_folder(folder: Path, window: int) -> None:
    """Everything that can be told without reading the weights."""
    if not folder.is_dir():
        raise MachineError(
            "a language model is a folder on this machine",
            got="a file" if folder.exists() else "no such folder",
            where=str(folder),
            way_out="flyweight downloads nothing: give the folder that save_pretrained or a download left",
        )
    config = _config(folder)
    if config.get("quantization_config"):
        raise ModelError(
            "the weights must be floats",
            got="quantized ones",
            where=str(folder / "config.json"),
            way_out="give the folder of the original model",
        )
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelError(
            "the folder must hold the model's tokenizer",
            got=f"none of {', '.join(_TOKENIZERS[:3])}",
            where=str(folder),
            way_out="tokenizer.save_pretrained(FOLDER) puts it there",
        )
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        raise ModelError(
            "the weights must be in model.safetensors, since other formats can run code when they are read",
            got=pickles[0] if pickles else "no weights",
            where=str(folder),
            way_out="load them where you trust them, and write them with model.save_pretrained(FOLDER)",
        )
    most = config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(most, int) and window > most:
        raise UsageError(f"the model takes windows of at most {most} tokens", got=str(window), where="window")


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    rule, way_out = "the folder must hold a Hugging Face model", "give the folder that save_pretrained wrote"
    if not path.is_file():
        raise ModelError(rule, got="no config.json", where=str(folder), way_out=way_out)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(rule, got=first_line(error), where=str(path), way_out=way_out) from None
    if not isinstance(found, dict):
        raise ModelError(rule, got=type(found).__name__, where=str(path), way_out=way_out)
    return found


def _windows(
    folder: Path, text: Path, size: int, counts: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows that calibrate and that judge, each begun as the tokenizer begins a text."""
    first, last = parts(read_text(text))
    spoken = tokenizer(folder)
    learned = _part(spoken, first, (counts[0], size), (LEAST_CALIBRATING, "first 60 %", text))
    return learned, _part(spoken, last, (counts[1], size), (LEAST_JUDGING, "last 38 %", text))


def _part(spoken: Any, part: str, wanted: tuple[int, int], least: tuple[int, str, Path]) -> torch.Tensor:
    """At most (so many windows of so many tokens) of a part of a text; least: how many it must give, its name, its file."""
    count, size = wanted

    def encode(part: str) -> list[int]:
        ids: list[int] = spoken(part, add_special_tokens=False)["input_ids"]
        return ids

    marks = torch.tensor(_front(spoken), dtype=torch.int64)
    found = windows(part, encode, count, size - len(marks))
    require(found, least[0], part, encode, *least[1:])
    return torch.cat((marks.expand(len(found), -1), found), dim=1)


def _front(spoken: Any) -> list[int]:
    """The marks that the tokenizer puts in front of a text; some models need their beginning mark to work at all."""
    bare = spoken("a", add_special_tokens=False)["input_ids"]
    full: list[int] = spoken("a")["input_ids"]
    starts = [place for place in range(len(full)) if full[place : place + len(bare)] == bare]
    return full[: starts[0]] if starts else []


def tokenizer(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder; raises ModelError when transformers cannot read it."""
    from transformers import AutoTokenizer

    with _reading("be able to read the tokenizer", folder, "tokenizer"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _model(folder: Path) -> Logits:
    from transformers import AutoModelForCausalLM

    read: Any = (
        AutoModelForCausalLM.from_pretrained
    )  # its annotations leave out what it says beside the model
    with _reading("be able to read a causal language model", folder, "model"):
        model, said = read(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    missing = sorted(said["missing_keys"])
    if missing:
        raise ModelError(
            "the weights must be complete",
            got=f"{len(missing)} missing, such as {missing[0]}",
            where=str(folder),
            way_out="give the folder of a causal language model, not of another kind or of an adapter",
        )
    model.config.use_cache = False
    return Logits(model).eval()


def _check_model(model: Logits, found: torch.Tensor, folder: Path) -> None:
    """The tokenizer must be the model's own, and the model must not see the tokens that it predicts."""
    rows = model.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if int(found.max()) >= rows:
        raise DataError(
            f"the tokenizer must be the model's own, with tokens below {rows:,}",
            got=f"{int(found.max()):,}",
            where=str(folder),
            way_out="put the tokenizer that the model was trained with into its folder",
        )
    pair = found[:1, :SMALLEST_WINDOW].repeat(2, 1)
    pair[1, -1] = (pair[1, -1] + 1) % rows
    alone = "a language model must give logits of token ids alone"
    with torch.no_grad(), foreign(ModelError, alone, where=str(folder)):
        first, second = model(pair)[:, :-1]
    leak = _LEAK * float(first.nan_to_num().abs().max())
    if not torch.allclose(first, second, rtol=0, atol=leak, equal_nan=True):
        raise ModelError(
            "a language model must not see the tokens that it predicts",
            got="logits that change with later tokens",
            where=str(folder),
            way_out="an encoder is optimized by a task file: give PATH.py",
        )


def _reading(rule: str, folder: Path, what: str) -> contextlib.AbstractContextManager[None]:
    """Where transformers reads a folder that may be foreign, which it answers with errors of many kinds."""
    way_out = f"write it with {what}.save_pretrained(FOLDER); code in the folder is not run"
    return foreign(ModelError, f"transformers must {rule}", where=str(folder), way_out=way_out)


class _EmptyOnMeta(TorchFunctionMode):
    """Weights that are only made room for take none, not even for a moment, which would leave holes in the address space."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {**(kwargs or {}), "device": "meta"} if func is torch.empty else kwargs or {}
        return func(*args, **given)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let every parameter of a module go to the meta device as soon as it is there."""

    def leave(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # a tied one is there already, and stays one
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)

    register: Any = (
        register_module_parameter_registration_hook  # its annotations leave out what a hook may give
    )
    hook = register(leave)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the bars and remarks of transformers off the terminal; what matters of them is checked."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
