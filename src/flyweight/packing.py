"""Packs the chosen candidate into the artifact, loads it again, and confirms that it is what was measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from flyweight import discover
from flyweight.analysis.machine import machine
from flyweight.artifact import format as spec
from flyweight.artifact.load import load_module, load_predictor
from flyweight.errors import ArtifactError
from flyweight.evaluation import timing
from flyweight.evaluation.bench import deviation
from flyweight.records import Measured, Plan, Result
from flyweight.report.progress import Progress
from flyweight.runtimes._structure import leaves
from flyweight.runtimes.torch import caller
from flyweight.session import Session, versions

CONFIRMING = 6.0
"""Seconds of the race whose times are reported."""
SAME = 1e-9
"""Relative squared difference up to which a loaded artifact's output counts as the measured one's."""


def pack(
    session: Session, best: Measured, original: Measured, folder: Path, told: Progress
) -> tuple[Measured, Measured]:
    """Write a measured candidate to `folder` as an artifact and time it in turn with the original.

    Returns the candidate with the bytes and times of what was written, and the original with the times of the same race.
    Raises ArtifactError when the artifact, loaded again, does not give the measured output.
    """
    told.stage("packing", 2)
    told.step("writing the artifact")
    total = write(session, best.runtime, best.plan, best, folder)
    told.done(f"{total / 1e6:.2f} MB")
    told.step("loading it again")
    race = _confirmed(session, best, folder)
    told.done(f"{race.second_ms:.2f} ms, {race.speedup:.2f} x as fast as the original")
    timed = dataclasses.replace(original, latency_ms=race.first_ms, latency_interval=race.first_interval)
    if best.name == "original":
        return dataclasses.replace(timed, bytes=total), timed
    confirmed = dataclasses.replace(
        best,
        bytes=total,
        latency_ms=race.second_ms,
        latency_interval=race.second_interval,
        speedup=race.speedup,
        speedup_interval=race.speedup_interval,
    )
    return confirmed, timed


def write(session: Session, runtime: str, plan: Plan, measured: Measured | None, folder: Path) -> int:
    """Build the plan's model for a runtime and write its artifact; returns its bytes."""
    _, predictor = session.bench.prepare(runtime, plan)
    figures = {} if measured is None else measured.to_json()
    figures.pop("plan", None)  # the manifest has it
    manifest = spec.Manifest(
        task=session.task.name,
        runtime=runtime,
        session=dict(predictor.session),
        plan=plan,
        inputs=tuple(spec.TensorSpec(name=n, dtype=d, shape=s) for n, d, s in predictor.inputs),
        outputs=predictor.outputs,
        layouts=dict(predictor.layouts),
        model_digest=session.model_digest,
        measured=figures,
        machine=machine(),
        versions=versions(),
    )
    return spec.write(folder, predictor.files[0].parent, manifest)


def how_to_load(result: Result, folder: Path) -> str:
    """Code that loads and runs the artifact."""
    best = folder / "best"
    if not discover.method("runtimes", result.best.runtime).FILE:
        return f'import flyweight\n\nmodel = flyweight.load("{best}", task.model)\noutput = model(batch)'
    return "\n".join(
        [
            "import flyweight",
            "",
            f"# on {result.best.runtime}, without the model's class",
            f'predict = flyweight.load("{best}")',
            "output = predict(batch)",
            "",
            "# the same as a PyTorch module",
            f'model = flyweight.load("{best}", task.model)',
        ]
    )


def _confirmed(session: Session, best: Measured, folder: Path) -> timing.Race:
    """The original against the artifact that was loaded again, which must give the measured output."""
    batch = session.task.examples[0]
    _, kept = session.bench.prepare(best.runtime, best.plan)
    wanted = kept(batch)
    if discover.method("runtimes", best.runtime).FILE:
        predict: Any = load_predictor(folder)
    else:
        predict = caller(load_module(folder, session.task.model))
    found = predict(batch)
    if not deviation(_plain(wanted), _plain(found)) <= SAME:
        raise ArtifactError(
            "the artifact must give the output that was measured", got="another output", where=str(folder)
        )
    session.bench.forget()
    return session.bench.race(predict, CONFIRMING)


def _plain(output: Any) -> tuple[Any, ...]:
    """Without the structure, which a loaded file gives as plain dicts and tuples."""
    return tuple(leaves(output))
