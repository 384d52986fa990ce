"""A model of transformers as a Hugging Face folder whose quantized layers are in the format compressed-tensors, and back.

The folder is written without the model's class: weights, config, generation config and a fast tokenizer. A chat template is a
program, and is left out.
"""

from __future__ import annotations

import copy
import importlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn

from flyweight import discover
from flyweight.errors import ModelError, UsageError, another_model, foreign
from flyweight.inputs.language_model import quiet, tokenizer
from flyweight.records import JSON
from flyweight.runtimes import _compressed_tensors as form
from flyweight.runtimes._files import BESIDE, CONFIG, MODEL
from flyweight.runtimes._shortened import renamed, shortened
from flyweight.runtimes._state import unique_state
from flyweight.transforms import QuantizedLayer

OPENERS = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForImageClassification",
    "AutoModel",
)
"""What opens a folder: classes of transformers, the first that opens it as the model's own class."""
_CODE = ("auto_map", "custom_pipelines", "custom_generate", "chat_template", "transformers_weights")
_CODE_ENDINGS = ("attn_implementation", "experts_implementation", "_file")


def names_code(key: str) -> bool:
    """Whether a key of a folder's JSON may name code outside of transformers, a kernel, a template or a file."""
    return key in _CODE or key.endswith(_CODE_ENDINGS)


def hosted(model: nn.Module) -> tuple[str, nn.Module]:
    """The one model of transformers that a model is, or wraps, with its path; raises ModelError when there is none."""
    from transformers import PreTrainedModel

    found = {path: m for path, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    outer = [path for path in found if not any(_inside(path, other) for other in found if other != path)]
    if len(outer) != 1:
        raise ModelError(
            "a Hugging Face folder holds a model of transformers",
            got=type(model).__name__,
            way_out="choose another runtime",
        )
    return outer[0], found[outer[0]]


def opener(inner: nn.Module) -> str:
    """Which of OPENERS opens a folder as this model's class; raises ModelError when none does."""
    import transformers

    kind, config = type(inner), type(cast(Any, inner).config)
    for name in OPENERS:
        found = getattr(transformers, name)._model_mapping.get(config, None)
        if kind is found or (isinstance(found, tuple) and kind in found):
            return name
    raise ModelError(
        "a folder must be opened by one of transformers' automatic classes",
        got=kind.__name__,
        way_out="choose another runtime",
    )


def write(model: nn.Module, where: Path) -> tuple[Path, ...]:
    """Write the model of transformers that a model is, or wraps, to the folder `where`; the files, weights first.

    The tokenizer is the model's attribute `tokenizer`, or that of the folder which it was read from, if there is one. Raises
    ModelError, with the layer, for what the format cannot hold.
    """
    inner, _ = shortened(hosted(model)[1])
    layers = quantized(inner)
    schemes = _schemes(layers)
    documents = {CONFIG: _config(inner, schemes), **_generation(inner), **_tokenizer(model, inner)}
    weights = dict(_floats(inner, layers))
    for path, layer in layers.items():
        integers, grid = layer.encoded()
        weights |= form.packed(path, integers, grid, layer.shape, layer.dtype, schemes[path].form)
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, where / MODEL, {"format": "pt"})
    for name, content in documents.items():
        (where / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return (where / MODEL, *(where / name for name in documents))


def read(folder: Path, opened_by: str) -> nn.Module:
    """The folder's model, in eval mode, as transformers reads it, its weights decoded; opened_by: one of OPENERS.

    Nothing is fetched and no code in the folder is run. Raises ModelError when transformers does not read it whole.
    """
    import transformers

    with quiet(), foreign(ModelError, "transformers must be able to read the folder"):
        model, said = getattr(transformers, opened_by).from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    wrong = [f"{key} {name.removesuffix('_keys')}" for name, keys in said.items() for key in keys if keys]
    if wrong:
        raise ModelError("transformers must find every weight of the folder", got=", ".join(wrong[:3]))
    with quiet():
        _decode(model)
    found: nn.Module = model.eval()
    return found


def _decode(model: Any) -> None:
    """What a first call would do, and more: layers are then those of PyTorch again, without a wrapper at every call."""
    hook = getattr(model, "ct_decompress_hook", None)
    if hook is None:
        return
    package = importlib.import_module("compressed_tensors.compressors.base")  # it comes without types
    for module in list(model.modules()):
        package.decompress_module(module, leave_decompressed=False)
    hook.remove()
    del model.ct_decompress_hook


def quantized(model: nn.Module) -> dict[str, QuantizedLayer]:
    """A model's quantized layers, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def check_same(inner: nn.Module, loaded: nn.Module) -> None:
    """Raise ModelError when a weight that was loaded and decoded is not the layer's own.

    In float32 they must be equal to the bit; else the reader has rounded scales to the model's dtype.
    """
    for path, layer in quantized(inner).items():
        wanted, found = layer.weight.as_subclass(torch.Tensor), loaded.get_parameter(f"{path}.weight")
        room = 0.0 if wanted.dtype == torch.float32 else 2 * torch.finfo(wanted.dtype).eps
        if not torch.allclose(found.to(wanted.dtype), wanted, rtol=room, atol=0):
            gap = float((found.to(wanted.dtype) - wanted).abs().max())
            raise ModelError(
                "transformers must decode a layer's weight exactly", got=f"{gap:.3g} off", where=path
            )


def state(model: nn.Module, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of a model that a plan was applied to, by its own names, from a folder's tensors.

    Raises ArtifactError when the tensors belong to another model.
    """
    try:
        place, whole = hosted(model)
        inner, names = shortened(whole)
        layers = quantized(inner)
        kept = _schemes(layers)
    except ModelError as error:
        raise another_model(str(error)) from None
    taken = {key for path in kept for key in _keys(path)}
    found = {_inner_name(key, layers): tensor for key, tensor in stored.items() if key not in taken}
    for path, layer in layers.items():
        found |= {f"{path}.{name}": tensor for name, tensor in _encoded(path, layer, stored).items()}
    return {f"{place}.{key}" if place else key: tensor for key, tensor in renamed(found, names).items()}


def _schemes(layers: Mapping[str, QuantizedLayer]) -> dict[str, form.Scheme]:
    for path, layer in layers.items():
        if layer.activations != "float":
            raise ModelError(
                "compressed-tensors rounds activations in its own way",
                got=layer.activations,
                where=path,
                way_out="store weights as integers only",
            )
        if not isinstance(layer.inner, nn.Linear | nn.Embedding):
            raise ModelError(
                "compressed-tensors knows linear layers and embeddings of PyTorch",
                got=type(layer.inner).__name__,
                where=path,
                way_out="leave the layer as it is, or choose another runtime",
            )
    looked_up = frozenset(path for path, layer in layers.items() if isinstance(layer.inner, nn.Embedding))
    return form.schemes({path: (layer.options, layer.columns) for path, layer in layers.items()}, looked_up)


def _floats(inner: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[tuple[str, torch.Tensor]]:
    """What is stored as it is, by the names that the model had before layers were quantized."""
    own = {f"{path}.{name}" for path, layer in layers.items() for name in layer.names}
    for key, tensor in unique_state(inner).items():
        if key not in own:
            yield _outer_name(key, layers), tensor


def _config(inner: nn.Module, schemes: Mapping[str, form.Scheme]) -> dict[str, JSON]:
    """config.json: the model's own, and how its layers are quantized."""
    host: Any = inner
    config = copy.deepcopy(host.config)
    config.architectures, config.dtype = [type(inner).__name__], host.dtype
    if any(len(layer.sharing) > 1 for layer in quantized(inner).values()):
        config.tie_word_embeddings = False  # transformers ties weights before it decodes them
    said: dict[str, JSON] = _without_code(json.loads(config.to_json_string()))
    if getattr(getattr(inner, "generation_config", None), "use_cache", False):
        said["use_cache"] = True  # switched off in a task, where every token is wanted once
    if schemes:
        plain = [
            path for path, m in inner.named_modules() if isinstance(m, nn.Linear) and path not in schemes
        ]
        said["quantization_config"] = form.described(schemes, [p for p in plain if not p.endswith(".inner")])
    return said


def _generation(inner: nn.Module) -> dict[str, dict[str, JSON]]:
    config = getattr(inner, "generation_config", None)
    if config is None:
        return {}
    return {"generation_config.json": _without_code(json.loads(config.to_json_string()))}


def _tokenizer(model: nn.Module, inner: nn.Module) -> dict[str, dict[str, JSON]]:
    """The files of the model's tokenizer; none if nothing tells it."""
    given = getattr(model, "tokenizer", None) or _origin(inner)
    if given is None:
        return {}
    with tempfile.TemporaryDirectory(prefix="flyweight-") as place:
        given.save_pretrained(place)
        files = {name: Path(place) / name for name in BESIDE if (Path(place) / name).is_file()}
        found: dict[str, dict[str, JSON]] = {
            name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()
        }
    if "tokenizer.json" not in found:
        raise ModelError("a tokenizer must be a fast one to be stored", got=type(given).__name__)
    return {
        name: content if name == "tokenizer.json" else _without_code(content)
        for name, content in found.items()
    }


def _origin(inner: nn.Module) -> Any:
    """The tokenizer of the folder that a model was read from, or None."""
    folder = Path(str(getattr(inner, "name_or_path", "")) or "\0")
    if "\0" in str(folder) or not (folder / "tokenizer_config.json").is_file():
        return None
    return tokenizer(folder)


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_code(item) for key, item in value.items() if not names_code(key)}
    return [_without_code(item) for item in value] if isinstance(value, list) else value


def _encoded(path: str, layer: QuantizedLayer, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    integers, grid = form.unpacked(path, stored, layer.encoded()[1], layer.columns)
    code = discover.method("codes", layer.code)
    try:
        found: dict[str, torch.Tensor] = code.store(integers, grid, layer.options)
    except UsageError as error:
        raise another_model(str(error)) from None
    return found


def _keys(path: str) -> list[str]:
    return [f"{path}.{name}" for name in form.NAMES]


def _outer_name(key: str, layers: Mapping[str, QuantizedLayer]) -> str:
    """The name in a file of a layer's other tensors, its bias: without the step into the layer that QuantizedLayer wraps."""
    owner, _, name = key.rpartition(".")
    path = owner.removesuffix(".inner")
    return f"{path}.{name}" if path != owner and path in layers else key


def _inner_name(key: str, layers: Mapping[str, QuantizedLayer]) -> str:
    owner, _, name = key.rpartition(".")
    return f"{owner}.inner.{name}" if owner in layers else key


def _inside(path: str, other: str) -> bool:
    return not other or path.startswith(f"{other}.")
