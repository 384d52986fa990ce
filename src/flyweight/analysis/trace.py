"""Traces a model with torch.export and reads from its graph which batch norms directly follow which convolutions."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn

from flyweight.errors import FlyweightError, ModelError, foreign
from flyweight.inputs.check import arguments
from flyweight.records import Batch

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")


@dataclass(frozen=True)
class Trace:
    """What the traced graph tells; `reason` says why there is no graph."""

    norms: dict[str, str]
    """Path of a convolution -> path of the batch norm that alone consumes its output."""
    reason: str = ""


def trace(model: nn.Module, batch: Batch) -> Trace:
    """Trace a model in eval mode on one batch; a model that cannot be traced gives an empty Trace with the reason."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return Trace({})
    args, kwargs = arguments(batch)
    try:
        with foreign(ModelError, "traceable"), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, args, kwargs, strict=False)
    except FlyweightError as error:
        return Trace({}, f"the model cannot be traced: {error.got or error}")
    return Trace(_norms(program))


def _norms(program: torch.export.ExportedProgram) -> dict[str, str]:
    parameters = program.graph_signature.inputs_to_parameters
    found: dict[str, str] = {}
    uses: dict[str, int] = {}
    for node in program.graph.nodes:
        owner = _owner(node, parameters)
        if owner:
            uses[owner] = uses.get(owner, 0) + 1
        if _named(node, _CONVOLUTIONS) and owner and len(node.users) == 1:
            user = next(iter(node.users))
            norm = _owner(user, parameters)
            if _named(user, ("batch_norm",)) and norm and user.args[0] is node and user.args[3] is not None:
                found[owner] = norm
    return {conv: norm for conv, norm in found.items() if uses[conv] == uses[norm] == 1}


def _named(node: torch.fx.Node, names: tuple[str, ...]) -> bool:
    return node.op == "call_function" and any(name in str(node.target) for name in names)


def _owner(node: torch.fx.Node, parameters: dict[str, str]) -> str:
    """The path of the module whose weight is the node's second operand; empty if there is none."""
    if node.op != "call_function" or len(node.args) < 2 or not isinstance(node.args[1], torch.fx.Node):
        return ""
    name = parameters.get(node.args[1].name, "")
    return name.removesuffix(".weight") if name.endswith(".weight") else ""
