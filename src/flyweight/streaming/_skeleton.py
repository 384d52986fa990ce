"""A causal language model without its weights, which are read when an operation or a block asks for them.

Parameters lie on PyTorch's meta device, which takes no memory; buffers are real. A pass of such a model reads each weight
when an operation uses it, and drops it behind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flyweight.analysis import blocks
from flyweight.analysis.blocks import Chain, Stream
from flyweight.analysis.calls import Functions
from flyweight.errors import DataError, ModelError
from flyweight.inputs.language_model import Logits, hollow_model
from flyweight.streaming import _shards
from flyweight.streaming._shards import Source

_SHORT = 8
"""Tokens of the example that finds the chain of blocks."""
_WAY_OUT = "write it with model.save_pretrained(FOLDER); code in the folder is not run"


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model on the meta device, and where its tensors are."""

    model: Logits
    source: Source
    keys: Mapping[str, str]
    """Name of each parameter or stored buffer in the model -> its name in the files."""

    def filled(self, path: str) -> nn.Module:
        """A copy of a module with its weights in float32, in eval mode; raises as `_shards.read` does."""
        module = copy.deepcopy(self.model.get_submodule(path)).eval()
        found = {
            name: self._read(f"{path}.{name}")
            for name in module.state_dict()
            if f"{path}.{name}" in self.keys
        }
        module.load_state_dict(found, strict=False, assign=True)
        return module.requires_grad_(False)

    def key(self, path: str) -> str:
        """The path that a module has in the files, by that of one of its parameters in the model."""
        return self.keys[f"{path}.weight"].removesuffix(".weight")

    def _read(self, name: str) -> torch.Tensor:
        tensor = _shards.read(self.source, self.keys[name])
        return tensor.float() if tensor.is_floating_point() else tensor


def skeleton(folder: Path, source: Source) -> Skeleton:
    """The model of a folder, without weights.

    Raises ModelError when transformers does not know it, or the files hold other tensors than the model.
    """
    model = hollow_model(folder)
    return Skeleton(model, source, _keys(model, source))


def chain(frame: Skeleton, windows: torch.Tensor) -> Chain:
    """The blocks that can be run one by one, found in a pass that reads each weight as it is used.

    windows: (windows, tokens) int64. Raises ModelError where there is no such chain.
    """
    with _FromFiles(frame), torch.no_grad():
        found = blocks.blocks(frame.model, windows[:1, :_SHORT])
    if found is None:
        raise ModelError(
            "a model that is larger than memory must be a chain of blocks, each on what the one before gave",
            got=type(frame.model.model).__name__,
            way_out="use flyweight optimize, which holds the whole model",
        )
    _require_apart(frame, found)
    return found


def entries(frame: Skeleton, found: Chain, examples: Sequence[torch.Tensor]) -> Stream:
    """What the blocks are called with in each example; no block is run.

    Raises ModelError where a block hands on more than a hidden state.
    """
    handed = _handed_on(frame, found, examples[0][:1, :_SHORT])
    hollow = copy.deepcopy(frame.model)
    keys = {
        id(hollow.get_parameter(name)): key for name, key in frame.keys.items() if name in _parameters(hollow)
    }
    for path in found.paths:
        hollow.get_submodule(path).forward = handed
    with _FromFiles(frame, keys), torch.no_grad():
        streamed = blocks.stream(hollow, found, examples)
    if streamed is None:
        raise ModelError("all windows must take one way through the model", got="several")
    return streamed


def _handed_on(frame: Skeleton, found: Chain, example: torch.Tensor) -> Callable[..., Any]:
    """A function that gives its hidden state back in the form in which the first block gives its own."""
    seen: list[Any] = []
    first = frame.model.get_submodule(found.paths[0])
    hook = first.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        with _FromFiles(frame), torch.no_grad():
            blocks.entering(frame.model, Chain(found.paths[1:]), [example])
    finally:
        hook.remove()
    output = seen[0]
    if isinstance(output, torch.Tensor):
        return lambda *args, **kwargs: _state(args, kwargs)
    if any(isinstance(one, torch.Tensor) for one in output[1:]):
        raise ModelError(
            "a block must hand on a hidden state alone", got="more tensors", where=found.paths[0]
        )
    return lambda *args, **kwargs: (_state(args, kwargs), *output[1:])


def _require_apart(frame: Skeleton, found: Chain) -> None:
    """Raise ModelError where a block shares a weight with what is not in it: it would be changed before its time."""
    homes: dict[str, str] = {}
    for name, key in frame.keys.items():
        home = next((path for path in found.paths if name.startswith(f"{path}.")), "")
        if homes.setdefault(key, home) != home:
            raise ModelError("a block must not share its weights", got="one that is tied", where=key)


def _state(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs["hidden_states"]


class _FromFiles(Functions):
    """Gives every operation that meets a parameter on the meta device its values in the files; embeddings get rows alone."""

    def __init__(self, frame: Skeleton, keys: Mapping[int, str] | None = None) -> None:
        """keys: id(parameter) -> its name in the files; without them those of the frame's own model."""
        super().__init__()
        own = _parameters(frame.model)
        self._source = frame.source
        self._keys = keys or {id(own[name]): key for name, key in frame.keys.items() if name in own}

    def instead(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function on real values."""
        if func is F.embedding:
            ids, weight, *further = (
                *args,
                *(kwargs.pop(name) for name in ("input", "weight") if name in kwargs),
            )
            return self._embedding(ids, weight, *further, **kwargs)
        if getattr(func, "__name__", "") == "__get__":  # a shape or a type needs no values
            found = func(*args, **kwargs)
            if not isinstance(found, torch.Tensor | torch.device):
                return found
        return func(
            *[self._real(one) for one in args], **{name: self._real(one) for name, one in kwargs.items()}
        )

    def _embedding(self, ids: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        key = self._keys.get(id(weight))
        if key is None:
            return F.embedding(ids, weight, *args, **kwargs)
        tokens, places = ids.unique(return_inverse=True)
        table = self._rows(key, tokens)
        further = {name: value for name, value in kwargs.items() if name != "padding_idx"}  # is for training
        return F.embedding(places, table, None, *args[1:], **further)

    def _rows(self, key: str, tokens: torch.Tensor) -> torch.Tensor:
        extent = self._source.tensors[key]
        if tokens.numel() and int(tokens.max()) >= extent.shape[0]:
            raise DataError(
                f"tokens and positions must be below {extent.shape[0]:,}",
                got=f"{int(tokens.max()):,}",
                where=extent.place,
                way_out="put the tokenizer that the model was trained with into its folder, or take smaller windows",
            )
        table = _shards.rows(self._source, key, tokens.tolist())
        return table.float() if table.is_floating_point() else table

    def _real(self, value: Any) -> Any:
        if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
            return type(value)([self._real(one) for one in value])
        key = self._keys.get(id(value))
        if key is None:
            return value
        found = _shards.read(self._source, key)
        return found.float() if found.is_floating_point() else found


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by name, tied ones by each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def _keys(model: Logits, source: Source) -> dict[str, str]:
    """Where the model's tensors are in the files; raises ModelError that says which are missing or have another shape."""
    prefix = f"{getattr(model.model, 'base_model_prefix', '')}."
    state, parameters = model.state_dict(), _parameters(model)
    found: dict[str, str] = {}
    for name in state:
        bare = name.removeprefix("model.")
        key = next((one for one in (bare, bare.removeprefix(prefix)) if one in source.tensors), None)
        if key is not None:
            found[name] = key
    held = {id(parameters[name]): key for name, key in found.items() if name in parameters}
    for name, parameter in parameters.items():  # a tied one lies in the files once
        if name not in found and id(parameter) in held:
            found[name] = held[id(parameter)]
    missing = sorted(name.removeprefix("model.") for name in parameters if name not in found)
    if missing:
        raise ModelError(
            "the weights must be complete, under the names that the model has in transformers",
            got=f"{len(missing)} missing, such as {missing[0]}",
            where=str(source.folder),
            way_out=_WAY_OUT,
        )
    for name, key in found.items():
        _require_shape(source, key, tuple(state[name].shape))
    return found


def _require_shape(source: Source, key: str, shape: tuple[int, ...]) -> None:
    extent = source.tensors[key]
    if extent.shape != shape:
        way_out = "give the folder's own config.json"
        raise ModelError(
            f"the configuration wants the shape {shape}",
            got=str(extent.shape),
            where=extent.place,
            way_out=way_out,
        )
    if extent.dtype not in ("float32", "float16", "bfloat16", "float64") and key.endswith("weight"):
        raise ModelError(
            "the weights must be floats",
            got=extent.dtype,
            where=extent.place,
            way_out="give the original model",
        )
