"""What every transform promises, one function each: it raises when the promise is broken."""

from __future__ import annotations

import copy
import dataclasses
import random
from types import ModuleType
from typing import Any

import torch
from torch import nn

from flyweight import discover, transforms
from flyweight.analysis.bare import TURNED, layer_at
from flyweight.analysis.sites import analyse, model_bytes
from flyweight.errors import DataError, UsageError, foreign
from flyweight.inputs.check import call, digest, run
from flyweight.records import Plan, Site, Step
from flyweight.runtimes import _structure
from flyweight.testing._cases import (
    Broken,
    Case,
    NotApplicable,
    built,
    distance,
    each_tensor,
    require,
    same,
    same_form,
)
from flyweight.transforms import Context, _options

GROWTH = 32
"""Bytes by which a tiny layer may grow: its scales."""
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
"""Relative change of an output that rounding alone explains."""


def input_untouched(case: Case) -> None:
    """The model, the random state and PyTorch's global settings are as they were."""
    before = _snapshot(case.model)
    changed = case.apply()
    run(changed, case.examples[0])
    for name, value in _snapshot(case.model).items():
        require(value == before[name], f"{name} changed")


def no_shared_storage(case: Case) -> None:
    """Nothing that is done to the result reaches the model."""
    own = {t.untyped_storage().data_ptr() for t in _tensors(case.model) if t.numel()}
    shared = [t for t in _tensors(case.changed) if t.numel() and t.untyped_storage().data_ptr() in own]
    require(not shared, f"{len(shared)} tensors share memory with the model's")


def output_form(case: Case) -> None:
    """The output has the original's structure, shapes and dtypes, on every example."""
    changed = case.changed
    for batch in case.examples:
        same_form(run(case.original, batch), run(changed, batch))


def finite_and_close(case: Case) -> None:
    """The output is finite, and as close to the original's as the method says."""
    changed, bound = case.changed, _bound(case)
    for batch in case.examples:
        wanted, found = run(case.original, batch), run(changed, batch)
        require(all(bool(torch.isfinite(leaf).all()) for leaf in _structure.leaves(found)), "not finite")
        gap = distance(wanted, found)
        require(gap <= bound, f"the output changed by {gap:.3g}, more than {bound:.3g}")


def deterministic(case: Case) -> None:
    """Twice the same, bit for bit."""
    require(
        digest(case.changed.state_dict()) == digest(case.apply().state_dict()),
        "another state the second time",
    )


def state_round_trip(case: Case) -> None:
    """A result that was built without having seen data takes the state of one that did, and is the same then."""
    changed = case.changed
    fresh = case.apply(built(case.entry, case.dtype), Context(rebuilding=True))
    fresh.load_state_dict(changed.state_dict(), strict=True)
    same(run(changed, case.examples[1]), run(fresh, case.examples[1]))


def copies(case: Case) -> None:
    """A deep copy, and one that went through training mode, compute the same."""
    changed = case.changed
    twin = copy.deepcopy(changed).train().eval()
    same(run(changed, case.examples[0]), run(twin, case.examples[0]))


def honest_size(case: Case) -> None:
    """The result is not larger, but for the scales of tiny layers."""
    before, after = model_bytes(case.original), model_bytes(case.changed)
    require(after <= before + GROWTH * len(case.plan.steps), f"{before} bytes became {after}")


def ties_kept(case: Case) -> None:
    """What was tied stays tied, of all that is left."""
    left = set().union(*_holders(case.changed))
    tied = {paths & left for paths in _ties(case.model)}
    if not tied:
        raise NotApplicable("nothing is tied")
    require({paths for paths in tied if len(paths) > 1} <= _ties(case.changed), "ties are gone")


def twice(case: Case) -> None:
    """A second time changes nothing, or is refused by the site's name."""
    changed = case.changed
    try:
        again = case.apply(changed)
    except UsageError as error:
        named = [step for step in case.plan.steps if step.site in str(error)]
        _named(error, (named or case.plan.steps)[0])
        return
    for batch in case.examples:
        gap = distance(run(changed, batch), run(again, batch))
        require(gap <= ROUNDING[case.dtype], f"the second time changes the output by {gap:.3g}")


def refusal_truthful(case: Case) -> None:
    """Where `refuse` gives no reason the method works; where it gives one `apply` raises it, with the site's name."""
    method = discover.method("transforms", case.method)
    settings = {repr(dict(s.options)): s for s in case.plan.steps}.values()
    for step in settings:
        options = _options.read(method, step.options, "")
        for site in case.analysis.sites:
            if step.method in transforms.EXACT and site.name != step.site:
                continue  # its options name a place that belongs to this site alone
            reason = method.refuse(site, options, layer_at(case.original, site.name))
            _judge(case, Step(step.method, site.name, step.options), reason, site)


def others_untouched(case: Case) -> None:
    """What the plan does not name is as it was, bit for bit."""
    if any(hasattr(discover.method("transforms", case.method), name) for name in ("together", "cut")):
        raise NotApplicable("its steps change the layers around their sites too")
    sites = {site.name: site for site in case.analysis.sites}
    places = {path.removesuffix(TURNED) for step in case.plan.steps for path in sites[step.site].paths}
    places |= {
        str(value) for step in case.plan.steps for name, value in step.options.items() if name == "norm"
    }
    before, after = case.original.state_dict(), case.changed.state_dict()
    for key, tensor in before.items():
        if not any(key == place or key.startswith(f"{place}." if place else "") for place in places):
            require(key in after and torch.equal(tensor, after[key]), f"{key} changed")


def empty_batch(case: Case) -> None:
    """Of no samples it makes an output of the original's form, where the original takes them."""
    nothing = each_tensor(case.examples[0], lambda tensor: tensor[:0])
    try:
        with foreign(DataError, "the original must take no samples"):
            wanted = run(case.original, nothing)
    except DataError as error:
        raise NotApplicable(str(error)) from error
    same_form(wanted, run(case.changed, nothing))


def any_order(case: Case) -> None:
    """Seen in the opposite order the examples give a model as close: sums round otherwise, and may tip a choice."""
    turned, bound = case.examples[::-1], _bound(case)
    other = dataclasses.replace(case, examples=turned, analysis=analyse(case.original, turned)).changed
    for batch in case.examples:
        gap = distance(run(case.changed, batch), run(other, batch))
        require(gap <= bound, f"another order changes the output by {gap:.3g}, more than {bound:.3g}")


def trainable(case: Case) -> None:
    """Slopes pass through it: a backward pass gives finite gradients to the floats that are left."""
    model = copy.deepcopy(case.changed).requires_grad_(True)
    with torch.enable_grad():
        leaves = [leaf for leaf in _structure.leaves(call(model, case.examples[0])) if leaf.requires_grad]
        if not leaves:
            raise NotApplicable("no floats are left that the output depends on")
        torch.stack([leaf.float().square().sum() for leaf in leaves]).sum().backward()
    slopes = [p.grad for p in model.parameters() if p.grad is not None]
    require(bool(slopes) and all(bool(torch.isfinite(s).all()) for s in slopes), "gradients are not finite")


def options_round_trip(method: ModuleType) -> None:
    """Options go to plain JSON values and back."""
    for options in _settings(method):
        require(
            _options.read(method, _options.plain(options), "") == options, f"{options} does not come back"
        )


def options_checked(method: ModuleType) -> None:
    """Unknown names, wrong types and numbers out of range are refused when options are read."""
    _refused(method, {"no_such_option": 1})
    for item in dataclasses.fields(method.Options):
        kind = str(item.type)
        _refused(method, {item.name: [1]})
        if "int" in kind:
            _refused(method, {item.name: -1})
            _refused(method, {item.name: True})
        if kind == "float":
            _refused(method, {item.name: float("nan")})


CHECKS = (
    input_untouched, no_shared_storage, output_form, finite_and_close, deterministic, state_round_trip, copies,
    honest_size, ties_kept, twice, refusal_truthful, others_untouched, empty_batch, any_order, trainable,
)  # fmt: skip
OPTION_CHECKS = (options_round_trip, options_checked)


def _bound(case: Case) -> float:
    """How far the method lets an output move, and rounding besides."""
    method = discover.method("transforms", case.method)
    closeness = getattr(method, "closeness", lambda _: 0.0)
    bounds = [closeness(_options.read(method, step.options, "")) for step in case.plan.steps]
    return float(max(bounds)) + ROUNDING[case.dtype]


def _snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "the state": digest(model.state_dict()),
        "its mode": [m.training for m in model.modules()],
        "its hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad is None for p in model.parameters()],
        "the random state": (torch.random.get_rng_state().tolist(), random.getstate()),
        "a global setting of PyTorch": (
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
            torch.backends.mha.get_fastpath_enabled(), torch.are_deterministic_algorithms_enabled(),
        ),
    }  # fmt: skip


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _ties(model: nn.Module) -> set[frozenset[str]]:
    """Paths of modules that hold one parameter or buffer."""
    return {paths for paths in _holders(model) if len(paths) > 1}


def _holders(model: nn.Module) -> set[frozenset[str]]:
    """Of each parameter and buffer the paths of the modules that hold it; a layer inside a quantized one counts as that."""
    users: dict[int, set[str]] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            users.setdefault(id(tensor), set()).add(name.rpartition(".")[0].removesuffix(".inner"))
    return set(map(frozenset, users.values()))


def _judge(case: Case, step: Step, reason: str | None, site: Site) -> None:
    try:
        transforms.apply(case.original, Plan((step,)), [site], Context(case.analysis.statistics))
    except UsageError as error:
        whole = step.method in transforms.STRUCTURE  # what else there is in a model, the method tells later
        require(reason is not None or whole, f"{site.name} was not refused, but {error}")
        _named(error, step)
        require(reason is None or str(reason) in str(error), f"the reason is missing: {error}")
        return
    require(reason is None, f"{site.name} was refused, but changed all the same")


def _named(error: UsageError, step: Step) -> None:
    require(
        step.site in str(error) and step.method in str(error), f"the site or method is not named: {error}"
    )


def _settings(method: ModuleType) -> list[Any]:
    kinds = ("linear", "conv", "embedding")
    sites = [Site(name="a", kind=kind, parameters=1, bytes=4, macs=1) for kind in kinds]  # type: ignore[arg-type]
    return [options for site in sites for options in method.levels(site)]


def _refused(method: ModuleType, options: dict[str, Any]) -> None:
    try:
        read = _options.read(method, options, "options")
    except UsageError:
        return
    raise Broken(f"{options} became {read}")
