"""What is said: the verdict, how sure it is, and why each layer is as it is."""

from __future__ import annotations

import pytest
from planning.made import ORIGINAL, measured, site, steps

from flyweight.planning import advice
from flyweight.records import Goal, Plan, Step

GOAL = Goal(max_drop=0.01)


def test_a_goal_that_is_met_is_told_with_its_figures() -> None:
    best = measured("int8", GOAL, speedup=2.5, drop=0.004, half=0.003, bytes=250)
    said = advice.verdict(best, GOAL, ORIGINAL, met=True)
    assert (
        said
        == "int8 on torch is 2.50 x faster than the original and 4.0 x smaller, at a drop of 0.40% (0.10% to 0.70%)."
    )


@pytest.mark.parametrize(
    ("drop", "half", "why"),
    [(0.05, 0.01, "is more than 1.00%"), (0.005, 0.02, "cannot be told from more than 1.00%")],
)
def test_a_goal_that_is_not_met_names_the_nearest_and_why(drop: float, half: float, why: str) -> None:
    near = measured("int8", GOAL, speedup=2.0, drop=drop, half=half)
    said = advice.verdict(near, GOAL, ORIGINAL, met=False)
    assert said.startswith("Nothing met the bound; the nearest, int8 on torch, is 2.00 x faster")
    assert said.endswith(f"{why}.")


def test_nothing_better_is_said_so() -> None:
    assert advice.verdict(ORIGINAL, GOAL, ORIGINAL, met=False) == (
        "Nothing that was tried is surely faster than the original here."
    )


def test_the_resolution_asks_for_more_samples_where_they_are_few() -> None:
    subject = measured("int8", GOAL, drop=0.0, half=0.02)
    found = advice.resolution(subject, 100, GOAL)
    assert found == {"samples": 100, "resolvable_drop": 0.02, "samples_needed": 400}
    assert advice.resolution(measured("int8", GOAL, half=0.001), 100, GOAL)["samples_needed"] == 100
    nothing = advice.resolution(subject, None, GOAL)
    assert (nothing["resolvable_drop"], nothing["samples_needed"]) == (None, None)


def test_each_layer_has_its_choice_and_reason() -> None:
    sites = [site("a"), site("b"), site("table", kind="embedding", macs=0), site("left")]
    uniform = steps("a", "b", "table")
    plan = Plan((Step("fold_batch_norm", "a", {"norm": "n"}), uniform["a"], uniform["table"]))
    found = advice.layers(sites, plan, uniform, {"a": 1e-6, "b": 0.5, "table": 1e-7})
    assert [choice.site for choice in found] == ["a", "b", "table", "left"]
    kept, spared, table, left = found
    assert (kept.choice, kept.damage) == ("weight_only", 1e-6)
    assert spared.choice == "float32"
    assert "spared from weight_only" in spared.reason
    assert "rank 1 of 3" in spared.reason
    assert "looked up, not multiplied" in table.reason
    assert left.reason == "no method that was chosen fits it"
    assert left.damage is None


def test_a_step_is_told_in_a_few_words() -> None:
    assert advice.label(None) == "float32"
    assert (
        advice.label(Step("weight_only", "a", {"bits": 4, "group": 32})) == "weight_only (bits 4, group 32)"
    )


def test_a_step_at_no_layer_is_told_and_no_layer_is_said_to_be_left_alone() -> None:
    group = {"name": "a:channels", "units": 4, "kind": "channels"}
    plan = Plan((Step("prune", "a:channels", {"ratio": 0.5, "kept": "0,2", "group": group}),))
    first, last = advice.layers([site("a")], plan, {}, {})
    assert "left as it is" not in first.reason
    assert (last.site, last.kind, last.choice) == ("a:channels", "group", "prune")
    assert last.reason == "2 of 4 channels stay"
