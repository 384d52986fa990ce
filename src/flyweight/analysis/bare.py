"""Parameters that are read rather than called: those of recurrent layers and of attention, and a model's own.

A site at such a parameter has the parameter's path for a name, with `.T` behind it where outputs are its columns, as in
x @ w. What is done to layers is done to a stand-in for one.
"""

from __future__ import annotations

from torch import nn

TURNED = ".T"


class Bare(nn.Linear):
    """A parameter (outputs, inputs, ...) in the place of a layer's weight."""

    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.register_parameter("weight", weight)
        self.register_parameter("bias", None)
        self.out_features, self.in_features = weight.flatten(1).shape


class BareColumns(nn.Module):
    """A parameter (inputs, outputs) in the place of a layer's weight."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.register_parameter("weight", weight)


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """The layer at a site's path, or the stand-in for one; AttributeError where the model has neither."""
    owner, _, name = path.removesuffix(TURNED).rpartition(".")
    module = model.get_submodule(owner)
    weight = module._parameters.get(name)
    if weight is not None:
        return BareColumns(weight) if path.endswith(TURNED) else Bare(weight)
    held = module._modules.get(name)
    return model.get_submodule(path) if held is None else held


def is_bare(module: nn.Module) -> bool:
    """Whether a layer only stands in for a parameter."""
    return isinstance(module, Bare | BareColumns)


def parameter_path(model: nn.Module, holder: str) -> str:
    """The path of what a holder of a weight holds: a layer its parameter `weight`; any other name is the parameter's own."""
    owner, _, name = holder.rpartition(".")
    is_own = not holder or name in model.get_submodule(owner)._modules
    return f"{holder}.weight".lstrip(".") if is_own else holder
