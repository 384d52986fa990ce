"""From an artifact to OpenVINO IR, the two files that OpenVINO's own tools and servers take.

The names are those that Optimum Intel and OpenVINO Model Server look for. Integer weights stay integers of 4 or 8 bits, and
no float becomes a half. IR is written here and never loaded from elsewhere: an artifact holds ONNX, which is checked to its
last byte before anything of it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flyweight.artifact import format as spec
from flyweight.artifact.manifest import ONNX, TensorSpec
from flyweight.errors import ArtifactError, UsageError, first_line
from flyweight.runtimes import openvino as runtime

XML, BIN = "openvino_model.xml", "openvino_model.bin"
SAME = 1e-5
"""Largest relative distance of an output of the IR from the artifact's."""
_BATCH, _LENGTH = 2, 4
"""Sizes of free dimensions in the inputs that both are compared on: the first, and all others."""


def write_ir(found: spec.Artifact, source: Path, part: Path) -> None:
    """Write a verified artifact for openvino, whose files lie in `source`, as XML and BIN to the folder `part`.

    Raises ArtifactError where the IR computes something else, UsageError without openvino.
    """
    missing = runtime.available()
    if missing:
        raise UsageError("IR is written by OpenVINO", got=missing)
    _convert(source, part)
    _compare(source, part, found)


def _convert(source: Path, part: Path) -> None:
    import openvino

    model = openvino.Core().read_model(source / ONNX)
    openvino.save_model(model, part / XML, compress_to_fp16=False)


def _compare(source: Path, part: Path, found: spec.Artifact) -> None:
    """Raise ArtifactError unless the IR, read again, gives the artifact's outputs."""
    given = dict(_inputs(found.manifest.inputs))
    first = runtime.open_file(source, found.manifest.session)(given)
    try:
        second = runtime.compiled(part / XML, found.manifest.session)(given)
    except RuntimeError as error:
        raise _other(first_line(error), found) from error
    for one, two in zip(first, second, strict=True):
        distance = np.abs(one.astype(np.float64) - two.astype(np.float64))
        scale = np.abs(one[np.isfinite(one)]).max(initial=0.0)
        if one.shape != two.shape or (np.isfinite(one) != np.isfinite(two)).any():
            raise _other("values of another shape, or finite elsewhere", found)
        if (distance[np.isfinite(one)] > SAME * scale).any():
            raise _other(f"another output, by {np.nanmax(distance):.3g}", found)


def _inputs(specs: Sequence[TensorSpec]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Named arrays that any model takes: ones where integers are wanted, which name the second entry of every table."""
    random = np.random.default_rng(0)
    for item in specs:
        shape = [
            (_BATCH if at == 0 else _LENGTH) if size is None else size for at, size in enumerate(item.shape)
        ]
        floats = item.dtype.startswith("float")
        values = random.standard_normal(shape) if floats else np.ones(shape)
        yield item.name, values.astype(item.dtype)


def _other(got: str, found: spec.Artifact) -> ArtifactError:
    return ArtifactError(
        "IR must compute what the artifact computes", got=got, where=str(found.folder),
        way_out="use the artifact's model.onnx, which OpenVINO reads too",
    )  # fmt: skip
