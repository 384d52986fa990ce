"""Which families there are for which model, and what sparing does to a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planning.made import site, steps
from runtimes.talkers import talker, tokens
from torch import nn

from flyweight.analysis import fisher, gram
from flyweight.analysis.bare import layer_at
from flyweight.analysis.sites import analyse
from flyweight.planning.candidates import families, sensitivity, uniform
from flyweight.planning.family import Candidate, Family
from flyweight.records import Goal, Plan, Site, Step
from flyweight.transforms import Context
from flyweight.transforms.weight_only import nbytes

FOLDS = [Step("fold_batch_norm", "a", {"norm": "n"})]


def names(model: nn.Module, example: torch.Tensor, goal: Goal) -> list[str]:
    return [family.name for family in families(model.eval(), analyse(model.eval(), [example]).sites, goal)]


def test_the_first_family_only_folds_norms() -> None:
    model = nn.Linear(32, 4)
    found = families(model, analyse(model, [torch.ones(1, 32)]).sites, Goal())
    assert (found[0].name, found[0].plan(FOLDS), found[0].plan(())) == ("float32", Plan(tuple(FOLDS)), Plan())
    assert len({family.name for family in found}) == len(found)
    assert all(family.steps for family in found[1:])


def test_int4_is_tried_where_size_matters() -> None:
    assert "int4 weights" not in names(nn.Linear(32, 4), torch.ones(1, 32), Goal(minimize="latency"))
    assert "int4 weights" in names(nn.Linear(32, 4), torch.ones(1, 32), Goal(minimize="size"))


def test_a_model_without_layers_has_one_family() -> None:
    assert names(nn.LayerNorm(4), torch.ones(1, 4), Goal()) == ["float32"]


def test_convolutions_are_never_dynamic() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    sites = analyse(model, [torch.ones(1, 3, 8, 8)]).sites
    for family in families(model, sites, Goal()):
        assert family.steps.get("0", Step("", "")).method != "dynamic_int8"


@given(st.lists(st.sampled_from("abcd"), unique=True))
def test_a_spared_site_is_treated_gentler_or_not_at_all(spared: list[str]) -> None:
    family = Family("int4", steps("a", "b", "c", "d", bits=4, group=32), steps("a", "b", bits=8))
    plan = family.plan(FOLDS, spared)
    found = {step.site: step for step in plan.steps if step.method == "weight_only"}
    assert plan.steps[0] == FOLDS[0]
    for name in "abcd":
        if name not in spared:
            assert found[name] == family.steps[name]
        elif name in "ab":
            assert found[name].options == {"bits": 8}
        else:
            assert name not in found


def test_a_candidate_says_how_many_layers_it_spares() -> None:
    candidate = Candidate(Family("int8", steps("a", "b")), "torch")
    assert candidate.name == "int8"
    assert candidate.sparing(["a"]).name == "int8, 1 layers spared"
    assert candidate.sparing(["a"]) == candidate.sparing(["a"]) != candidate


def test_every_family_but_the_original_meets_every_runtime_or_there_is_a_reason() -> None:
    found = [Family("float32"), Family("dynamic int8", steps("a", method="dynamic_int8"))]
    candidates, reasons = uniform(found, ["torch", "onnxruntime"])
    assert {(c.family.name, c.runtime) for c in candidates} == {
        ("float32", "onnxruntime"), ("dynamic int8", "onnxruntime"),
    }  # fmt: skip
    assert len(reasons) == 1
    assert "slower" in reasons[0]


def test_the_site_with_most_damage_for_its_gain_is_spared_first() -> None:
    sites = [
        site("small", macs=10, size=10),
        site("large", macs=1000, size=1000),
        site("table", macs=0, size=3000),
    ]
    family = Family("int8", steps("small", "large", "table"))
    assert sensitivity(family, sites, {"small": 0.1, "large": 0.1, "table": 0.0}) == [
        "small",
        "large",
        "table",
    ]
    assert sensitivity(family, sites, {"large": 0.5, "small": 0.001}) == [
        "large",
        "small",
    ]  # table is not known
    gentler = Family("int8", steps("small", "large"), steps("small"))
    assert sensitivity(gentler, sites, {"small": 0.1, "large": 0.1}) == [
        "large"
    ]  # sparing small changes nothing


@pytest.mark.parametrize("goal", [Goal(), Goal(minimize="size")])
def test_options_are_written_as_a_plan_takes_them(goal: Goal) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    for family in families(model, analyse(model, [torch.ones(2, 32)]).sites, goal):
        assert Plan.from_json(family.plan(()).to_json()) == family.plan(())


def known(model: nn.Module, example: torch.Tensor) -> tuple[tuple[Site, ...], Context]:
    found = analyse(model, [example])
    paths = [one.name for one in found.sites]
    grams, rows = gram.grams(model, paths, [example]), fisher.fisher(model, paths, [example], seed=0)
    return found.sites, Context(found.statistics, gram=grams.get, rows=rows.get)


def test_bits_differ_from_layer_to_layer_where_harm_is_known() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)]
    model, example = nn.Sequential(*layers).eval(), torch.randn(64, 64)
    with torch.no_grad():
        layers[2].weight *= 100  # its outputs are all 1 or -1, whatever its bits
    sites, context = known(model, example)
    found = {family.name: family for family in families(model, sites, Goal(minimize="memory"), context)}
    mixed, low = found["int4 and int8 weights"], found["int4 weights"]
    assert mixed.steps["2"] == low.steps["2"]
    assert {step.options.get("bits", 8) for step in mixed.steps.values()} == {4, 8}
    sizes = {
        name: sum(nbytes(model.get_submodule(s.name), s, family.steps[s.name].options) for s in sites)
        for name, family in found.items()
        if name in ("int4 weights", "int8 weights", "int4 and int8 weights")
    }
    assert sizes["int4 weights"] < sizes["int4 and int8 weights"]
    assert sizes["int4 and int8 weights"] <= (sizes["int4 weights"] + sizes["int8 weights"]) / 2


def test_blocks_are_tried_where_a_weight_meets_few_inputs() -> None:
    assert "int4 blocks, int8 inputs" in names(nn.Linear(64, 64), torch.ones(1, 64), Goal())
    assert "int4 blocks, int8 inputs" not in names(nn.Linear(64, 64), torch.ones(128, 64), Goal())


def test_a_variant_moves_outliers_into_the_weights_where_that_can_be_done() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).eval()
    sites, context = known(model, torch.randn(8, 64))
    found = families(model, sites, Goal(), dataclasses.replace(context, examples=[torch.randn(8, 64)]))
    dynamic = next(family for family in found if family.name.startswith("dynamic"))
    smoothed, other = dynamic.variants()
    assert smoothed.before == other.before == (Step("smooth", "1", {"target": "activations"}),)
    assert (smoothed.steps, other.steps == dynamic.steps) == (dynamic.steps, False)
    assert smoothed.plan(FOLDS).steps[:2] == (*FOLDS, *smoothed.before)
    alone = next(f for f in families(model, sites, Goal(), context) if f.name == dynamic.name)
    assert [family.before for family in alone.variants()] == [()]


def test_a_loss_of_coded_weights_can_be_chosen() -> None:
    model = nn.Linear(64, 64)
    found = families(model, analyse(model, [torch.ones(1, 64)]).sites, Goal(minimize="size", max_drop=0.02))
    first = next(family for family in found if "Huffman" in family.name)
    assert first.at is not None
    finer = first.at(first.loss / 4)
    assert first.loss == 0.02
    levels = [float(str(family.steps[""].options["level"])) for family in (first, finer)]
    assert levels[0] == pytest.approx(2 * levels[1], rel=0.01)
    assert levels[0] == pytest.approx((24 * 0.02 / 64**2) ** 0.5, rel=0.01)


def test_inputs_are_rounded_by_row_in_a_family_of_its_own() -> None:
    found = families(nn.Linear(64, 64), analyse(nn.Linear(64, 64), [torch.ones(8, 64)]).sites, Goal())
    by_row = [family for family in found if "per row" in family.name]
    assert [step.options["per_row"] for family in by_row for step in family.steps.values()] == [True]


def test_a_classifier_behind_convolutions_gets_no_family_by_row() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    found = names(model, torch.ones(1, 16, 12, 12), Goal())
    assert any("dynamic" in name for name in found)
    assert not any("per row" in name for name in found)


def spoken(
    goal: Goal, runtimes: Sequence[str], *, informed: bool, **changes: int
) -> tuple[nn.Module, dict[str, Family]]:
    pytest.importorskip("transformers")
    model, example = talker(tie_word_embeddings=True, **changes), tokens()
    sites, context = known(model, example) if informed else (analyse(model, [example]).sites, None)
    found = families(model, sites, goal, context, runtimes)
    assert all(family.only in ("", "llamacpp") for family in found)
    return model, {family.name: family for family in found}


def kinds(family: Family) -> dict[str, object]:
    """By a layer's last name, the code and the bits that it is stored in."""
    return {
        name.rpartition(".")[2]: (step.options.get("code", "integer"), step.options.get("bits"))
        for name, step in family.steps.items()
    }


def test_llama_cpp_is_given_its_own_types_alone() -> None:
    _, found = spoken(Goal(minimize="size"), ["llamacpp"], informed=False, intermediate_size=256)
    assert set(found) == {"8-bit types", "4-bit types", "3-bit types", "2-bit types"}
    assert {found[name].only for name in set(found) - {"float32"}} == {"llamacpp"}
    assert set(kinds(found["8-bit types"]).values()) == {("integer", None)}
    low = kinds(found["2-bit types"])
    assert (low["down_proj"], low["up_proj"]) == (("super_block", 2), ("iq4_nl", None))
    gentler = found["2-bit types"].gentler
    down = next(name for name in gentler if name.endswith("down_proj"))
    assert gentler[down].options == {"code": "super_block", "bits": 3, "rounding": "error_feedback"}


def test_types_that_fit_no_layer_are_no_family() -> None:
    _, found = spoken(Goal(minimize="size"), ["llamacpp"], informed=False)  # 256 divides no width
    assert set(found) == {"8-bit types", "4-bit types"}


def test_other_runtimes_and_models_are_not_given_types_of_llama_cpp() -> None:
    _, found = spoken(Goal(minimize="size"), ["onnxruntime", "llamacpp"], informed=False)
    candidates, _ = uniform(list(found.values()), ["onnxruntime", "llamacpp"])
    assert {c.runtime for c in candidates if c.family.only} == {"llamacpp"}
    assert not [c for c in candidates if c.runtime == "llamacpp" and "int3" in c.family.name]
    layer = nn.Linear(256, 256)
    sites = analyse(layer, [torch.ones(1, 256)]).sites
    found_here = families(layer, sites, Goal(minimize="size"), None, ["onnxruntime", "llamacpp"])
    assert not [family for family in found_here if family.only]


def test_types_are_mixed_for_the_least_bytes_within_a_loss() -> None:
    model, found = spoken(Goal(minimize="size"), ["llamacpp"], informed=True, intermediate_size=256)
    sites = {site.name: site for site in analyse(model, [tokens()]).sites}

    def size(family: Family) -> int:
        return sum(nbytes(layer_at(model, n), sites[n], step.options) for n, step in family.steps.items())

    mixed = next(family for family in found.values() if family.at is not None)
    assert mixed.at is not None
    ladder = [mixed.at(mixed.loss * factor) for factor in (100, 1, 0.01, 0)]
    assert [size(one) for one in ladder] == sorted(size(one) for one in ladder)
    assert size(ladder[0]) < size(mixed) <= size(found["4-bit types"]) < size(ladder[-1])
    assert ladder[-1].steps == found["8-bit types"].steps


def test_what_a_family_saves_is_what_its_codes_take_from_the_weights() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 16)).eval()
    found = {
        f.name: f for f in families(model, analyse(model, [torch.ones(1, 64)]).sites, Goal(minimize="size"))
    }
    weights = 64 * 64 + 64 * 16
    assert found["int4 weights"].saves == 4 * weights - (weights // 2 + weights // 32 * 2 + weights // 64)
    assert found["dynamic int8"].saves == 3 * weights
    assert next(f for name, f in found.items() if name.startswith("Huffman")).saves is None


def test_few_bits_are_tuned_where_they_break_the_bound_and_the_time_allows_it() -> None:
    model, data = (
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)).eval(),
        [torch.randn(8, 64)] * 4,
    )
    analysis = analyse(model, data)
    context = Context(analysis.statistics, examples=data)

    def variants(goal: Goal) -> list[Family]:
        found = {f.name: f for f in families(model, analysis.sites, goal, context)}
        return list(found["int4 weights"].variants())

    (tuned,) = variants(Goal(minimize="size"))
    assert tuned.name == "int4 weights, tuned"
    assert {step.method for step in tuned.steps.values()} == {"distilled"}
    assert tuned.steps["0"].options["bits"] == 4
    assert variants(Goal(minimize="size", within=1e-9)) == []
