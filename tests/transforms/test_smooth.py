"""Scales that move between layers: the function stays, the formulas are the papers', and rounding costs less."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flyweight.analysis.fisher import fisher
from flyweight.analysis.gram import grams, lazily
from flyweight.analysis.sites import Analysis, analyse
from flyweight.errors import UsageError
from flyweight.inputs.check import run
from flyweight.records import Batch, Plan, Step
from flyweight.testing.zoo import ZOO, missing
from flyweight.transforms import Context, apply, plain_site, smooth

pytestmark = pytest.mark.usefixtures("one_thread")

INT4 = {"bits": 4, "group": 32, "symmetric": False}


class Block(nn.Module):
    """A norm, two readers, and a pair of layers around a gate, on inputs with outliers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(width)
        self.up, self.gate, self.down = nn.Linear(width, 64), nn.Linear(width, 64), nn.Linear(64, width)
        with torch.no_grad():
            self.norm.weight.copy_(torch.exp(torch.randn(width)))
            self.norm.weight[3] = 60.0
            self.norm.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        found: Tensor = self.down(self.up(normed) * self.gate(normed).sigmoid())
        return found


def examples(count: int = 3, width: int = 32) -> list[Tensor]:
    source = torch.Generator().manual_seed(1)
    return [torch.randn(20, width, generator=source) for _ in range(count)]


def known(model: nn.Module, batches: Sequence[Batch]) -> tuple[Analysis, Context]:
    analysis = analyse(model, batches)
    paths = [site.name for site in analysis.sites]
    return analysis, Context(analysis.statistics, lazily(model, paths, batches), examples=batches)


def smoothed(model: nn.Module, batches: Sequence[Batch], steps: Sequence[Step]) -> nn.Module:
    analysis, context = known(model, batches)
    return apply(model, Plan(tuple(steps)), analysis.sites, context)


def gap(model: nn.Module, other: nn.Module, batch: Batch) -> float:
    one, two = run(model, batch), run(other, batch)
    if not isinstance(one, Tensor):
        one, two = (getattr(found, "logits", None) for found in (one, two))
    return float((one.double() - two.double()).norm() / one.double().norm())


def everywhere(model: nn.Module, batches: Sequence[Batch], **options: Any) -> list[Step]:
    return [Step("smooth", path, options) for path in smooth.places(model, batches)]


@pytest.mark.parametrize(
    "options", [{"group": None}, {"target": "activations"}, {"target": "activations", "alpha": 0.5}]
)
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "layer_norm", "mlp"])
def test_the_function_stays(name: str, options: dict[str, Any]) -> None:
    entry = next(entry for entry in ZOO if entry.name == name)
    if missing(entry):
        pytest.skip(missing(entry))
    model, batches = entry.build().eval(), list(entry.examples())
    with torch.no_grad():  # sizes that differ, as trained ones do
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(2)))
    steps = everywhere(model, batches, **options)
    found = smoothed(model, batches, steps)
    assert max(gap(model, found, batch) for batch in batches) < 1e-5
    before, after = model.state_dict(), found.state_dict()
    assert sum(not torch.equal(before[key], after[key]) for key in before) > len(steps)


def test_the_places_are_the_first_readers() -> None:
    assert smooth.places(Block(), examples()) == ("up", "down")


def reference(model: Block, batches: Sequence[Tensor], alpha: float, target: str) -> np.ndarray[Any, Any]:
    """The factors of the norm's channels, in NumPy, from the papers' formulas."""
    with torch.no_grad():
        inputs = torch.cat([model.norm(batch) for batch in batches]).double().numpy()
    weights = np.concatenate([layer.weight.detach().double().numpy() for layer in (model.up, model.gate)])
    if target == "activations":
        factor = np.abs(inputs).max(0) ** alpha / np.abs(weights).max(0) ** (1 - alpha)
    else:
        factor = np.sqrt((inputs**2).mean(0)) ** alpha
    scaled: np.ndarray[Any, Any] = factor / np.exp(np.log(factor).mean())
    return scaled


@pytest.mark.parametrize("target", ["weights", "activations"])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_the_factors_are_the_papers(alpha: float, target: str) -> None:
    model, batches = Block().eval(), examples()
    found = smoothed(model, batches, [Step("smooth", "up", {"target": target, "alpha": alpha})])
    factor = reference(model, batches, alpha, target)
    for name in ("weight", "bias"):
        before, after = (m.norm.get_parameter(name).detach().numpy() for m in (model, found))
        np.testing.assert_allclose(after * factor, before, rtol=1e-4, atol=1e-6)
    for name in ("up", "gate"):
        before, after = (m.get_submodule(name).weight.detach().numpy() for m in (model, found))
        np.testing.assert_allclose(after, before * factor, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.down.weight, model.down.weight)


def test_a_step_may_name_any_reader() -> None:
    model, batches = Block().eval(), examples()
    one, two = (smoothed(model, batches, [Step("smooth", path)]) for path in ("up", "gate"))
    assert torch.equal(one.norm.weight, two.norm.weight)
    assert torch.equal(one.up.weight, two.up.weight)


def test_a_layer_that_reads_and_gives_is_scaled_on_both_sides() -> None:
    model, batches = Block().eval(), examples()
    steps = [Step("smooth", path, {"alpha": 0.5}) for path in ("up", "down")]
    both = smoothed(model, batches, steps)
    inputs, outputs = (smoothed(model, batches, [step]) for step in steps)
    ratio = both.up.weight / model.up.weight
    torch.testing.assert_close(
        ratio, inputs.up.weight / model.up.weight * (outputs.up.weight / model.up.weight)
    )
    assert gap(model, both, batches[0]) < 1e-5


QUANTIZE = {
    "weights": [Step("weight_only", path, {**INT4, "range": "minmax"}) for path in ("up", "gate", "down")],
    "static": [Step("static_int8", path, {"range": "minmax"}) for path in ("up", "gate", "down")],
    "dynamic": [Step("dynamic_int8", path) for path in ("up", "gate", "down")],
}


@pytest.mark.parametrize("name", QUANTIZE)
def test_rounding_costs_less_behind_it(name: str) -> None:
    model, batches = Block().eval(), examples(6)
    target = "weights" if name == "weights" else "activations"
    steps = [Step("smooth", "up", {"target": target})]
    plain, better = (smoothed(model, batches, [*first, *QUANTIZE[name]]) for first in ([], steps))
    errors = [np.mean([gap(model, found, batch) for batch in batches]) for found in (plain, better)]
    assert errors[1] < 0.9 * errors[0]


def test_the_chosen_factors_are_at_least_as_good_as_any_fixed_ones() -> None:
    model, batches = Block().eval(), examples(6)
    layers = [Step("weight_only", path, {**INT4, "range": "minmax"}) for path in ("up", "gate")]
    gram = grams(model, ["up"], batches)["up"].double()

    def error(first: list[Step]) -> float:
        alone = smoothed(model, batches, first)
        rounded = smoothed(model, batches, [*first, *layers])
        factor = (alone.up.weight / model.up.weight)[0].detach().double()
        total = 0.0
        for name in ("up", "gate"):
            wanted, got = (m.get_submodule(name).weight.detach().double() for m in (model, rounded))
            change = got.as_subclass(Tensor) / factor - wanted
            total += float(((change @ gram) * change).sum() / ((wanted @ gram) * wanted).sum())
        return total

    chosen = error([Step("smooth", "up", INT4)])
    others = [error([])] + [error([Step("smooth", "up", {**INT4, "alpha": a / 10})]) for a in range(11)]
    assert chosen <= min(others) * (1 + 1e-5)


def test_what_is_known_afterwards_is_what_is_seen_in_the_scaled_model() -> None:
    model, batches = Block().eval(), examples()
    analysis, context = known(model, batches)
    paths = [site.name for site in analysis.sites]
    asked = fisher(model, paths, batches, seed=0)
    context = dataclasses.replace(context, rows=asked.get, cross=context.gram)
    steps = {path: smooth.Options(alpha=0.5) for path in ("up", "down")}
    found, after = smooth.together(model, steps, context)
    other = apply(
        model, Plan(tuple(Step("smooth", path, {"alpha": 0.5}) for path in steps)), analysis.sites, context
    )
    assert sorted(found) == ["down", "gate", "norm", "up"]
    seen, anew = grams(other, paths, batches), analyse(other, batches).statistics
    counts = fisher(other, paths, batches, seed=0)
    for path in paths:
        torch.testing.assert_close(after.gram(path), seen[path], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after.cross(path), seen[path], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after.rows(path), counts[path], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(after.statistics[path].energy, anew[path].energy, rtol=1e-4, atol=1e-5)
        for side in ("input", "output"):
            ends = [
                (getattr(s[path], side).low, getattr(s[path], side).high) for s in (after.statistics, anew)
            ]
            assert ends[0] == pytest.approx(ends[1], rel=1e-4)
    assert list(after.statistics) == list(context.statistics)
    assert len(after.statistics) == 3
    with pytest.raises(KeyError):
        after.statistics["nowhere"]


def test_what_is_not_touched_keeps_its_statistics() -> None:
    model, batches = Block().eval(), examples()
    _, context = known(model, batches)
    after = smooth.together(model, {"up": smooth.Options()}, context)[1]
    assert after.statistics["down"] is context.statistics["down"]
    assert after.gram("down") is context.gram("down")
    assert after.gram("nowhere") is None


@pytest.mark.parametrize("target", ["weights", "activations"])
def test_half_floats_get_powers_of_two_and_lose_nothing(target: str) -> None:
    model, batches = Block().bfloat16().eval(), [batch.bfloat16() for batch in examples()]
    steps = everywhere(model, batches, target=target, alpha=0.5)
    found = smoothed(model, batches, steps)
    assert not torch.equal(found.norm.weight, model.norm.weight)
    assert all(torch.equal(model(batch), found(batch)) for batch in batches)


def test_dead_inputs_and_columns_keep_their_scale() -> None:
    model, batches = Block().eval(), examples()
    with torch.no_grad():
        model.norm.weight[5], model.norm.bias[5] = 0, 0
        model.up.weight[:, 7], model.gate.weight[:, 7] = 0, 0
    for target in ("weights", "activations"):
        found = smoothed(model, batches, [Step("smooth", "up", {"target": target, "alpha": 0.5})])
        assert all(bool(torch.isfinite(p).all()) for p in found.parameters())
        assert torch.equal(found.up.weight[:, 5], model.up.weight[:, 5])
        assert found.norm.weight[7] == model.norm.weight[7]
        assert gap(model, found, batches[0]) < 1e-5


def test_of_gpt2_s_joint_projection_only_the_values_are_scaled() -> None:
    entry = next(entry for entry in ZOO if entry.name == "tiny_gpt2")
    if missing(entry):
        pytest.skip(missing(entry))
    model, batches = entry.build().eval(), list(entry.examples())
    path = "transformer.h.0.attn"
    found = smoothed(
        model, batches, [Step("smooth", f"{path}.c_proj", {"target": "activations", "alpha": 0.5})]
    )
    before, after = (m.get_submodule(f"{path}.c_attn").weight for m in (model, found))
    assert torch.equal(before[:, :32], after[:, :32])  # queries and keys
    assert not torch.equal(before[:, 32:], after[:, 32:])
    assert gap(model, found, batches[0]) < 1e-5


def test_without_examples_the_structure_is_all_there_is() -> None:
    model, batches = Block().eval(), examples()
    step = Step("smooth", "up")
    sites = [plain_site(model, "up")]
    for context in (Context(), Context(rebuilding=True, examples=batches)):
        found = apply(model, Plan((step,)), sites, context)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found.parameters(), strict=True))
    found.load_state_dict(smoothed(model, batches, [step]).state_dict())


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (
            [Step("smooth", "up"), Step("smooth", "gate")],
            ["smooth does not fit gate", "scaled once", "a step at up"],
        ),
        ([Step("smooth", "up", {"alpha": 1.5})], ["alpha must be in [0, 1]", "1.5"]),
        ([Step("smooth", "up", {"alpha": float("nan")})], ["alpha must be in [0, 1]"]),
        ([Step("smooth", "up", {"target": "all"})], ["target must be one of weights, activations"]),
        ([Step("smooth", "up", {"bits": 7})], ["bits must be one of"]),
        ([Step("smooth", "up", {"group": 128})], ["smooth does not fit up", "32 inputs", "128"]),
        ([Step("smooth", "far")], ["smooth does not fit far", "nothing gives its input"]),
    ],
)
def test_refusals_name_the_site_and_the_reason(steps: list[Step], words: list[str]) -> None:
    class Longer(Block):
        def __init__(self) -> None:
            super().__init__()
            self.far = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.far(super().forward(x).tanh())

    with pytest.raises(UsageError) as error:
        smoothed(Longer().eval(), examples(), steps)
    for word in words:
        assert word in str(error.value)
    if "does not fit" in words[0]:
        assert f"steps[{len(steps) - 1}]" in str(error.value)


def test_a_quantized_layer_is_refused() -> None:
    model, batches = Block().eval(), examples()
    quantized = smoothed(model, batches, QUANTIZE["weights"])
    with pytest.raises(UsageError, match="smooth does not fit up: it is quantized already"):
        apply(quantized, Plan((Step("smooth", "up"),)), [plain_site(model, "up")], Context(examples=batches))


def test_convolutions_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1))
    with pytest.raises(UsageError, match="only the inputs of linear layers"):
        apply(model, Plan((Step("smooth", "0"),)), [plain_site(model, "0")], Context())


def test_learning_roundings_learn_in_the_scaled_model() -> None:
    model, batches = Block().eval(), examples(6)
    options = {**INT4, "rounding": "error_feedback", "drift": 0.0}
    layers = [Step("weight_only", path, options) for path in ("up", "gate", "down")]
    steps = [Step("smooth", "up", INT4), *layers]
    found = smoothed(model, batches, steps)
    scaled_first = smoothed(model, batches, steps[:1])
    assert all(
        torch.allclose(a, b, atol=1e-5)
        for a, b in zip(
            smoothed(scaled_first, batches, layers).state_dict().values(),
            found.state_dict().values(),
            strict=True,
        )
        if a.is_floating_point()
    )
