"""Each attack is refused, or read as plain text; nothing runs and nothing outside is opened."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from artifact import samples
from attacks import bombs, compressed, path_escapes, payloads
from attacks.attack import CANARY, SECRET, Attack

import flyweight
from flyweight.artifact.format import read, tensors
from flyweight.errors import ArtifactError
from flyweight.testing import faults

NAMES = ("manifest.json", "weights.safetensors", "model.onnx", "weights.safetensors.gz")
RUNS = ("subprocess.", "os.exec", "os.posix", "os.system", "import", "socket.")
SPARE = 48 * 2**20
"""Bytes of memory that a reader may take for a hostile artifact of at most 1 MiB."""
FIGURE = Callable[[int, str], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good artifact that no test changes."""
    folder = samples.build(tmp_path_factory.mktemp("good") / "best")
    read(folder)  # imports what a reader imports, so that an import after this is the attack's
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where attacks happen: with a secret, and as the working directory, where a canary would appear."""
    (tmp_path / SECRET).write_text("secret")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def forged(good: Path, place: Path, attack: Attack) -> Path:
    """The good artifact, changed by the attack."""
    folder = Path(shutil.copytree(good, place / "best"))
    attack.forge(folder)
    return folder


def read_hostile(folder: Path) -> str | None:
    """What the refusal says; None when the artifact was read, its weights too."""
    try:
        tensors(read(folder))
    except ArtifactError as error:
        text = str(error)
        assert all((error.rule, error.got, error.where, error.way_out))
        assert error.exit_code == 5
        assert text.isascii()
        assert text.isprintable()
        assert len(text) < 1000
        return text
    return None


def check(folder: Path, attack: Attack) -> None:
    """Assert that the attack comes to nothing: it is refused as it should be, or read as plain text."""
    with faults.audit_opens() as seen:
        said = read_hostile(folder)  # one that hangs runs into the test's time limit
    assert (attack.says is None) == (said is None), said
    assert attack.says is None or attack.says in str(said), said
    assert not Path(CANARY).exists()
    assert [subject for event in RUNS for subject in seen.of(event)] == []
    # Files are opened relative to the folder's handle, by their fixed names. A number is a handle.
    paths = {subject for subject in seen.of("open") if not subject.isdigit()}
    assert paths <= {str(folder), str(folder.parent), *NAMES}


def check_all(good: Path, place: Path, attacks: Sequence[Attack]) -> None:
    """Assert it of each attack; the failure lists all that came to something."""
    failures = []
    for attack in attacks:
        try:
            check(forged(good, place, attack), attack)
        except AssertionError as error:
            failures.append(f"{attack.name}: {error}")
        for left in ("best", "real", "twin"):
            _remove(place / left)
    assert failures == []


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def test_no_path_escapes(good: Path, place: Path, figure: FIGURE) -> None:
    check_all(good, place, path_escapes.ATTACKS)
    assert len(path_escapes.ATTACKS) >= 40
    figure(13, f"paths outside of the artifact that were opened: 0 of {len(path_escapes.ATTACKS)}")


def test_no_payload_runs(good: Path, place: Path, figure: FIGURE) -> None:
    check_all(good, place, payloads.ATTACKS)
    assert len(payloads.ATTACKS) >= 25
    figure(10, f"canaries fired by payloads in artifacts: 0 of {len(payloads.ATTACKS)}")


def test_no_bomb_goes_off(good: Path, place: Path, figure: FIGURE) -> None:
    attacks = (*bombs.ATTACKS, *compressed.ATTACKS)
    check_all(good, place, attacks)
    figure(14, f"bombs and malformed sizes answered within 1 s each: {len(attacks)} of {len(attacks)}")


def test_a_bomb_takes_little_memory(good: Path, place: Path, figure: FIGURE) -> None:
    tried = 0
    for attack in (*bombs.ATTACKS, *compressed.ATTACKS):
        folder = forged(good, place, attack)
        if sum(path.stat().st_size for path in folder.iterdir()) > 2**16:  # a smaller one fills no memory
            assert faults.in_child(lambda at=folder: read_poor(at)).code == 0, attack.name
            tried += 1
        shutil.rmtree(folder)
    assert tried >= 10
    figure(14, f"bombs answered with {SPARE >> 20} MiB of memory to spare: {tried} of {tried}")


def read_poor(folder: Path) -> None:
    """Read with little memory; MemoryError ends the child that runs this with another code."""
    with faults.low_memory(SPARE):
        read_hostile(folder)


def test_a_large_artifact_takes_no_more_memory_than_its_weights(
    good: Path, place: Path, figure: FIGURE
) -> None:
    target = Path(shutil.copytree(good, place / "best"))
    size = 2**25
    raw = samples.safetensors({"t": samples.entry("U8", [size], 0, size)}, bytes(size))
    samples.replace_weights(target, raw)
    digest = hashlib.sha256(bytes(size)).hexdigest()
    entry = {"dtype": "uint8", "shape": [size], "sha256": digest}
    samples.resign(target, lambda document: document.update(tensors={"t": entry}))
    samples.replace_file(target, "model.onnx", samples.graph(len(raw) - 64, 64))
    del raw
    tracemalloc.start()
    artifact = read(target)
    reading = tracemalloc.get_traced_memory()[1]
    loaded = tensors(artifact)
    loading = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert loaded["t"].shape == (size,)
    assert reading < 2**22
    assert loading < 1.1 * size
    figure(
        14,
        f"memory to verify 32 MiB of weights: {reading / 2**20:.1f} MiB; to load: {loading / 2**20:.1f} MiB",
    )


def test_the_readme_counts_the_attacks() -> None:
    text = (Path(__file__).parent / "README.md").read_text()
    counted = dict(re.findall(r"^\| `(\w+).py` \| (\d+) \|", text, flags=re.MULTILINE))
    families = (path_escapes, bombs, payloads, compressed)
    assert counted == {family.__name__.split(".")[1]: str(len(family.ATTACKS)) for family in families}


def test_the_package_holds_no_way_to_run_code_from_a_file(figure: FIGURE) -> None:
    found = []
    for file in Path(flyweight.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            found += [f"{file.name}:{getattr(node, 'lineno', 0)} {word}" for word in _dangers(node)]
    assert found == []
    figure(10, "uses of pickle, eval, exec, unsafe yaml or torch loading in the package: 0")


def _dangers(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        roots = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        return [
            root
            for root in roots
            if root.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "cloudpickle")
        ]
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        unsafe = {"weights_only": "False", "allow_pickle": "True"}
        keywords = [f"{one.arg}={ast.unparse(one.value)}" for one in node.keywords if one.arg in unsafe]
        bad = [word for word in keywords if word in {f"{key}={value}" for key, value in unsafe.items()}]
        is_load = name == "torch.load" and "weights_only=True" not in [
            f"{one.arg}={ast.unparse(one.value)}" for one in node.keywords
        ]
        return bad + [name] * (name in ("eval", "exec", "compile", "yaml.load", "os.system") or is_load)
    return []


def test_the_check_for_dangers_finds_them() -> None:
    code = (
        "import pickle\nfrom marshal import loads\neval('1')\ntorch.load(f)\nnumpy.load(f, allow_pickle=True)"
    )
    found = [word for node in ast.walk(ast.parse(code)) for word in _dangers(node)]
    assert found == ["pickle", "marshal", "eval", "torch.load", "allow_pickle=True"]


def test_the_secret_is_guarded_by_the_test_itself(place: Path) -> None:
    """The audit sees an open of the secret; without this, the tests above could pass by being blind."""
    with faults.audit_opens() as seen:
        os.close(os.open(place / SECRET, os.O_RDONLY))
    assert seen.of("open") == [str(place / SECRET)]
