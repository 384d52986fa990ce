"""The benchmark of weight codes, on a tiny model: alike inputs and judge for all, nothing measured twice, nothing dropped."""

from __future__ import annotations

import copy
import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from inputs import language_folders
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import _results, weight_codes
from benchmarks import _weight_report as report
from benchmarks import _weight_runs as runs
from benchmarks._weight_cases import Case, encoder_judge, language_judge
from benchmarks._weight_ours import NAMES, file_bits, ours, quantize
from benchmarks.weight_codes import BITS, _wanted
from benchmarks.weight_peers import autoround, peers, quanto
from benchmarks.weight_peers._job import Done, Job, bytes_in, examples, layers, load, read_job, write_done

from flyweight import Task
from flyweight.inputs.language_model import language_task


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    language_folders.written(folder / "model", hidden_size=64, intermediate_size=128)
    (folder / "text.txt").write_text(language_folders.prose(20_000))
    task = language_task(folder / "model", folder / "text.txt", window=32, calibrating=6, judging=8)
    return Case(
        "smollm2", "causal", folder / "model", task, "model.", "kl", language_judge(task), {"windows": 6}
    )


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(runs, "WORK", tmp_path / "work")
    return tmp_path


def record(bits: float, kl: float, seconds: float = 10.0) -> dict:
    figures = {"kl": kl, "kl_error": 0.001, "perplexity": 34.0}
    return {"bits": bits, "seconds": seconds, "figures": figures}


def test_the_original_is_at_distance_0_from_itself(case):
    found = case.judge(case.with_weights({}))
    assert found["kl"] == 0
    assert found["kl_error"] == 0
    assert 100 < found["perplexity"] < 1000  # a random model of 260 tokens


def test_the_judge_is_the_plain_mean_over_all_positions(case):
    weights = {"model.layers.0.mlp.down_proj": torch.zeros(64, 128)}
    changed = case.with_weights(weights)
    found = case.judge(changed)
    windows = case.task.score.windows
    with torch.inference_mode():
        p, q = (torch.log_softmax(model(windows).double(), -1) for model in (case.task.model, changed))
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-6)
    right = q[:, :-1].gather(2, windows[:, 1:, None])
    assert found["perplexity"] == pytest.approx(math.exp(-float(right.mean())), rel=1e-5)


def test_changed_weights_leave_the_original_alone(case):
    layer = case.task.model.get_submodule("model.model.layers.1.self_attn.q_proj")
    before = layer.weight.clone()
    case.with_weights({"model.layers.1.self_attn.q_proj": torch.zeros(64, 64)})
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("bits", BITS)
def test_common_format_takes_the_bits_that_are_said(case, bits):
    found = quantize(case.task, ours("nearest", bits))
    entries = sum(weight.numel() for weight in found.weights.values())
    assert 0 <= 8 * found.bytes / entries - file_bits(bits) < 0.05  # rows of zero points end with a byte
    assert len(found.weights) == 14
    assert not any("head" in path or "embed" in path for path in found.weights)


@pytest.mark.parametrize("name", NAMES)
def test_own_runs_are_judged_and_counted(case, name):
    found = runs.run(case, name, 3)
    assert found["layers"] == 14
    assert found["figures"]["kl"] > 0
    assert found["seconds"] > 0
    assert found["bits"] == pytest.approx(8 * found["bytes"] / found["entries"])


def test_ours_beats_nearest_on_the_inputs_that_calibrate(case):
    nearest, fed = (runs.run(case, name, 2)["figures"]["kl"] for name in ("nearest", "flyweight"))
    assert fed < nearest


@pytest.mark.parametrize("peer", list(peers()))
@pytest.mark.parametrize("bits", BITS)
def test_settings_are_json_or_a_reason(peer, bits):
    told = peers()[peer].settings(peer, bits, "causal")
    assert json.loads(json.dumps(told)) == told
    assert isinstance(told, dict) or "bit" in told


def test_every_tool_is_named_and_has_a_colour():
    assert set(report.LABELS) == set(report.COLOURS) == set(runs.tools())


def test_a_peer_gets_the_windows_and_settings_and_its_weights_are_judged(case, kept, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", environment(kept))
    seen = []

    def started(command, log):
        job = read_job(Path(command[-1]))
        seen.append(job)
        model = load(job)
        weights = {name: torch.zeros_like(layer.weight) for name, layer in layers(model).items()}
        write_done(job, Done(weights, 100, 1.5))

    monkeypatch.setattr(runs, "_started", started)
    found = runs.run(case, "hqq", 4)
    (job,) = seen
    windows = torch.cat([case.task.examples[0], *case.task.examples[1:]])
    assert job.settings == {"nbits": 4, "axis": 1, "group_size": 32}
    assert found["seconds"] == 1.5
    assert found["bits"] == 8 * 100 / found["entries"]
    assert found["figures"]["kl"] > 0
    assert len(windows) == 6
    assert not (kept / "work" / "smollm2-hqq-4").exists()


def test_an_answer_that_is_there_is_not_asked_for_again(case, kept, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", environment(kept))

    def interrupted(command, log):
        job = read_job(Path(command[-1]))
        given = torch.cat([batch["input_ids"] for batch in examples(job)])
        assert torch.equal(given, torch.cat([case.task.examples[0], *case.task.examples[1:]]))
        write_done(job, Done({"model.layers.0.mlp.up_proj": torch.ones(128, 64)}, 10, 2.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "_started", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.run(case, "hqq", 4)
    monkeypatch.setattr(runs, "_started", lambda command, log: pytest.fail("asked again"))
    assert runs.run(case, "hqq", 4)["seconds"] == 2.0


def test_a_peer_without_an_environment_is_told(case, kept, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", kept)
    found = runs.run(case, "autoround", 4)
    assert found["failed"] == "there is no .venv-peers-autoround: make peers"
    assert found["key"]["versions"] == {}


def test_a_peer_that_fails_is_told_with_its_error(case, kept, monkeypatch):
    root = environment(kept)
    monkeypatch.setattr(runs, "ROOT", root)
    python = root / ".venv-peers" / "bin" / "python"
    python.unlink()
    python.write_text("#!/bin/sh\necho 'ValueError: no such width' >&2\nexit 1\n")
    python.chmod(0o755)
    assert runs.run(case, "hqq", 4)["failed"] == "ValueError: no such width"


def test_what_a_tool_does_not_offer_is_told(case):
    assert runs.run(case, "quanto", 3)["failed"] == "quanto has no 3-bit integers"


def test_the_key_changes_with_what_the_result_depends_on(case):
    first = runs.key(case, "flyweight", 4)
    assert first == runs.key(case, "flyweight", 4)
    assert first != runs.key(case, "flyweight", 3)
    assert first["source"]
    assert runs.key(case, "hqq", 4)["settings"]["nbits"] == 4


def test_records_are_kept_one_by_one(kept):
    runs.keep("a/b/4", {"bits": 4.5}, quick=False)
    runs.keep("a/b/3", {"bits": 3.5}, quick=False)
    assert runs.read(quick=False) == {"a/b/3": {"bits": 3.5}, "a/b/4": {"bits": 4.5}}
    assert runs.read(quick=True) == {}


def test_rows_compare_the_best_of_ours_with_the_best_peer():
    records = {
        "smollm2/flyweight/4": record(4.625, 0.08),
        "smollm2/flyweight_entropy/4": record(4.6, 0.05, 30.0),
        "smollm2/gptq/4": record(4.66, 0.10, 100.0),
        "smollm2/hqq/4": record(5.0, 0.4),
        "smollm2/nncf/4": {"failed": "no"},
    }
    damage, seconds = report.rows(records)
    assert (damage.ours, damage.ratio, damage.aim, damage.met) == (0.05, 0.5, 0.7, True)
    assert damage.peers["nncf"] is None
    assert (seconds.ours, seconds.reference, seconds.met) == (30.0, 100.0, True)


def test_a_file_of_ours_that_is_larger_is_not_compared():
    records = {"smollm2/flyweight_entropy/2": record(2.7, 0.5), "smollm2/gptq/2": record(2.66, 1.0)}
    assert report.rows(records) == []


def test_the_table_drops_nobody():
    records = {
        "smollm2/flyweight/4": record(4.625, 0.0837),
        "smollm2/gptq/4": record(4.66, 0.1034, 145.2),
        "smollm2/nncf/4": {"failed": "RuntimeError: a | b"},
    }
    text = report.table(records)
    assert "| flyweight, groups of 32 |  | **0.0837** ± 0.001; 4.62; 10 s; 34 |  |  |" in text
    assert "0.103 ± 0.001; 4.66; 145 s; 34" in text
    assert "- NNCF, scale estimation, 4 bits: RuntimeError: a / b" in text
    assert "| NNCF, scale estimation |  | — |  |  |" in text


def test_the_summary_names_the_best_peer_of_each_width_where_we_were_measured():
    records = {
        "smollm2/flyweight_entropy/3": record(3.58, 0.06),
        "smollm2/nearest/3": record(3.6, 0.01),  # ours too
        "smollm2/gptq/3": record(3.6, 0.5),
        "smollm2/autoround/3": record(3.59, 0.3),
        "smollm2/gptq/4": record(4.6, 0.1),
    }
    lines = report.summary(records).splitlines()
    assert lines[2:] == ["| 3 bits | **0.06** | 3.58 | 0.3 | 3.59, AutoRound, 50 steps of 4 |"]


def test_the_picture_is_sound_and_shows_every_measured_point():
    records = {
        f"smollm2/{name}/{bits}": record(bits + 0.6, 10.0**-bits)
        for name in ("flyweight", "gptq")
        for bits in BITS
    } | {"smollm2/hqq/4": {"failed": "no"}}
    drawn = ElementTree.fromstring(report.picture(records))
    assert len(drawn.findall(".//{*}circle")) == 8
    assert "KL to the original" in "".join(drawn.itertext())


@pytest.mark.parametrize("asked", ["nobody", "hqq:5", "hqq:x"])
def test_wrong_names_are_refused(asked):
    with pytest.raises(SystemExit, match="--only takes TOOL"):
        list(_wanted([asked]))


def test_only_takes_tools_with_and_without_bits():
    assert list(_wanted(["hqq:2", "nncf"])) == [("hqq", 2), *(("nncf", bits) for bits in BITS)]
    assert not any(tool == "autoround_200" for tool, _ in _wanted(None))


def test_a_second_run_measures_nothing_again(case, kept, monkeypatch):
    monkeypatch.setattr(_results, "FOLDER", kept / "results")
    monkeypatch.setattr(weight_codes, "CASES", {"smollm2": lambda quick: case})
    monkeypatch.setattr(weight_codes, "cores", torch.get_num_threads)
    monkeypatch.setattr(weight_codes.logging, "disable", lambda level: None)
    monkeypatch.setattr(report, "ROUNDED", 0.1)  # a byte is much beside the two zero points of a row
    monkeypatch.setattr(sys, "argv", ["weight_codes", "--quick", "--only", "flyweight:2", "quanto:3"])
    assert weight_codes.main() == 0
    first = json.loads((kept / "results" / "quick" / "weight_codes.json").read_text())
    assert first["runs"]["smollm2/quanto/3"]["failed"] == "quanto has no 3-bit integers"
    assert first["rows"][0]["ours"] == first["runs"]["smollm2/flyweight/2"]["figures"]["kl"]
    monkeypatch.setattr(runs, "run", lambda *_: pytest.fail("measured again"))
    assert weight_codes.main() == 0
    assert ElementTree.parse(kept / "results" / "quick" / "weight_codes.svg")


def test_bytes_in_counts_what_belongs_to_the_layers(tmp_path):
    tensors = {
        "a.q.qweight": torch.zeros(3, dtype=torch.int32), "a.q.scales": torch.zeros(2, dtype=torch.float16),
        "a.q.bias": torch.zeros(9), "a.qq.weight": torch.zeros(7),
    }  # fmt: skip
    save_file(tensors, tmp_path / "one.safetensors")
    assert bytes_in(tmp_path, ["a.q"]) == 3 * 4 + 2 * 2


def test_sentences_are_padded_to_one_width():
    batches = [
        {"input_ids": torch.ones(1, 3, dtype=torch.int64)},
        {"input_ids": torch.ones(2, 5, dtype=torch.int64)},
    ]
    first, second = (batch["input_ids"].tolist() for batch in autoround._padded(batches))
    assert first == [[1, 1, 1, 0, 0]]
    assert second == [[1] * 5] * 2


def test_quanto_is_unpacked_as_it_packs():
    packed = torch.tensor([[0b11_10_01_00]], dtype=torch.uint8)
    assert quanto._unpacked(packed, 2).flatten().tolist() == [0, 1, 2, 3]
    assert quanto._unpacked(packed, 4).flatten().tolist() == [0b0100, 0b1110]


def test_encoders_are_judged_by_what_is_not_padding():
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1, bias=False)
            torch.nn.init.ones_(self.layer.weight)

        def forward(self, attention_mask):
            return SimpleNamespace(last_hidden_state=self.layer(attention_mask[..., None] * 1.0 + 1))

    mask = torch.tensor([[1, 1, 0]])
    model = Encoder()
    task = Task(
        name="t", model=model, examples=[{"attention_mask": mask}],
        score=lambda predict: [float(predict({"attention_mask": mask}).last_hidden_state.sum()) for _ in range(2)],
    )  # fmt: skip
    judged = encoder_judge(task)
    assert judged(model)["relative_error"] == 0
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layer.weight *= 1.5
    found = judged(other)
    assert (found["relative_error"], found["drop"]) == (pytest.approx(0.5), pytest.approx(-0.5))
    assert found["cosine"] == pytest.approx(1.0)


def test_done_is_written_whole(tmp_path):
    job = Job(
        peer="hqq", kind="causal", bits=4, model="", examples="", out=str(tmp_path), threads=1, settings={}
    )
    write_done(job, Done({"a": torch.ones(2, 2, dtype=torch.float16)}, 3, 1.0))
    told = json.loads((tmp_path / "done.json").read_text())
    assert told == {"seconds": 1.0, "bytes": 3, "entries": 4, "layers": 1}
    assert load_file(tmp_path / "weights.safetensors")["a"].dtype == torch.float32


def environment(folder: Path) -> Path:
    """A root with what looks like the environment of the peers."""
    python = folder / ".venv-peers" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    return folder
