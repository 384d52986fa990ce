"""llama.cpp on the processor, for language models: needs the extra flyweight[llamacpp].

It runs one file, model.gguf, which any llama.cpp takes. Logits are those of every token, from a 32-bit cache. If the model
has an attribute `tokenizer`, the file holds its vocabulary; otherwise it takes token numbers only. llama.cpp comes ready
made in the wheel xllamacpp, whose library `_llama` calls.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flyweight.analysis.machine import cores
from flyweight.errors import DataError, ModelError, first_line
from flyweight.inputs.check import run
from flyweight.records import JSON, Batch, Step
from flyweight.runtimes import ROUNDING, _llama, _structure, lacking, methods
from flyweight.runtimes._export import names, tensors
from flyweight.runtimes._files import GGUF, Predictor, is_compressed, match
from flyweight.runtimes._gguf_model import causal, causals, save
from flyweight.runtimes._graph import Run
from flyweight.runtimes._shortened import shortened

FILE = True
"""Whether it runs from a file alone, without the task's model class."""
SESSION: frozenset[str] = frozenset()
"""Session settings that an artifact may carry."""
CODES = frozenset({"integer", "iq4_nl", "super_block", "ternary"})
"""Codes that a GGUF can hold."""
_WIDENED = frozenset({2, 3, 6})
"""Bits of evenly spaced integers that lie in 4 or 8 bits of a GGUF."""
_TYPES: Mapping[int, Sequence[Mapping[str, JSON]]] = MappingProxyType(
    {
        8: ({"bits": 8, "group": 32, "scale": "float16"},),
        6: ({"code": "super_block", "bits": 6},),
        5: (
            {"bits": 5, "group": 32, "full": True, "scale": "float16"},
            {"code": "super_block", "bits": 5},
        ),
        4: (
            {"code": "iq4_nl"},
            {"code": "super_block", "bits": 4, "uneven": True},
            {"code": "super_block", "bits": 4},
        ),
        3: ({"code": "super_block", "bits": 3},),
        2: ({"code": "super_block", "bits": 2},),
    }
)
ROUNDS = True
"""Whether it rounds the inputs of layers with stored integers by itself: to 8 bits, in blocks of 32."""
_SHORTEST = 512
"""Tokens that the cache holds at first; it grows with the texts."""
_SAME = 1e-4
"""Relative distance up to which a wrapper's output counts as the logits of the model in it."""


def available() -> str | None:
    """None, or why it cannot run and how to get it."""
    try:
        _llama.load()
    except OSError as error:
        return f"{error}: pip install 'flyweight[llamacpp]'"
    return None


def refuse(steps: Collection[Step]) -> str | None:
    """Why a plan with these steps could not be held here or would not pay, or None."""
    if methods(steps) & ROUNDING:
        return "llama.cpp rounds activations in its own way; store weights as integers only"
    wide = {_widened(step) for step in steps} - {""}
    if wide:
        return (
            f"a GGUF has no type as small as {', '.join(sorted(wide))}; take the code super_block or iq4_nl"
        )
    return lacking("a GGUF", CODES, steps)


def weights(model: nn.Module) -> Mapping[int, Sequence[Mapping[str, JSON]]]:
    """Options of `weight_only` that a GGUF has a type for, by bits, the last that fits a layer being the one to take.

    Of a model that llama.cpp does not run, none.
    """
    return _TYPES if len(causals(model)) == 1 else {}


def _widened(step: Step) -> str:
    """What a step stores that would take more bits in a GGUF; empty: nothing."""
    code, bits = step.options.get("code", "integer"), step.options.get("bits", 8)
    if step.method != "weight_only" or code not in ("integer", "ternary"):
        return ""
    return "ternary" if code == "ternary" else f"integers of {bits} bits" if bits in _WIDENED else ""


def prepare(model: nn.Module, examples: Sequence[Batch], where: Path) -> Predictor:
    """Write the model to the folder `where` as a GGUF and load it; its output must be the logits of its tokens.

    Raises ModelError when it is no such model or when a GGUF cannot hold it.
    """
    if is_compressed(model):
        raise ModelError(
            "a GGUF keeps weights as they run", got="a code that is small only when it is compressed",
            way_out="take integers of 4 bits in groups of 32 for llama.cpp, or run this on onnxruntime",
        )  # fmt: skip
    inner = causal(model)
    template = _template(model, inner, examples[0])
    save(shortened(inner)[0], where / GGUF, getattr(model, "tokenizer", None))
    given = zip(names(examples[0]), tensors(examples[0]), strict=True)
    inputs = tuple((name, str(t.dtype).removeprefix("torch."), (None, None)) for name, t in given)
    predict = open_file(where, {})

    def call(batch: Batch) -> Any:
        values = match(batch, [name for name, _, _ in inputs], [shape for _, _, shape in inputs])
        arrays = {name: v.detach().cpu().numpy() for (name, _, _), v in zip(inputs, values, strict=True)}
        return _structure.rebuild(template, map(torch.from_numpy, predict(arrays)))

    outputs = _structure.describe(template)
    return Predictor(runtime="llamacpp", call=call, files=(where / GGUF,), inputs=inputs, outputs=outputs)


def open_file(folder: Path, session: Mapping[str, str]) -> Run:
    """A function from named arrays, tokens (N, L) and perhaps a mask of ones, to the logits (N, L, V) float32.

    Raises ModelError when llama.cpp does not take the file.
    """
    opened = [Reader.open(folder / GGUF, _SHORTEST)]

    def call(inputs: dict[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        tokens, *masks = inputs.values()
        _check(tokens, masks, opened[0].words)
        if tokens.shape[1] > opened[0].length:
            opened[0] = Reader.open(folder / GGUF, tokens.shape[1])
        return [_logits(opened[0], tokens)]

    return call


@dataclass(frozen=True)
class Reader:
    """A loaded file that reads tokens one after the other and keeps in its cache what it has read."""

    model: _llama.Model
    """The file in llama.cpp."""

    @staticmethod
    def open(file: Path, length: int) -> Reader:
        """Load a GGUF with a cache for `length` tokens; ModelError when llama.cpp does not take it."""
        try:
            return Reader(_llama.Model(file, length, cores()))
        except (ValueError, OSError) as error:
            raise ModelError("llama.cpp must be able to load the file", got=first_line(error)) from error

    @property
    def length(self) -> int:
        """Tokens that the cache holds."""
        return self.model.length

    @property
    def words(self) -> int:
        """Tokens that the model knows."""
        return self.model.words

    def forget(self) -> None:
        """Empty the cache."""
        self.model.forget()

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens after those before; the logits (V,) that follow the last.

        Raises DataError for no token, one that the model does not know, or more than the cache holds.
        """
        return self._read(tokens, every=False).reshape(-1)

    def read_all(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens (L,) after those before; the logits (L, V) that follow each. It raises what `read` does."""
        return self._read(tokens, every=True)

    def _read(self, tokens: Sequence[int], *, every: bool) -> NDArray[np.float32]:
        try:
            return self.model.read(tokens, every)
        except ValueError as error:
            raise DataError("llama.cpp must be able to read the tokens", got=first_line(error)) from error


def _logits(reader: Reader, tokens: NDArray[Any]) -> NDArray[np.float32]:
    """Logits (N, L, V) of texts (N, L), each read by itself."""
    count, length = tokens.shape
    found = np.empty((count, length, reader.words), np.float32)
    for text, row in zip(tokens.tolist(), found, strict=True):
        if length:
            reader.forget()
            row[:] = reader.read_all(text)
    return found


def _check(tokens: NDArray[Any], masks: Sequence[NDArray[Any]], words: int) -> None:
    """Raise DataError when a batch is not what llama.cpp can be given; it checks nothing itself."""
    if len(masks) > 1 or not all((mask == 1).all() for mask in masks):
        way_out = "give texts of one length in a batch"
        raise DataError("llama.cpp takes tokens without padding", got="a mask with zeros", way_out=way_out)
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < words):
        raise DataError(f"tokens must be in [0, {words})", got=f"{tokens.min()} to {tokens.max()}")


def _template(model: nn.Module, inner: nn.Module, batch: Batch) -> Any:
    """The model's own output on a batch; raises ModelError when it is not the logits of its tokens."""
    _check_inputs(batch)
    output = run(model, batch)
    wanted = run(inner, batch).logits if model is not inner else None
    leaves = _structure.leaves(output)
    fits = len(leaves) == 1 and leaves[0].ndim == 3 and leaves[0].shape[:2] == tensors(batch)[0].shape
    if fits and wanted is not None:
        fits = leaves[0].shape == wanted.shape and _distance(leaves[0], wanted) <= _SAME
    if not fits:
        raise ModelError(
            "a model's output must be its logits, one row a token, to run on llama.cpp",
            got=", ".join("x".join(map(str, leaf.shape)) for leaf in leaves) or "no tensor",
            way_out="return output.logits, and set use_cache to False in its config",
        )
    return output


def _check_inputs(batch: Batch) -> None:
    known = ({"input_ids"}, {"input_ids", "attention_mask"})
    first, *others = tensors(batch)
    named = set(names(batch)) in known and names(batch)[0] == "input_ids" if isinstance(batch, dict) else True
    if first.ndim != 2 or first.is_floating_point() or len(others) > 1 or not named:
        raise ModelError(
            "for llama.cpp a batch is tokens, texts by length, and perhaps an attention_mask",
            got=", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(names(batch), tensors(batch), strict=True)),
        )


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
