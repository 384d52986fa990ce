"""How much worse the model's output gets when one site alone is changed: measured in PyTorch, on the examples.

Damages of single sites add up to a good guess of the damage of many (Malinovskii et al., "Pushing the Limits of Large
Language Model Quantization via the Linearity Theorem", arXiv 2411.17525, 2024); what counts is measured afterwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from flyweight import discover, transforms
from flyweight.evaluation.bench import deviation
from flyweight.inputs.check import run
from flyweight.records import Batch, Site, Step
from flyweight.transforms import Context, _options
from flyweight.transforms._quantized import is_transposed

EXAMPLES = 4


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

    model is not changed in the end, though its modules are swapped meanwhile: give a copy. Uses up to EXAMPLES examples,
    fewer when the time in seconds would not do; sites that the time does not reach are missing.
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
        with _changed(model, site, steps[site.name], context):
            changes = [deviation(w, run(model, batch)) for w, batch in zip(wanted, chosen, strict=True)]
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
    change = new.weight.detach().float() - model.get_submodule(site.name).get_parameter("weight").detach()
    change = change.T if is_transposed(model.get_submodule(site.name), site.kind) else change.flatten(1)
    parts = zip(
        change.chunk(len(gram)) if gram.ndim == 3 else [change],
        gram.reshape(-1, *gram.shape[-2:]),
        strict=True,
    )
    squares = torch.cat([((part @ matrix) * part).sum(1) for part, matrix in parts])
    loss = float((squares.double() * rows.double()).sum()) / 2
    return loss if loss == loss else math.inf


@contextmanager
def _changed(model: nn.Module, site: Site, step: Step, context: Context) -> Iterator[None]:
    """The model with one step applied in place, for as long as the context lasts."""
    method = discover.method("transforms", step.method)
    options = _options.read(method, step.options, step.site)
    old = {path: model.get_submodule(path) for path in site.paths}
    new = transforms.with_tied(model, site, method.replace(model, site, options, context))
    places = [
        (path, module)
        for path, module in model.named_modules(remove_duplicate=False)
        if any(module is before for before in old.values())
    ]
    try:
        for path, module in places:
            model.set_submodule(path, next(new[name] for name, before in old.items() if before is module))
        yield
    finally:
        for path, module in places:
            model.set_submodule(path, module)
