"""What can be done to a model: one file, one method. `apply` is the verb for all of them.

A method file holds `Options`, `levels(site)`, `refuse(site, options, module)` and `replace(model, site, options, context)`,
which returns new modules by path. `learns(options)` says which matrices it asks the context for.
A method that makes one layer several names those inside it in `INSIDE`; they are sites for the stages after it.
A method of ORDER whose steps change one another's layers has `together(model, steps, context)` besides: the new modules for
all its steps, by site, and what is known of the changed model; its errors say at which site.
A method that goes on once layers are changed has `pieces(model, examples)`, the examples that it wants to see;
`settle(place, changes, options by site)`, the new modules of a block in view of what leaves it; and
`finish(original, model, options by site, context)`, new modules by path in view of the whole changed model, or none.
A method of STRUCTURE has sites of its own, and `cut(model, options by site, context)`, a new model; `complete(model,
options by site, context)` writes down what it decides by looking at examples, and may add sites; `proposals(model,
examples)` gives steps worth trying; `left(known, site, options)` says which layers are sites afterwards, if others.
`closeness(options)` says how far outputs may move; a method without it is exact.
Copying, ordering, checking and refusing are done here, once for all methods.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeAlias

from torch import nn

from flyweight import discover
from flyweight.analysis import fisher, gram
from flyweight.analysis.bare import is_bare, layer_at
from flyweight.analysis.sites import analyse, kind_of
from flyweight.analysis.sites import plain_site as plain_site
from flyweight.errors import UsageError
from flyweight.records import JSON, Plan, Site, Step
from flyweight.transforms import _options, _sequential
from flyweight.transforms._contract import Context as Context
from flyweight.transforms._copies import substitute as substitute
from flyweight.transforms._copies import view as view
from flyweight.transforms._learned import frozen as frozen
from flyweight.transforms._quantized import QuantizedLayer as QuantizedLayer
from flyweight.transforms._quantized import shell as shell

STRUCTURE = ("drop", "activation", "share", "share_rows", "prune", "heal")
"""Methods that change depth, functions, whose weights layers have, and widths, and heal that; in order, before all others."""
_Ready: TypeAlias = tuple[ModuleType, Site, Any]
EXACT = ("fold_batch_norm", "smooth")
"""Methods that keep the function and change how it is computed."""
ORDER = ("fold_batch_norm", "low_rank", "separable", "smooth")
"""Methods that change what there is, in order; all others, which change how it is stored and computed, come after them."""


def apply(model: nn.Module, plan: Plan, sites: Sequence[Site], context: Context) -> nn.Module:
    """A new model in eval mode with the plan's steps applied, structure first; the given model is never changed.

    Raises UsageError for an unknown method, site or option, two steps of one stage at one site, or a refused step.
    """
    known = _left(plan, sites)
    original = model
    last = functools.reduce(_after, _stages(plan), known)
    finishing = _finishing(plan, last) if len(context.examples) and not context.rebuilding else []
    for method, _ in finishing:
        context = dataclasses.replace(context, examples=method.pieces(model, context.examples))
    plan, model, context = _structured(model, plan, context, last=True)
    known = _left(plan, sites)
    for stage in _stages(plan) or [[]]:  # no step at all still gives a copy
        changes, context = _staged(model, stage, known, context)
        model = substitute(model, changes)
        known = _after(known, stage)
    for method, chosen in finishing:
        changes = method.finish(original, model.eval(), chosen, context)
        model = substitute(model, changes) if changes else model
    return model.eval()


def complete(model: nn.Module, plan: Plan, context: Context) -> Plan:
    """The plan with what its structural steps decide by looking at examples written into them, or added as steps."""
    return _structured(model, plan, context, last=False)[0]


def check(model: nn.Module, plan: Plan, sites: Sequence[Site]) -> None:
    """Raise UsageError, as `apply` would, for an unknown method, site or option; nothing is computed."""
    known = _left(plan, sites)
    for stage in _stages(plan):
        for index, step in stage:
            _site(step, f"steps[{index}]", known)
        known = _after(known, stage)


def inside(steps: Sequence[Step]) -> dict[str, list[str]]:
    """By site, the sites that a step makes of it, where that is several layers."""
    found = {step.site: getattr(discover.method("transforms", step.method), "INSIDE", ()) for step in steps}
    return {path: [f"{path}.{name}" for name in names] for path, names in found.items() if names}


def _after(known: Mapping[str, Site], stage: Sequence[tuple[int, Step]]) -> Mapping[str, Site]:
    """The sites behind a stage, in order: those that it made several layers of give way to these."""
    made = inside([step for _, step in stage])
    return {
        name: dataclasses.replace(site, name=name)
        for path, site in known.items() for name in made.get(path, [path])
    }  # fmt: skip


def _structural(plan: Plan) -> Mapping[str, Mapping[str, Any]]:
    """The options of the methods of STRUCTURE by their sites, the methods in order."""
    found: dict[str, dict[str, Any]] = {}
    for index, step in enumerate(plan.steps):
        if step.method in STRUCTURE:
            options = _options.read(
                discover.method("transforms", step.method), step.options, f"steps[{index}].options"
            )
            if found.setdefault(step.method, {}).setdefault(step.site, options) is not options:
                raise _double(step, index)
    return {name: found[name] for name in STRUCTURE if name in found}


def _left(plan: Plan, sites: Sequence[Site]) -> Mapping[str, Site]:
    """The layers that are sites behind the structural steps, by name."""
    known: Mapping[str, Site] = {site.name: site for site in sites}
    for name, chosen in _structural(plan).items():
        method = discover.method("transforms", name)
        for site, options in chosen.items() if hasattr(method, "left") else ():
            known = method.left(known, site, options)
    return known


def _structured(
    model: nn.Module, plan: Plan, context: Context, *, last: bool
) -> tuple[Plan, nn.Module, Context]:
    """The completed plan, the model after the steps of STRUCTURE, and what is known of it.

    last: the last of these methods is not only completed, but applied.
    """
    done: dict[tuple[str, str], Mapping[str, JSON]] = {}
    structural, context = _structural(plan), dataclasses.replace(context, original=model)
    for index, (name, chosen) in enumerate(structural.items(), 1):
        method, others = discover.method("transforms", name), index < len(structural)
        with _placed(plan, name):
            found = chosen if context.rebuilding else method.complete(model, chosen, context)
            model = method.cut(model, found, context) if last or others else model
        done |= {(name, site): _options.plain(options) for site, options in found.items()}
        if others or (last and _stages(plan)):
            context = _anew(model, context)
    steps = [
        dataclasses.replace(step, options=done.pop((step.method, step.site), step.options))
        for step in plan.steps
    ]
    added = [Step(name, site, options) for (name, site), options in done.items()]
    return Plan((*steps, *added)), model, context


@contextlib.contextmanager
def _placed(plan: Plan, name: str) -> Iterator[None]:
    """Have refusals of a structural method name it, its site, and the place in the plan."""
    places = {step.site: f"steps[{index}]" for index, step in enumerate(plan.steps)}
    try:
        yield
    except UsageError as error:
        rule, where = f"{name} does not fit {error.where}: {error.rule}", places.get(error.where, "")
        raise UsageError(rule, got=error.got, where=where, way_out=error.way_out) from None


def _anew(model: nn.Module, context: Context) -> Context:
    """What is known of a model whose structure has changed."""
    if context.rebuilding or not len(context.examples):
        return dataclasses.replace(Context(), rebuilding=context.rebuilding, say=context.say)
    found = analyse(model, context.examples)
    paths = [site.name for site in found.sites]
    return dataclasses.replace(
        context,
        statistics=found.statistics,
        gram=gram.lazily(model, paths, context.examples),
        rows=fisher.lazily(model, paths, context.examples, seed=0),
    )


def _double(step: Step, index: int) -> UsageError:
    return UsageError(
        "a site takes one step of each stage", got=f"two for {step.site}", where=f"steps[{index}]"
    )


def _stages(plan: Plan) -> list[list[tuple[int, Step]]]:
    """The numbered steps, grouped into stages that see each other's results."""
    stages: dict[int, list[tuple[int, Step]]] = {}
    taken: set[tuple[int, str]] = set()
    for index, step in enumerate(plan.steps):
        discover.method("transforms", step.method)
        if step.method in STRUCTURE:
            continue
        rank = ORDER.index(step.method) if step.method in ORDER else len(ORDER)
        if (rank, step.site) in taken:
            raise _double(step, index)
        taken.add((rank, step.site))
        stages.setdefault(rank, []).append((index, step))
    return [stages[rank] for rank in sorted(stages)]


def _finishing(plan: Plan, known: Mapping[str, Site]) -> list[tuple[ModuleType, Mapping[str, Any]]]:
    """The methods that finish the whole model, each with the options at its sites."""
    found: dict[str, dict[str, Any]] = {}
    for index, step in enumerate(plan.steps):
        if hasattr(discover.method("transforms", step.method), "finish"):
            found.setdefault(step.method, {})[step.site] = _site(step, f"steps[{index}]", known)[1]
    return [(discover.method("transforms", name), options) for name, options in found.items()]


def _staged(
    model: nn.Module, stage: Sequence[tuple[int, Step]], known: Mapping[str, Site], context: Context
) -> tuple[Mapping[str, nn.Module], Context]:
    """The new modules of a stage, and the context of the model that has them."""
    method = discover.method("transforms", stage[0][1].method) if stage else None
    if method is None or not hasattr(method, "together"):
        return _changes(model, stage, known, context), context
    places = {step.site: f"steps[{index}]" for index, step in stage}
    options = {step.site: _ready(model, step, places[step.site], known)[2] for _, step in stage}
    try:
        changes, after = method.together(model, options, context)
    except UsageError as error:
        raise UsageError(
            f"{stage[0][1].method} does not fit {error.where}: {error.rule}",
            got=error.got,
            where=places.get(error.where, ""),
        ) from None
    return changes, after


def _changes(
    model: nn.Module, stage: Sequence[tuple[int, Step]], known: Mapping[str, Site], context: Context
) -> Mapping[str, nn.Module]:
    """The new modules of a stage: block after block where a method learns from inputs, else each by itself."""
    steps = {step.site: (step, f"steps[{index}]") for index, step in stage}
    ready = {path: _ready(model, step, where, known) for path, (step, where) in steps.items()}

    def change(path: str, context: Context) -> Mapping[str, nn.Module]:
        return _replaced(model, ready[path], *steps[path], context)

    wants = {path: _learns(ready[path], model) for path in known if path in ready}
    learning = [path for path, wanted in wants.items() if wanted != "nothing"]
    settle = _settling(ready)
    if (learning or settle) and len(context.examples) and not context.rebuilding:
        others = [path for path in ready if path not in learning]
        drifting = {path for path, wanted in wants.items() if wanted == "cross"}
        tied = {path: known[path].tied for path in ready if known[path].tied}
        work = _sequential.Work(learning, others, drifting, context, change, tied, settle)
        found = _sequential.in_order(model, work)
        if found is not None:
            return found
    return {path: new for site in ready for path, new in change(site, context).items()}


def _settling(
    ready: Mapping[str, _Ready],
) -> Callable[[_sequential.Place, _sequential.Changes], _sequential.Changes] | None:
    """What the methods make of a block's new modules, or None where none has use for that."""
    methods = {method.__name__: method for method, _, _ in ready.values() if hasattr(method, "settle")}
    if not methods:
        return None

    def settle(place: _sequential.Place, found: _sequential.Changes) -> _sequential.Changes:
        for name, method in methods.items():
            chosen = {
                path: one[2] for path, one in ready.items() if one[0].__name__ == name and path in found
            }
            found = method.settle(place, found, chosen) if chosen else found
        return found

    return settle


def _learns(ready: _Ready, model: nn.Module) -> str:
    """What a method asks the context for: "nothing", "gram" or "cross", which is both; one without `learns`, nothing.

    Weights that are read, in no layer that is called in its turn, have the original's matrices.
    """
    method, site, options = ready
    able = hasattr(method, "learns") and not is_bare(layer_at(model, site.name))
    return str(method.learns(options)) if able else "nothing"


def _ready(model: nn.Module, step: Step, where: str, known: Mapping[str, Site]) -> _Ready:
    """The method, site and options of a step that is not refused."""
    method = discover.method("transforms", step.method)
    site, options = _site(step, where, known)
    reason = method.refuse(site, options, layer_at(model, site.name))
    if reason:
        raise UsageError(f"{step.method} does not fit {site.name}: {reason}", where=where)
    return method, site, options


def _replaced(
    model: nn.Module, ready: _Ready, step: Step, where: str, context: Context
) -> Mapping[str, nn.Module]:
    method, site, options = ready
    try:
        return with_tied(model, site, method.replace(model, site, options, context))
    except UsageError as error:  # what only the whole model tells
        raise UsageError(
            f"{step.method} does not fit {site.name}: {error.rule}", got=error.got, where=where
        ) from None


def with_tied(model: nn.Module, site: Site, changes: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    """A method's new modules for a site, and for each module that is tied with it a layer over the same stored weight.

    Inputs of lookups are never rounded, those of products as at the site. Raises UsageError for a new module of another kind,
    which would have a weight of its own.
    """
    if not site.tied or site.name not in changes:
        return changes
    layer = changes[site.name]
    if not isinstance(layer, QuantizedLayer):
        raise UsageError("a weight that modules share must stay tied", got=f"with {', '.join(site.tied)}")
    modules = {path: model.get_submodule(path) for path in site.tied}
    beside = {path: layer.beside(m, rounding=kind_of(m) != "embedding") for path, m in modules.items()}
    return {**changes, **beside}


def _site(step: Step, where: str, known: Mapping[str, Site]) -> tuple[Site, Any]:
    if step.site not in known:
        inner = [path for path in known if path.startswith(f"{step.site}.")]
        near = inner[:3] or difflib.get_close_matches(step.site, known, n=3)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"the model has {len(known)} sites; see flyweight profile"
        )
        raise UsageError(
            "a step's site must be a layer of the model", got=repr(step.site), where=where, way_out=hint
        )
    method = discover.method("transforms", step.method)
    return known[step.site], _options.read(method, step.options, f"{where}.options")
