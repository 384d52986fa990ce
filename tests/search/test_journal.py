"""A study file that is cut, flipped, foreign, newer or forged is refused and never read as something else."""

from __future__ import annotations

import json
import os
import random
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from flyweight.errors import ArtifactError, FlyweightError
from flyweight.records import JSON, Plan, Step, Trial
from flyweight.search import _journal
from flyweight.search.study import Study
from flyweight.testing.faults import cut, flip

TRIES = 4 * int(os.environ.get("FLYWEIGHT_KILLS", "100"))
TRIALS = 50
IDENTITY: dict[str, JSON] = {"model": "ab12", "seed": 0}


def trial_of(number: int) -> Trial:
    plan = Plan((Step("weight_only", f"layer.{number}", {"bits": 8}),))
    return Trial(
        number=number, name=f"candidate {number}", runtime="torch", plan=plan, state="failed",
        reason="why not", measured=None, seconds=1.5,
    )  # fmt: skip


def add(study: Study, number: int) -> Trial:
    trial = trial_of(number)
    return study.trial(trial.name, trial.runtime, trial.plan, lambda _: trial)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A closed study of 50 trials."""
    path = tmp_path_factory.mktemp("whole") / "study.db"
    with Study.open(path, IDENTITY, resume=False) as study:
        for number in range(TRIALS):
            add(study, number)
    return path.read_bytes()


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Database and WAL of a study that was not closed; the WAL holds all its trials."""
    path = tmp_path_factory.mktemp("torn") / "study.db"
    with Study.open(path, IDENTITY, resume=False) as study:
        for number in range(TRIALS):
            add(study, number)
        return path.read_bytes(), path.with_name("study.db-wal").read_bytes()


def outcome(path: Path) -> str:
    """How many trials the study holds, or "refused"; fails when it holds anything that was not written."""
    try:
        with Study.open(path, IDENTITY, resume=True) as study:
            found = study.trials()
    except ArtifactError as error:
        return "refused" if error.rule and error.got and error.where else f"refused without reasons: {error}"
    assert found == tuple(trial_of(number) for number in range(len(found)))
    return str(len(found))


def test_a_cut_file_is_refused_at_every_length(
    quick_path: Path, whole: bytes, figure: Callable[[int, str], None]
) -> None:
    source = random.Random(0)
    near = [page + step for page in range(0, len(whole), 4096) for step in (-1, 0, 1)]
    lengths = {*near, 1, 99, 100, *source.sample(range(len(whole)), TRIES)} & set(range(len(whole)))
    outcomes = Counter()
    for length in sorted(lengths):
        quick_path.write_bytes(whole[:length])
        outcomes[outcome(quick_path)] += 1
    figure(3, f"study file cut at {len(lengths)} lengths: {outcomes['refused']} refused")
    assert outcomes == {"refused": len(lengths)}


def test_flipped_bits_are_refused_or_harmless(
    quick_path: Path, whole: bytes, figure: Callable[[int, str], None]
) -> None:
    source = random.Random(1)
    outcomes: Counter[str] = Counter()
    for _ in range(2 * TRIES):
        quick_path.write_bytes(whole)
        flip(quick_path, source, bits=source.randint(1, 8))
        outcomes[outcome(quick_path)] += 1
    silent = sum(outcomes.values()) - outcomes["refused"] - outcomes[str(TRIALS)]
    figure(3, f"{2 * TRIES} flips of 1 to 8 bits in a study file: {silent} silent different trials")
    assert silent == 0
    assert outcomes["refused"] > TRIES


def test_a_study_with_a_harmless_flip_can_go_on(quick_path: Path, whole: bytes) -> None:
    source = random.Random(2)
    gone_on = 0
    while gone_on < 10:
        quick_path.write_bytes(whole)
        flip(quick_path, source)
        if outcome(quick_path) == "refused":
            continue
        with Study.open(quick_path, IDENTITY, resume=True) as study:
            for number in range(TRIALS, TRIALS + 30):
                add(study, number)
        assert outcome(quick_path) == str(TRIALS + 30)
        gone_on += 1


def test_a_torn_wal_is_taken_back_to_a_true_beginning(
    quick_path: Path, torn: tuple[bytes, bytes], figure: Callable[[int, str], None]
) -> None:
    path, wal = quick_path, quick_path.with_name("study.db-wal")
    database, log = torn
    lengths = sorted(random.Random(3).sample(range(len(log)), TRIES // 4))
    kept = []
    for length in [*lengths, len(log)]:
        path.write_bytes(database)
        wal.write_bytes(log)
        cut(wal, length)
        kept.append(int(outcome(path)))
        with Study.open(path, IDENTITY, resume=True) as study:
            add(study, kept[-1])
        assert outcome(path) == str(kept[-1] + 1)
    assert kept == sorted(kept)
    assert kept[-1] == TRIALS
    figure(3, f"study whose log was cut at {len(lengths)} lengths: opened and gone on {len(lengths)}")


def test_flipped_bits_in_the_log_give_a_true_beginning_or_a_refusal(
    quick_path: Path, torn: tuple[bytes, bytes], figure: Callable[[int, str], None]
) -> None:
    path, wal = quick_path, quick_path.with_name("study.db-wal")
    database, log = torn
    source = random.Random(4)
    outcomes: Counter[str] = Counter()
    for _ in range(TRIES // 4):
        path.write_bytes(database)
        wal.write_bytes(log)
        flip(wal, source)
        outcomes[outcome(path)] += 1
    assert not [told for told in outcomes if told.startswith("refused ")]
    assert len(outcomes) > 5
    figure(3, f"{TRIES // 4} flips in a study's log after a kill: 0 silent different trials")


def build_empty(path: Path) -> None:
    path.write_bytes(b"")


def build_random(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(10_000))


def build_text(path: Path) -> None:
    path.write_text("trial,score\n0,0.5\n")


def build_foreign(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE bookmarks (url TEXT)")
    database.close()


def build_folder(path: Path) -> None:
    path.mkdir()


def build_pipe(path: Path) -> None:
    os.mkfifo(path)


def build_symlink(path: Path) -> None:
    real = path.with_name("elsewhere.db")
    Study.open(real, IDENTITY, resume=False).close()
    path.symlink_to(real)


def build_newer(path: Path) -> None:
    alter(path, "PRAGMA user_version=2")


def build_trigger(path: Path) -> None:
    alter(path, "CREATE TRIGGER evil AFTER INSERT ON finished BEGIN DELETE FROM finished; END")


def build_index(path: Path) -> None:
    alter(path, "CREATE UNIQUE INDEX faster ON finished (kind, key)")


def build_view(path: Path) -> None:
    alter(path, "DROP TABLE head; CREATE VIEW head AS SELECT 1 AS one, 4 AS rows, '' AS digest")


def build_changed(path: Path) -> None:
    alter(path, "UPDATE finished SET value = replace(value, '1.5', '1.6') WHERE number = 2")


def build_moved(path: Path) -> None:
    alter(path, "UPDATE finished SET key = (SELECT key FROM finished WHERE number = 1) WHERE number = 2")


def build_hole(path: Path) -> None:
    alter(path, "DELETE FROM finished WHERE number = 2")


def build_shorter(path: Path) -> None:
    alter(path, "DELETE FROM finished WHERE number = 3")


def build_longer(path: Path) -> None:
    alter(path, "INSERT INTO finished SELECT 4, kind, 'new', value, digest FROM finished WHERE number = 3")


def build_no_head(path: Path) -> None:
    alter(path, "DELETE FROM head")


def build_no_rows(path: Path) -> None:
    alter(path, "DELETE FROM finished; UPDATE head SET rows = 0, digest = ''")


def build_null(path: Path) -> None:
    alter(path, "UPDATE finished SET key = NULL WHERE number = 2")


def build_not_utf8(path: Path) -> None:
    alter(path, "UPDATE finished SET key = CAST(x'ff80' AS TEXT) WHERE number = 2")


def build_huge_number(path: Path) -> None:
    alter(path, "UPDATE finished SET number = 9223372036854775807 WHERE number = 3")


def alter(path: Path, script: str) -> None:
    """A good study of three trials, changed by another program."""
    with Study.open(path, IDENTITY, resume=False) as study:
        for number in range(3):
            add(study, number)
    database = sqlite3.connect(path)
    database.executescript(script)
    database.close()


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (build_empty, "not a study file, got an empty file"),
        (build_random, "not a study file"),
        (build_text, "not a study file"),
        (build_foreign, "not a study file, got another program's database"),
        (build_folder, "not a study file, got something that is no plain file"),
        (build_pipe, "not a study file, got something that is no plain file"),
        (build_symlink, "not a study file, got something that is no plain file"),
        (build_newer, "reads studies of version 1, got version 2"),
        (build_trigger, "not a study file, got other tables"),
        (build_index, "not a study file, got other tables"),
        (build_view, "not a study file, got other tables"),
        (build_changed, "must be whole, got row 2 not as it was written"),
        (build_moved, "row 2 not"),
        (build_hole, "row 2 not"),
        (build_shorter, "3 good rows, which is not the number its head gives"),
        (build_longer, "row 4 not"),
        (build_no_head, "4 good rows"),
        (build_no_rows, "no identity"),
        (build_null, "row 2 not"),
        (build_not_utf8, "row 2 not"),
        (build_huge_number, "row 3 not"),
    ],
)
def test_what_is_no_good_study_is_refused(tmp_path: Path, build: Callable[[Path], None], told: str) -> None:
    path = tmp_path / "study.db"
    build(path)
    for opening in (lambda: Study.read(path), lambda: Study.open(path, IDENTITY, resume=True)):
        with pytest.raises(ArtifactError) as caught:
            opening()
        assert told in str(caught.value)
        assert caught.value.where == str(path)
    assert not path.with_name("study.db-lock").exists()


@pytest.mark.parametrize(("place", "value"), [(18, 9), (39, 5), (35, 3)])
def test_a_damaged_header_is_refused_though_all_rows_are_good(tmp_path: Path, place: int, value: int) -> None:
    """Place 18 says who may write, 32 to 39 where the free pages are: the next write would go wrong."""
    path = tmp_path / "study.db"
    alter(path, "")
    content = bytearray(path.read_bytes())
    content[place] = value
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="a study file must be whole"):
        Study.open(path, IDENTITY, resume=True)
    assert path.read_bytes() == content


def test_a_refused_study_is_left_closed(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    build_changed(path)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ArtifactError) as told:
        Study.open(path, IDENTITY, resume=True)
    assert os.listdir("/proc/self/fd") == before  # while the error, and so each frame, is still there
    assert told.value.exit_code == 5


def forge(path: Path, rows: list[tuple[str, str, bytes]]) -> None:
    """A study whose digests are right and whose rows are not what flyweight writes."""
    _journal.create(path, b"{}")
    database = sqlite3.connect(path)
    with database:
        last = database.execute("SELECT digest FROM head").fetchone()[0]
        for number, (kind, key, value) in enumerate(rows, 1):
            row = _journal.after(last, number, kind, key, value)
            _journal.append(database, number, row)
            last = row.digest
    database.close()


@pytest.mark.parametrize(
    "value",
    [
        b"{", b"", b"[" * 100_000, b"1" * 5000, b"null", b"[]", b'"text"', b"{}",
        json.dumps({**trial_of(0).to_json(), "plan": 3}).encode(),
        json.dumps({**trial_of(0).to_json(), "measured": {"score": 1}}).encode(),
        json.dumps({**trial_of(0).to_json(), "extra": 1}).encode(),
    ],
)  # fmt: skip
def test_a_forged_trial_is_refused(tmp_path: Path, value: bytes) -> None:
    path = tmp_path / "study.db"
    forge(path, [("trial", "torch x", value)])
    study = Study.read(path)
    with pytest.raises(ArtifactError, match="must be whole"):
        study.trials()


def test_a_forged_repetition_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    forge(path, [("score", "a", b"1"), ("score", "a", b"2")])
    with pytest.raises(ArtifactError, match="score 'a' twice"):
        Study.read(path)


def test_a_forged_identity_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    _journal.create(path, b"[1]")
    with pytest.raises(ArtifactError, match="no identity"):
        _ = Study.read(path).identity


def test_a_study_of_version_1_opens(figure: Callable[[int, str], None]) -> None:
    kept = sorted((Path(__file__).parent / "assets").glob("study_v*.db"))
    assert kept
    for path in kept:
        study = Study.read(path)
        assert study.identity["model"] == "ab12"
        assert study.remember("score", "baseline", lambda: None) == 0.1 + 0.2
        assert study.trials() == tuple(trial_of(number) for number in range(3))
    figure(9, f"study files of earlier versions: {len(kept)} of {len(kept)} opened")


def test_messages_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    build_random(path)
    with pytest.raises(FlyweightError) as caught:
        Study.read(path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 5
