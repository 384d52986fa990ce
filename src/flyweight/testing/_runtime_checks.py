"""What every runtime promises, one function each: it raises when the promise is broken."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from flyweight import discover, transforms
from flyweight.analysis.machine import instructions
from flyweight.analysis.sites import analyse, model_bytes
from flyweight.analysis.trace import trace
from flyweight.artifact import format as spec
from flyweight.artifact.load import load_module, load_predictor
from flyweight.errors import DataError
from flyweight.inputs.check import digest, run
from flyweight.records import Batch, Plan, Step
from flyweight.runtimes import _structure
from flyweight.runtimes._export import names, tensors
from flyweight.runtimes._files import BESIDE, GGUF, GRAPH, MODEL, PACKED, WEIGHTS, Predictor
from flyweight.testing._cases import Case, NotApplicable, distance, plans_of, require, same, same_form
from flyweight.testing.zoo import Zoo, missing
from flyweight.transforms import Context, QuantizedLayer

TIGHT, LOOSE = 2e-5, 5e-2
"""Relative distance of a runtime's output from PyTorch's: with floating activations, and with rounded ones, where a value
in the middle between two integers may go either way."""
_HEADER = 4096


@dataclass(frozen=True, eq=False)
class Running:
    """A case that a runtime runs."""

    case: Case
    twin: nn.Module
    """The same in PyTorch."""
    predictor: Predictor

    @property
    def saturates(self) -> bool:
        """Whether sums of integer products may leave their range: full-range weights on a processor without VNNI."""
        layers = [m for m in self.twin.modules() if isinstance(m, QuantizedLayer)]
        wide = [m for m in layers if m.activations != "float" and int(m.encoded()[0].abs().max()) > 64]
        return bool(wide) and not {"avx512_vnni", "avx_vnni"} & set(map(str, instructions()))

    @property
    def tolerance(self) -> float:
        """How far the outputs may be apart."""
        layers = [m for m in self.twin.modules() if isinstance(m, QuantizedLayer)]
        own = getattr(discover.method("runtimes", self.predictor.runtime), "ROUNDS", False)
        return LOOSE if any(own or layer.activations != "float" for layer in layers) else TIGHT


def plans(runtime: str, entry: Zoo) -> Iterator[Case | str]:
    """A model as it is, and with the first level of each transform that pays on the runtime; or why there is none."""
    reason = missing(entry)
    if reason:
        yield reason
        return
    model, examples = entry.build().eval(), list(entry.examples())
    folds = tuple(Step("fold_batch_norm", c, {"norm": n}) for c, n in trace(model, examples[0]).norms.items())
    sites = [transforms.plain_site(model, fold.site) for fold in folds]
    folded = transforms.apply(model, Plan(folds), sites, Context())
    analysis = analyse(folded, examples)
    case = functools.partial(Case, "", entry, torch.float32, model, model, examples, analysis)
    yield case(Plan(folds))
    for name in discover.methods("transforms"):
        changes_no_layer = name in (*transforms.EXACT, *transforms.STRUCTURE)
        if changes_no_layer or discover.method("runtimes", runtime).refuse([Step(name, "")]):
            continue
        for plan in plans_of(name, folded, analysis, examples):
            yield case(Plan((*folds, *plan.steps)))


@contextmanager
def prepared(runtime: str, case: Case) -> Iterator[Running]:
    """The case, prepared in a folder of its own; raises ModelError when the runtime does not take it."""
    with tempfile.TemporaryDirectory(prefix="flyweight-") as folder:
        twin = case.changed
        yield Running(
            case, twin, discover.method("runtimes", runtime).prepare(twin, case.examples, Path(folder))
        )


def agrees(running: Running) -> None:
    """The outputs are PyTorch's, in structure, shape, dtype and values, on every example."""
    for batch in running.case.examples:
        wanted, found = run(running.twin, batch), running.predictor(batch)
        same_form(wanted, found)
        gap = distance(wanted, found)
        if gap > running.tolerance and running.saturates:
            raise NotApplicable(
                "this processor's 16-bit sums saturate with weights beyond 64: the plan does not pay here"
            )
        require(gap <= running.tolerance, f"{gap:.3g} from PyTorch, more than {running.tolerance:.3g}")


def no_state(running: Running) -> None:
    """A call leaves nothing behind: not in the runtime, the batch or the outputs before."""
    first, second = running.case.examples[:2]
    before = _digest(first)
    found = running.predictor(first)
    kept = copy.deepcopy(found)
    running.predictor(second)
    same(kept, found)
    same(kept, running.predictor(first))
    require(_digest(first) == before, "the batch changed")


def model_untouched(running: Running) -> None:
    """Preparing again leaves the model as it was."""
    before = digest(running.twin.state_dict())
    method = discover.method("runtimes", running.predictor.runtime)
    with tempfile.TemporaryDirectory(prefix="flyweight-") as folder:
        again = method.prepare(running.twin, running.case.examples, Path(folder))
        same(running.predictor(running.case.examples[0]), again(running.case.examples[0]))
    require(digest(running.twin.state_dict()) == before, "the model's state changed")


def honest_bytes(running: Running) -> None:
    """`bytes` are those of the files, all in one folder under the known names."""
    files = running.predictor.files
    names = {file.name for file in files}
    require(names <= {WEIGHTS, PACKED, GRAPH, GGUF, MODEL, *BESIDE}, "a file of another name")
    beside = {files[0].parent / WEIGHTS} if PACKED in names else set()  # what a compressed one is run from
    require(set(files[0].parent.iterdir()) == {*files, *beside}, "files that are not listed")
    require(
        sum(file.stat().st_size for file in files) == running.predictor.bytes, "other bytes than the files'"
    )


def stored_once(running: Running) -> None:
    """The weights' file holds the model's tensors, and next to nothing else."""
    folder = running.predictor.files[0].parent
    size = sum(f.stat().st_size for f in folder.iterdir() if f.name in (WEIGHTS, GGUF, MODEL))
    room = _HEADER + 256 * len(running.twin.state_dict())
    require(size <= model_bytes(running.twin) + room, f"{size} bytes for {model_bytes(running.twin)}")


def wrong_shapes_refused(running: Running) -> None:
    """A runtime that runs a file refuses a batch of another rank by the input's name."""
    if not discover.method("runtimes", running.predictor.runtime).FILE:
        raise NotApplicable("PyTorch says so in its own words")
    batch = running.case.examples[0]
    flat = {name: tensor[..., None] for name, tensor in zip(names(batch), tensors(batch), strict=True)}
    wrong: Batch = flat if isinstance(batch, dict) else tuple(flat.values())
    try:
        running.predictor(wrong)
    except DataError as error:
        require(any(name in str(error) for name in flat), f"the input is not named: {error}")
        return
    require(False, "a batch of another rank was taken")


def artifact_round_trip(running: Running) -> None:
    """Packed and loaded again, as a file or as a module, the outputs are the same."""
    with tempfile.TemporaryDirectory(prefix="flyweight-") as parent:
        folder = Path(parent) / "best"
        spec.write(folder, running.predictor.files[0].parent, manifest(running))
        module = load_module(folder, running.case.entry.build())
        for batch in running.case.examples:
            same(run(running.twin, batch), run(module, batch))
        if discover.method("runtimes", running.predictor.runtime).FILE:
            found = load_predictor(folder)(running.case.examples[0])
            wanted = running.predictor(running.case.examples[0])
            same(_structure.leaves(wanted), _structure.leaves(found))


def manifest(running: Running) -> spec.Manifest:
    """What an artifact of the case says of itself."""
    predictor = running.predictor
    return spec.Manifest(
        task=running.case.entry.name,
        runtime=predictor.runtime,
        session=dict(predictor.session),
        plan=running.case.plan,
        inputs=tuple(spec.TensorSpec(name=n, dtype=d, shape=s) for n, d, s in predictor.inputs),
        outputs=predictor.outputs,
        layouts=dict(predictor.layouts),
        model_digest=digest(running.case.model.state_dict()),
        measured={},
        machine={},
        versions={},
    )


CHECKS = (
    agrees, no_state, model_untouched, honest_bytes, stored_once, wrong_shapes_refused, artifact_round_trip,
)  # fmt: skip


def _digest(batch: Batch) -> str:
    return digest(dict(zip(names(batch), tensors(batch), strict=True)))
