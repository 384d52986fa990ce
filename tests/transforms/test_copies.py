"""Copies and views of models with other modules at some paths."""

from __future__ import annotations

import torch
from torch import nn

from flyweight.transforms import Context, plain_site, weight_only
from flyweight.transforms._copies import substitute, view


def net() -> nn.Sequential:
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    return nn.Sequential(shared, nn.BatchNorm1d(4), shared, nn.Linear(4, 4)).eval()


def test_a_copy_shares_nothing_and_a_view_shares_all_tensors() -> None:
    model = net()
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    copied, seen = (
        {id(tensor) for tensor in (*one.parameters(), *one.buffers())}
        for one in (substitute(model, {}), view(model, {}))
    )
    assert not own & copied
    assert seen == own
    assert view(model, {})[0] is not model[0]


def test_a_module_is_replaced_wherever_it_is_and_the_model_stays() -> None:
    model, new = net(), nn.Identity()
    for make in (substitute, view):
        found = make(model, {"0": new})
        assert found[0] is new
        assert found[2] is new
        assert isinstance(model[0], nn.Linear)
    assert view(model, {"": new}) is new


def test_a_view_can_change_its_mode_and_hooks_alone() -> None:
    model = net()
    seen = view(model, {}).train()
    seen[3].register_forward_hook(lambda *given: None)
    assert not model.training
    assert not model[3]._forward_hooks


def test_a_bias_that_another_module_holds_stays_tied_when_its_layer_is_quantized() -> None:
    model = nn.ModuleDict({"head": nn.Module(), "a": nn.Linear(8, 4), "b": nn.Linear(8, 4)})
    model["head"].bias = model["a"].bias
    model["head"].other = model["b"].bias
    layer = weight_only.replace(model, plain_site(model, "a"), weight_only.Options(), Context())["a"]
    changed = nn.Linear(8, 4)
    found = substitute(model, {"a": layer, "b": changed})
    assert found["a"].inner.bias is found["head"].bias
    assert found["a"].inner.bias is not model["a"].bias
    assert torch.equal(found["a"].bias, model["a"].bias)
    assert found["b"].bias is changed.bias  # another value: its own
    assert found["b"].bias is not found["head"].other
