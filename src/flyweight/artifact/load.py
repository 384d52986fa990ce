"""Loads an artifact: to run its file, or as a PyTorch model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flyweight import discover, transforms
from flyweight.analysis.sites import plain_site
from flyweight.artifact import format as spec
from flyweight.errors import ArtifactError, UsageError, another_model
from flyweight.records import Batch
from flyweight.runtimes import _gguf_load, _hugging_face, _structure
from flyweight.runtimes._files import GGUF, MODEL, Predictor, match
from flyweight.runtimes._layout import load_state


def load_module(folder: str | Path, model: nn.Module) -> nn.Module:
    """A new PyTorch model in eval mode: the artifact's plan applied to `model`'s structure, with the artifact's weights.

    `model` is what the task's file builds; it is not changed and its weights do not matter. Raises ArtifactError when the
    artifact is damaged or belongs to another model.
    """
    artifact = spec.read(Path(folder))
    sites, steps = [], artifact.manifest.plan.steps
    inside = transforms.inside(steps)
    made = {path for paths in inside.values() for path in paths}
    for step in steps:
        if step.method in transforms.STRUCTURE and step.site not in inside:
            continue
        try:
            sites += [plain_site(model, step.site)] if step.site not in made else []
        except AttributeError:
            raise another_model(f"a model without the layer {step.site}", str(folder)) from None
    try:
        rebuilt = transforms.apply(
            copy.deepcopy(model).eval(), artifact.manifest.plan, sites, transforms.Context(rebuilding=True)
        )
    except UsageError as error:
        raise another_model(str(error), str(folder)) from error
    stored = spec.tensors(artifact)
    names = {file.name for file in artifact.files}
    if GGUF in names:
        stored = _gguf_load.state(rebuilt, stored)
    elif MODEL in names:
        stored = _hugging_face.state(rebuilt, stored)
    load_state(rebuilt, stored, artifact.manifest.layouts)
    return rebuilt


def load_predictor(folder: str | Path) -> Predictor:
    """A predictor that runs the artifact's file, without the task's model: call it with a batch.

    The output comes as tensors in plain dicts and tuples. Raises ArtifactError when the artifact is damaged, UsageError
    when it runs in PyTorch and so needs the model's class.
    """
    artifact = spec.read(Path(folder))
    said = artifact.manifest
    if said.runtime not in discover.methods("runtimes"):
        known = ", ".join(discover.methods("runtimes"))
        raise ArtifactError(
            "an artifact's runtime must be known",
            got=repr(said.runtime),
            where=str(folder),
            way_out=f"there are {known}; others come with another version of flyweight",
        )
    runtime = discover.method("runtimes", said.runtime)
    if not runtime.FILE:
        raise UsageError(
            f"an artifact for {said.runtime} needs the model's class", way_out="flyweight.load(folder, model)"
        )
    missing = runtime.available()
    if missing:
        raise UsageError(f"the artifact runs on {said.runtime}", got=missing)
    unknown = set(said.session) - runtime.SESSION
    if unknown:
        raise ArtifactError(
            "an artifact's session settings must be known",
            got=", ".join(sorted(unknown)),
            where=str(folder),
            way_out="make the artifact again with this version of flyweight",
        )
    with spec.runnable(artifact) as place:
        # It may go then: what a runtime has not read into memory by now, it holds mapped.
        run = runtime.open_file(place, said.session)

    names, shapes = [spec.name for spec in said.inputs], [spec.shape for spec in said.inputs]

    def call(batch: Batch) -> Any:
        values = match(batch, names, shapes)
        found = run({name: v.detach().cpu().numpy() for name, v in zip(names, values, strict=True)})
        return _structure.restore(said.outputs, map(torch.from_numpy, found))

    return Predictor(
        runtime=said.runtime,
        call=call,
        files=tuple(artifact.folder / file.name for file in artifact.files),
        session=dict(said.session),
    )
