"""Attacks that try to make a reader run code: each would make the canary beside the artifact."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy
import onnx
import torch
from artifact import samples
from attacks.attack import CANARY, Attack

PYTHON = f"open({CANARY!r}, 'w').close()"
SHELL = f"touch {CANARY}"
YAML = f'!!python/object/apply:os.system ["{SHELL}"]'
KERAS = {"class_name": "Lambda", "module": "os", "config": {"function": ["os.system", SHELL]}}


class _Reduced:
    """Runs a function when it is unpickled."""

    def __init__(self, function: str, argument: str) -> None:
        self.call = (function, argument)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        function, argument = self.call
        return {"exec": exec, "system": __import__("os").system}[function], (argument,)


def _pickled(function: str, argument: str, protocol: int = 2) -> bytes:
    return pickle.dumps(_Reduced(function, argument), protocol=protocol)


def _old_pickle() -> bytes:
    return f"cos\nsystem\n(S'{SHELL}'\ntR.".encode()


def _checkpoint(legacy: bool) -> bytes:
    file = io.BytesIO()
    torch.save(
        {"weight": torch.ones(2), "evil": _Reduced("exec", PYTHON)},
        file,
        _use_new_zipfile_serialization=not legacy,
    )
    return file.getvalue()


def _zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def _array() -> bytes:
    file = io.BytesIO()
    numpy.save(file, numpy.array([_Reduced("exec", PYTHON)], dtype=object), allow_pickle=True)
    return file.getvalue()


def _file(name: str, file: str, raw: bytes, says: str) -> Attack:
    """A file of the artifact replaced, with its digest forged where it has one."""

    def forge(folder: Path) -> None:
        if file == "manifest.json":
            (folder / file).write_bytes(raw)
        else:
            samples.replace_file(folder, file, raw)

    return Attack(name, forge, says)


def _added(name: str, content: str) -> Attack:
    return Attack(f"{name} in the folder", lambda at: (at / name).write_text(content), "one file too many")


def _value(name: str, says: str | None, **values: object) -> Attack:
    return Attack(name, lambda at: samples.resign(at, lambda document: document.update(values)), says)


def _named(folder: Path) -> None:
    raw = (folder / "weights.safetensors").read_bytes()
    samples.replace_weights(folder, raw.replace(b'"packed"', b'"os.sys"'))
    samples.resign(folder, lambda it: it["tensors"].update({"os.sys": it["tensors"].pop("packed")}))


def _metadata(folder: Path) -> None:
    raw = (folder / "weights.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"] = {"pickle": base64.b64encode(_old_pickle()).decode(), "format": YAML}
    text = json.dumps(header).encode()
    samples.replace_weights(folder, samples.safetensors(text, raw[8 + size :]))
    grown = len(text) - size
    samples.replace_file(folder, "model.onnx", samples.graph(8 + size + grown, 0))


def _properties(folder: Path) -> None:
    model = onnx.ModelProto.FromString((folder / "model.onnx").read_bytes())
    model.metadata_props.add(key="python", value=PYTHON)
    model.doc_string = YAML
    samples.replace_file(folder, "model.onnx", model.SerializeToString())


PLAN = {
    "flyweight_plan": 1,
    "steps": [{"method": "os.system", "site": SHELL, "options": {"__class__": PYTHON}}],
}
ATTACKS = (
    _file("a pickle as the manifest", "manifest.json", _old_pickle(), "must end with its digest"),
    _file(
        "a newer pickle as the manifest",
        "manifest.json",
        _pickled("exec", PYTHON, 5),
        "must end with its digest",
    ),
    _file("YAML as the manifest", "manifest.json", YAML.encode(), "must end with its digest"),
    Attack(
        "YAML as a signed manifest",
        lambda at: samples.resign_raw(at, f"{YAML}\n".encode()),
        "must be strict JSON",
    ),
    Attack(
        "Python as a signed manifest",
        lambda at: samples.resign_raw(at, f"{PYTHON}\n".encode()),
        "must be strict JSON",
    ),
    _file("a pickle as the weights", "weights.safetensors", _old_pickle(), "its length and its header"),
    _file(
        "a newer pickle as the weights",
        "weights.safetensors",
        _pickled("system", SHELL, 5),
        "its length and its",
    ),
    _file(
        "a torch checkpoint as the weights",
        "weights.safetensors",
        _checkpoint(False),
        "its length and its header",
    ),
    _file(
        "an old torch checkpoint as the weights",
        "weights.safetensors",
        _checkpoint(True),
        "its length and its",
    ),
    _file(
        "a checkpoint in a zip",
        "weights.safetensors",
        _zipped("a.pt", _checkpoint(False)),
        "its length and its",
    ),
    _file(
        "an archive of a Keras model",
        "weights.safetensors",
        _zipped("config.json", json.dumps(KERAS).encode()),
        "its",
    ),
    _file("an array of objects as the weights", "weights.safetensors", _array(), "its length and its header"),
    _file("a pickle as the graph", "model.onnx", _old_pickle(), "must be an ONNX model"),
    _file("a torch checkpoint as the graph", "model.onnx", _checkpoint(False), "must be an ONNX model"),
    _added("data.pkl", "cos\nsystem\n."),
    _added("evil.pth", f"import os; {PYTHON}"),
    _added("__init__.py", PYTHON),
    _added("sitecustomize.py", PYTHON),
    _value("a function as the runtime", "a runtime's name", runtime="os.system"),
    _value("a class as the runtime", "a runtime's name", runtime="builtins:exec"),
    _value("a path as the runtime", "a runtime's name", runtime="../evil"),
    _value("YAML as the task", None, task=YAML),
    _value("a template as the task", None, task="{0.__class__.__mro__} %n ${jndi:ldap://x} {{7*7}}"),
    _value("a Keras layer as the outputs", None, outputs=KERAS),
    _value("functions as the plan", None, plan=PLAN),
    _value("a library as a session option", None, session={"custom_ops_library": "../evil.so"}),
    _value(
        "a function as an input's dtype", "a dtype", inputs=[{"name": "x", "dtype": "load", "shape": [1]}]
    ),
    Attack("a module as a tensor's name", _named, None),
    Attack("a pickle as metadata of the weights", _metadata, None),
    Attack("Python as metadata of the graph", _properties, None),
)
