from __future__ import annotations

import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest
from report import page, samples

from flyweight.records import LayerChoice
from flyweight.report import _strip


def layer(index: int, choice: str, damage: float | None) -> LayerChoice:
    return LayerChoice(
        site=f"layers.{index}", kind="linear", parameters=10, macs=10, choice=choice, reason="", damage=damage
    )


def bars(layers: tuple[LayerChoice, ...]) -> list[dict[str, float]]:
    """Place and size of every bar, in percent."""
    elements = page.read(_strip.strip(layers).text).elements
    return [{k: float((v or "")[:-1]) for k, v in about.items()} for tag, about in elements if tag == "rect"]


def test_a_bar_per_layer_grows_with_the_logarithm_of_its_damage() -> None:
    layers = tuple(layer(i, "int8", d) for i, d in enumerate((1e-5, 1e-4, 1e-3, None)))
    heights = [bar["height"] for bar in bars(layers)[:4]]
    assert heights == pytest.approx([2, 33.3, 66.7, 0], abs=0.1)  # the least damage still shows


def test_each_choice_has_a_lane_with_its_number_of_layers() -> None:
    layers = (
        layer(0, "float32", 0.1),
        layer(1, "int8", 0.1),
        layer(2, "int8", 0.1),
        layer(3, "float32", 0.1),
    )
    read = page.read(_strip.strip(layers).text)
    assert len(read.with_class("lane")) == 2
    lanes = [(round(bar["x"]), round(bar["width"])) for bar in bars(layers)[4:]]
    assert sorted(lanes) == [(0, 25), (25, 50), (75, 25)]
    assert "2 layers" in read.text()


def test_every_layer_is_named_by_its_bar() -> None:
    layers = samples.layers(300)
    titles = [text for tag, text in page.read(_strip.strip(layers).text).texts if tag == "title"]
    assert all(any(title.startswith(f"{item.site}:") for title in titles) for item in layers)


def test_rare_choices_share_the_last_lane() -> None:
    layers = tuple(layer(i, f"choice {i // 2}", 0.1) for i in range(40))
    read = page.read(_strip.strip(layers).text)
    assert len(read.with_class("lane")) == _strip.LANES
    assert "13 other choices" in read.text()
    assert "26 layers" in read.text()


def test_no_damage_is_said() -> None:
    text = _strip.strip(tuple(dataclasses.replace(x, damage=None) for x in samples.layers(6))).text
    assert "No damage was predicted" in text


def test_no_layers_no_picture() -> None:
    assert _strip.strip(()).text == ""


@hypothesis.given(st.lists(st.floats() | st.none(), min_size=1, max_size=900), st.integers(1, 30))
@hypothesis.settings(max_examples=30, deadline=None)
def test_any_damages_stay_inside_the_picture(damages: list[float | None], choices: int) -> None:
    layers = tuple(layer(i, f"choice {i % choices}", damage) for i, damage in enumerate(damages))
    for bar in bars(layers):
        assert 0 <= bar["x"] <= bar["x"] + bar["width"] <= 100.05
        assert 0 <= bar["y"] <= bar["y"] + bar["height"] <= 100.2
