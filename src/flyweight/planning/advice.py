"""Says in words what was decided, why, and how sure that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from flyweight.evaluation.quality import Drop, samples_needed
from flyweight.planning import choose
from flyweight.records import JSON, Goal, LayerChoice, Measured, Plan, Site, Step
from flyweight.transforms import EXACT, prune


def verdict(best: Measured, goal: Goal, original: Measured, *, met: bool, scored: bool = True) -> str:
    """The answer in one sentence; best: the chosen candidate, or the nearest when the goal is not met."""
    if met:
        return f"{best.name} on {best.runtime} is {_gain(best, goal, original)}, at a drop of {_drop(best)}."
    if not scored:
        return "Nothing could be scored in the time; give more with --within."
    if best == original or not choose.improves(best, goal, original):
        what = {"latency": "faster", "size": "smaller", "memory": "lighter"}[goal.minimize]
        slow = " and no slower" if goal.minimize != "latency" and choose.speed_counts(goal) else ""
        return f"Nothing that was tried is surely {what} than the original here{slow}."
    why = "cannot be told from more than" if best.verdict == "unresolved" else "is more than"
    return (
        f"Nothing met the bound; the nearest, {best.name} on {best.runtime}, is {_gain(best, goal, original)}, "
        f"but its drop of {_drop(best)} {why} {goal.max_drop:.2%}."
    )


def resolution(subject: Measured, samples: int | None, goal: Goal) -> dict[str, JSON]:
    """What the task's samples can tell, judged by one candidate's paired differences, and how many would do.

    samples_needed is for telling a drop of half the bound from the bound itself, or this candidate's drop where it lies
    nearer to zero than that.
    """
    if samples is None or subject.drop_interval is None:
        return {"samples": samples, "resolvable_drop": None, "samples_needed": None}
    drop = Drop(subject.drop, subject.drop_interval)
    fair = Drop(min(subject.drop, goal.max_drop / 2), subject.drop_interval)
    needed = samples_needed(samples, fair if subject.drop < goal.max_drop else drop, goal.max_drop)
    return {"samples": samples, "resolvable_drop": drop.half, "samples_needed": needed}


def layers(
    sites: Sequence[Site], plan: Plan, uniform: Mapping[str, Step], damages: Mapping[str, float]
) -> tuple[LayerChoice, ...]:
    """What was decided at each site of the chosen plan, and why; damages are those of the uniform family.

    Steps at what is no layer of the model, as groups of units and the layers inside a new one, come behind the layers.
    """
    steps = {step.site: step for step in plan.steps if step.method not in EXACT}
    ranked = sorted(damages, key=lambda name: damages[name], reverse=True)
    own = [
        LayerChoice(
            site=site.name,
            kind=site.kind,
            parameters=site.parameters,
            macs=site.macs,
            choice=label(steps.get(site.name)),
            reason=_reason(site, steps.get(site.name), uniform.get(site.name), damages, ranked),
            damage=damages.get(site.name),
        )
        for site in sites
    ]
    names = {site.name for site in sites}
    beside = [step for step in steps.values() if step.site not in names]
    if beside:
        left = "no step of its own; the plan changes what goes together with it, told below the layers"
        own = [dataclasses.replace(one, reason=left) if one.site not in steps else one for one in own]
    return (*own, *(_beside(step) for step in beside))


def _beside(step: Step) -> LayerChoice:
    """A step at what is no layer of the model."""
    choice, reason, group = label(step), "a step at no single layer of the model", step.options.get("group")
    if isinstance(group, Mapping):
        stay = len(prune.units_of(str(step.options["kept"]), step.site))
        choice, reason = step.method, f"{stay} of {group['units']} {group['kind']} stay"
    return LayerChoice(
        site=step.site, kind="group", parameters=0, macs=0, choice=choice, reason=reason, damage=None
    )


def label(step: Step | None) -> str:
    """A step in a few words, or float32."""
    if step is None:
        return "float32"
    told = {name: value for name, value in step.options.items() if not isinstance(value, Mapping)}
    options = ", ".join(f"{name} {value}" for name, value in told.items())
    return step.method + (f" ({options})" if options else "")


def _reason(
    site: Site, step: Step | None, usual: Step | None, damages: Mapping[str, float], ranked: Sequence[str]
) -> str:
    if usual is None and step is None:
        return "no method that was chosen fits it" if damages or step else "the model is left as it is"
    damage = damages.get(site.name)
    alone = "" if damage is None else f"alone it changes the output by {damage:.2g} (squared, relative)"
    if usual is not None and step != usual:
        place = f", rank {ranked.index(site.name) + 1} of {len(ranked)}" if damage is not None else ""
        return f"spared from {label(usual)}: {alone}{place}; the contract needs it"
    if site.kind == "embedding":
        return "looked up, not multiplied: stored small" + (f"; {alone}" if alone else "")
    return alone or "the contract is met with it"


def _gain(candidate: Measured, goal: Goal, original: Measured) -> str:
    times, size = choose.gain_of(candidate, goal, original), original.bytes / candidate.bytes
    if goal.minimize == "latency":
        return f"{times:.2f} x faster than the original and {_size(size)}"
    what = "smaller" if goal.minimize == "size" else "lighter in memory"
    return f"{times:.2f} x {what} than the original and {candidate.speedup:.2f} x as fast"


def _size(times: float) -> str:
    if 0.95 < times < 1.05:
        return "as large"
    return f"{times:.1f} x smaller" if times > 1 else f"{1 / times:.1f} x larger"


def _drop(candidate: Measured) -> str:
    if candidate.drop_interval is None:
        return f"{candidate.drop:.2%}"
    low, high = candidate.drop_interval.low, candidate.drop_interval.high
    return f"{candidate.drop:.2%} ({low:.2%} to {high:.2%})"
