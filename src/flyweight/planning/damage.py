"""How much worse the model's output gets when one site alone is changed: measured in PyTorch, on the examples.

Damages of single sites add up to a good guess of the damage of many (Malinovskii et al., "Pushing the Limits of Large
Language Model Quantization via the Linearity Theorem", arXiv 2411.17525, 2024); what counts is measured afterwards.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from flyweight import discover, transforms
from flyweight.analysis.bare import layer_at
from flyweight.evaluation.bench import deviation
from flyweight.inputs.check import run
from flyweight.records import JSON, Batch, Site, Step
from flyweight.transforms import Context, _options, weight_only
from flyweight.transforms._quantized import is_transposed

EXAMPLES = 4
_PROBE: Mapping[str, JSON] = MappingProxyType({"bits": 4, "group": 32, "range": "minmax", "scale": "float16"})
_SAMPLE = (16, 1024)


def damages(
    model: nn.Module,
    sites: Sequence[Site],
    steps: Mapping[str, Step],
    context: Context,
    examples: Sequence[Batch],
    *,
    seconds: float,
) -> dict[str, float]:
    """Relative squared change of the output per site, with that site's step alone applied.

    model is not changed. Uses up to EXAMPLES examples, fewer when the time in seconds would not do; sites that the time
    does not reach are missing.
    """
    start = time.perf_counter()
    chosen = examples[:1]
    wanted = [run(model, batch) for batch in chosen]
    once = max(time.perf_counter() - start, 1e-6)
    affordable = int(seconds / once / max(len(steps), 1))
    for batch in examples[1 : max(1, min(EXAMPLES, affordable))]:
        chosen, wanted = [*chosen, batch], [*wanted, run(model, batch)]
    found: dict[str, float] = {}
    for site in (s for s in sites if s.name in steps):
        if time.perf_counter() - start > seconds:
            break
        changed = _changed(model, site, steps[site.name], context)
        changes = [deviation(w, run(changed, batch)) for w, batch in zip(wanted, chosen, strict=True)]
        found[site.name] = sum(changes) / len(changes)
    return found


def predicted(model: nn.Module, site: Site, step: Step, context: Context) -> float | None:
    """What a weight's change adds to the model's loss, by the matrices of the context; None where they do not tell.

    Half of the sum over output channels o of f_o (w' - w)^T H (w' - w), with H the Gram matrix of the inputs and f the
    importance of the outputs: the Kullback-Leibler divergence to second order, in nats a prediction. NaN counts as infinite.
    """
    gram, rows = context.gram(site.name), context.rows(site.name)
    if gram is None or rows is None:
        return None
    method = discover.method("transforms", step.method)
    options = _options.read(method, step.options, step.site)
    new = method.replace(model, site, options, context)[site.name]
    layer = layer_at(model, site.name)
    change = new.weight.detach().float() - layer.get_parameter("weight").detach()
    change = change.T if is_transposed(layer, site.kind) else change.flatten(1)
    parts = zip(
        change.chunk(len(gram)) if gram.ndim == 3 else [change],
        gram.reshape(-1, *gram.shape[-2:]),
        strict=True,
    )
    squares = torch.cat([((part @ matrix) * part).sum(1) for part, matrix in parts])
    loss = float((squares.double() * rows.double()).sum()) / 2
    return loss if loss == loss else math.inf


def scaled(
    model: nn.Module, site: Site, options: Sequence[Mapping[str, JSON]], context: Context
) -> list[float] | None:
    """What storing a weight by each of these options of `weight_only` adds to the loss, by one prediction for all of them.

    A site's damage is a factor of its own times the squared error relative to its weights, which for a code is about that on
    normal weights (the paper above). None where the context does not tell.
    """
    damage = predicted(model, site, Step("weight_only", site.name, _PROBE), context)
    if damage is None:
        return None
    probe, *errors = (_error(weight_only.read(given, site.name)) for given in (_PROBE, *options))
    return [damage * error / probe for error in errors]


@functools.cache
def _error(chosen: weight_only.Options) -> float:
    """Mean squared error that options leave on normal weights, rounded to nearest."""
    weight = torch.randn(_SAMPLE, generator=torch.Generator().manual_seed(0))
    grid = discover.method("codes", chosen.code).fit(weight, chosen.coding)
    return float((grid.values(grid.nearest(weight)) - weight).square().mean())


def _changed(model: nn.Module, site: Site, step: Step, context: Context) -> nn.Module:
    """The model with one step applied; what it leaves alone is the model's own."""
    method = discover.method("transforms", step.method)
    options = _options.read(method, step.options, step.site)
    new = method.replace(model, site, options, context)
    return transforms.view(model, transforms.with_tied(model, site, new))
