"""What other tools of an artifact's runtime take, out of the artifact, in a folder of its own.

Of an artifact for openvino that is OpenVINO IR; of any other the files that its runtime opened: model.onnx with its weights
unpacked, model.gguf, or a Hugging Face folder.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from flyweight.artifact import _ir
from flyweight.artifact import format as spec
from flyweight.artifact._files import disk_errors, is_there
from flyweight.artifact.manifest import MANIFEST, ONNX
from flyweight.errors import UsageError


def export(artifact: Path, folder: Path) -> dict[str, int]:
    """Write the files to a new folder, which appears whole or not at all; the bytes of each by its name.

    Raises ArtifactError for a damaged artifact or one whose IR computes something else, UsageError where the folder is there
    already or OpenVINO is missing, MachineError when the disk does not take it.
    """
    found = spec.read(artifact)
    if is_there(folder):
        way_out = "choose another folder, or move that one away"
        raise UsageError(
            "the folder must not be there yet", got="one that is", where=str(folder), way_out=way_out
        )
    names = {file.name for file in found.files} - {MANIFEST}
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with (
        disk_errors(folder),
        tempfile.TemporaryDirectory(prefix=".flyweight-", dir=folder.absolute().parent) as place,
    ):
        part = Path(place) / "part"
        part.mkdir()
        with spec.runnable(found) as source:
            if found.manifest.runtime == "openvino" and ONNX in names:
                _ir.write_ir(found, source, part)
            else:
                for file in source.iterdir():
                    if file.name != MANIFEST:
                        shutil.copyfile(file, part / file.name)
        sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
        part.rename(folder.absolute())
    return sizes
