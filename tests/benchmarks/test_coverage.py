"""The benchmarks of structure: what counts as removable, and what their tables say."""

from __future__ import annotations

import torch
from benchmarks import coverage, structure
from torch import nn

from flyweight.analysis.coupling import couple


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def test_the_share_counts_entries_of_parameters_once() -> None:
    model = mlp()
    assert coverage.share(model, couple(model, torch.randn(2, 4))) == 1 - 3 / (24 + 6 + 18 + 3)


def test_a_case_is_measured_whole() -> None:
    record = coverage.measured(mlp(), torch.randn(2, 4), (0.5,))
    assert record["kinds"] == {"neurons": 1}
    assert record["cuts"] == {"0.5": {"left": round((4 * 3 + 3 + 3 * 3 + 3) / 51, 4), "fails": {}}}


def test_what_cannot_be_traced_and_what_fails_is_said() -> None:
    untraced = {"reason": "the model cannot be traced: it | branches (at /some/where/model.py:3)"}
    assert "not traced: the model cannot be traced: it / branches (at model.py:3)" in coverage.row(
        "a", untraced
    )
    cuts = {"0.3": {"left": 0.75, "fails": {"trains": "no gradient"}}}
    row = coverage.row("b", {"kinds": {"heads": 2}, "share": 0.5, "cuts": cuts})
    assert row == "| b | 2 heads | 50% |  | 0.75; not trains: no gradient |  |"


def test_a_check_that_raises_is_a_failure_with_its_words() -> None:
    def broken() -> str:
        raise RuntimeError("no kernel")

    assert "no kernel" in coverage.tried(broken)
    assert coverage.exports(mlp(), torch.randn(2, 4)) == ""


def test_the_share_of_every_group_is_found_for_a_share_of_the_multiplications() -> None:
    model, batch = mlp(), torch.randn(2, 4)

    def method(share: float) -> nn.Module:
        many = 60 - int(60 * share)
        return nn.Sequential(nn.Linear(4, many), nn.ReLU(), nn.Linear(many, 3))

    whole = method(0.0)
    assert structure.macs(model, batch) == 2 * (24 + 18)
    assert abs(structure.nearest(method, whole, batch, 0.3) - 0.3) < 0.02


def test_the_table_of_drops_says_what_failed() -> None:
    row = {
        "case": "a",
        "metric": "drop at 30% of multiplications gone",
        "ours": 0.01,
        "peers": {"l2": 0.04, "lamp": None},
    }
    text = structure.table({"rows": [row], "versions": {"torch-pruning": "1.6"}})
    assert "| a | 30% | 1.00% | 4.00% | failed |" in text
