"""Torch-Pruning with each of its criteria, as its own examples call it: one share of every group's channels goes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flyweight.analysis.answers import floats_of
from flyweight.inputs.check import arguments, call
from flyweight.records import Batch

CRITERIA = ("l1", "l2", "bn_scale", "lamp", "taylor", "hessian", "random")
RENORMED = " + norms"
"""Behind a criterion's name: batch norms are re-estimated on the examples, which Torch-Pruning leaves to its user."""
SLOPES = ("taylor", "hessian")


def pruned(criterion: str, model: nn.Module, examples: Sequence[Batch], share: float) -> nn.Module:
    """A new model without a share of the channels, heads and neurons, chosen by one of CRITERIA, with RENORMED or not."""
    import torch_pruning as tp

    if criterion.endswith(RENORMED):
        return _renormed(pruned(criterion.removesuffix(RENORMED), model, examples, share), examples)
    torch.manual_seed(0)
    small, kinds = copy.deepcopy(model).eval(), tp.importance
    importance = {
        "l1": lambda: kinds.MagnitudeImportance(p=1),
        "l2": lambda: kinds.MagnitudeImportance(p=2),
        "bn_scale": kinds.BNScaleImportance,
        "lamp": kinds.LAMPImportance,
        "taylor": kinds.TaylorImportance,
        "hessian": kinds.HessianImportance,
        "random": kinds.RandomImportance,
    }[criterion]()
    args, kwargs = arguments(examples[0])
    linears = [m for m in small.modules() if isinstance(m, nn.Linear)]
    attentions = [m for m in small.modules() if hasattr(m, "num_attention_heads") and hasattr(m, "query")]
    heads = {
        getattr(m, name): m.num_attention_heads for m in attentions for name in ("query", "key", "value")
    }
    width = getattr(getattr(small, "config", None), "hidden_size", None)
    residual = [m for m in linears if m.out_features == width and m not in heads]
    pruner = tp.pruner.BasePruner(
        small,
        kwargs or args,
        importance=importance,
        pruning_ratio=share,
        ignored_layers=residual or linears[-1:],  # the width of an encoder's vectors stays, and so do classes
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=share,
        output_transform=lambda output: sum(one.sum() for one in floats_of(output)),
    )
    if criterion in SLOPES:
        _slopes(small, examples[:16], importance if criterion == "hessian" else None)
    pruner.step()
    for module in attentions:
        module.num_attention_heads = pruner.num_heads[module.query]
        module.attention_head_size = module.query.out_features // module.num_attention_heads
        module.all_head_size = module.query.out_features
    return small


def _renormed(model: nn.Module, examples: Sequence[Batch]) -> nn.Module:
    """The model with the statistics of its batch norms over the examples."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # all examples count alike
        norm.train()
    with torch.no_grad():
        for batch in examples[1:]:
            call(model, batch)
    return model.eval()


def _slopes(model: nn.Module, examples: Sequence[Batch], hessian: Any) -> None:
    """Gradients of the loss on the model's own answers, added up; for Hessian each example's by itself."""
    model.zero_grad()
    for batch in examples:
        output = floats_of(call(model, batch))[0]
        classes = output.argmax(-1)
        loss = F.cross_entropy(output, classes) if output.ndim == 2 else output.square().mean()
        if hessian is not None:
            model.zero_grad()
        loss.backward()
        if hessian is not None:
            hessian.accumulate_grad(model)
