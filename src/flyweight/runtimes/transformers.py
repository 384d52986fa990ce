"""PyTorch through transformers, from a Hugging Face folder: needs the extra flyweight[huggingface].

The folder is for handing over: what reads the format compressed-tensors takes it, above all vLLM and transformers itself.
The weights are decoded to floats when the folder is read, so it is neither faster nor smaller in memory than the original;
the file is smaller. What `from_pretrained` gives decodes at its first call, and keeps a wrapper around each layer.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flyweight.errors import DataError, ModelError, foreign
from flyweight.inputs.check import run
from flyweight.records import Batch, Step
from flyweight.runtimes import ROUNDING, _hugging_face, _structure, lacking, methods
from flyweight.runtimes._export import names, tensors
from flyweight.runtimes._files import Predictor, match
from flyweight.runtimes._graph import Run
from flyweight.runtimes._shortened import shortened

FILE = True
"""Whether it runs from a file alone, without the task's model class."""
SESSION: frozenset[str] = frozenset({"opened_by", "arguments", "outputs"})
"""Session settings that an artifact may carry: the class that opens the folder, and names of its arguments and outputs."""
CODES = frozenset({"integer", "ternary", "low_float"})
"""Codes that compressed-tensors has a format for."""
ONLY_NAMED = "it runs the decoded weights as PyTorch does, for handing a folder over; name it with --runtime"
"""Why it is not among the runtimes that are tried unasked."""
_SAME = 1e-4
"""Relative distance up to which a wrapper's output counts as one of the model's in it."""


def available() -> str | None:
    """None, or why it cannot run and how to get it."""
    missing = [
        name for name in ("transformers", "compressed_tensors") if importlib.util.find_spec(name) is None
    ]
    return f"{missing[0]} not installed: pip install 'flyweight[huggingface]'" if missing else None


def refuse(steps: Collection[Step]) -> str | None:
    """Why a plan with these steps could not be held here or would not pay, or None."""
    if methods(steps) & ROUNDING:
        return "compressed-tensors rounds activations in its own way; store weights as integers only"
    return lacking("compressed-tensors", CODES, steps)


def prepare(model: nn.Module, examples: Sequence[Batch], where: Path) -> Predictor:
    """Write the model to `where` as a Hugging Face folder and read it by transformers, which must decode the same weights.

    Its output must be what a model of transformers in it gives, or some of that. Raises ModelError when it is no such
    model or when the format cannot hold it.
    """
    _, inner = _hugging_face.hosted(model)
    short, _ = shortened(inner)
    opened_by, batch = _hugging_face.opener(inner), examples[0]
    arguments = _arguments(inner, batch)
    outputs, template = _outputs(model, inner, batch, arguments)
    files = _hugging_face.write(model, where)
    session = {"opened_by": opened_by, "arguments": " ".join(arguments), "outputs": " ".join(outputs)}
    loaded = _hugging_face.read(where, opened_by)
    inputs = tuple(
        (name, str(t.dtype).removeprefix("torch."), (None,) * t.ndim)
        for name, t in zip(names(batch), tensors(batch), strict=True)
    )

    def call(batch: Batch) -> Any:
        values = match(batch, [name for name, _, _ in inputs], [shape for _, _, shape in inputs])
        return _structure.rebuild(
            template, iter(_run(loaded, dict(zip(arguments, values, strict=True)), outputs))
        )

    _hugging_face.check_same(short, loaded)
    if short is not inner:
        _check_renumbered(call(batch), template)
    return Predictor(
        runtime="transformers",
        call=call,
        files=files,
        inputs=inputs,
        outputs=_structure.describe(template),
        session=session,
    )


def open_file(folder: Path, session: Mapping[str, str]) -> Run:
    """A function from named arrays, in the order of the artifact's inputs, to the arrays of the outputs.

    Raises ModelError when transformers does not read the folder or the session names what there is not.
    """
    opened_by = session.get("opened_by", "")
    arguments, outputs = (session.get(name, "").split(" ") for name in ("arguments", "outputs"))
    if opened_by not in _hugging_face.OPENERS:
        raise ModelError(
            f"a folder is opened by {', '.join(_hugging_face.OPENERS)}", got=repr(opened_by)[:80]
        )
    loaded = _hugging_face.read(folder, opened_by)
    unknown = set(arguments) - set(inspect.signature(loaded.forward).parameters)
    if unknown:
        raise ModelError(
            "the model must take the arguments of the session", got=", ".join(sorted(unknown))[:80]
        )

    def call(given: dict[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        values = dict(zip(arguments, map(torch.from_numpy, given.values()), strict=True))
        return [_array(tensor) for tensor in _run(loaded, values, outputs)]

    return call


def _check_renumbered(found: Any, wanted: Any) -> None:
    """Raise ModelError where a layer computes otherwise under its new number."""
    if not all(map(_same, _structure.leaves(wanted), _structure.leaves(found))):
        raise ModelError(
            "layers must compute the same once they are numbered anew",
            got="another output",
            way_out="choose another runtime",
        )


def _run(loaded: nn.Module, values: Mapping[str, torch.Tensor], outputs: Sequence[str]) -> list[torch.Tensor]:
    """The outputs of that name, in order."""
    _check_tokens(loaded, values)
    with torch.inference_mode():
        found = loaded(**values, **_settings(loaded))
    if not all(isinstance(found.get(name), torch.Tensor) for name in outputs):
        raise ModelError("the model must give the outputs of the session", got=" ".join(outputs)[:80])
    return [found[name] for name in outputs]


def _check_tokens(loaded: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Raise DataError for token numbers that the model does not know: PyTorch's own words do not say which."""
    tokens, words = values.get("input_ids"), getattr(loaded.config, "vocab_size", None)
    if tokens is None or words is None or not tokens.numel():
        return
    if not (int(tokens.min()) >= 0 and int(tokens.max()) < words):
        raise DataError(f"tokens must be in [0, {words})", got=f"{int(tokens.min())} to {int(tokens.max())}")


def _settings(model: nn.Module) -> dict[str, bool]:
    """What makes a model of transformers give a record of tensors alone."""
    known = inspect.signature(model.forward).parameters
    return {"return_dict": True} | ({"use_cache": False} if "use_cache" in known else {})


def _arguments(inner: nn.Module, batch: Batch) -> tuple[str, ...]:
    """The inner model's arguments for a batch's tensors: the batch's own names, or the first of its arguments."""
    known = tuple(inspect.signature(inner.forward).parameters)
    if not isinstance(batch, dict):
        return known[: len(tensors(batch))]
    unknown = [name for name in batch if name not in known]
    if unknown:
        raise ModelError(
            "a batch's names must be arguments of the model of transformers",
            got=", ".join(unknown),
            way_out=f"{type(inner).__name__} takes {', '.join(known[:6])}",
        )
    return tuple(batch)


def _outputs(
    model: nn.Module, inner: nn.Module, batch: Batch, arguments: Sequence[str]
) -> tuple[tuple[str, ...], Any]:
    """Which outputs of the inner model a model's own output consists of, and that output; ModelError for others."""
    template = run(model, batch)
    given = dict(zip(arguments, tensors(batch), strict=True))
    with (
        torch.inference_mode(),
        foreign(ModelError, "the model of transformers must take the batch's tensors"),
    ):
        record = inner(**given, **_settings(inner))
    known = {name: value for name, value in record.items() if isinstance(value, torch.Tensor)}
    found = [
        next((name for name, value in known.items() if _same(leaf, value)), None)
        for leaf in _structure.leaves(template)
    ]
    if not found or None in found:
        raise ModelError(
            "a model's output must be what its model of transformers gives, to run from a folder alone",
            got=", ".join("x".join(map(str, leaf.shape)) for leaf in _structure.leaves(template)) or "no tensor",
            way_out=f"return {' or '.join(known)}, and compute the rest where the model is judged",
        )  # fmt: skip
    return tuple(name for name in found if name is not None), template


def _same(leaf: torch.Tensor, value: torch.Tensor) -> bool:
    if leaf.shape != value.shape or leaf.dtype != value.dtype:
        return False
    gap = (leaf.float() - value.float()).norm() / value.float().norm().clamp(min=1e-30)
    return bool(gap <= _SAME)


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """NumPy knows no bfloat16: it becomes float32."""
    known = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    found: NDArray[Any] = np.asarray(known.detach().cpu())
    return found
