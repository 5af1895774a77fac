from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from llmos.privacy import PrivacyLoss
from llmos.reports import plots
from llmos.reports.arms import Arm, read_arm

Draw = Callable[[Sequence[Arm]], str]
DRAWINGS: tuple[Draw, ...] = (
    plots.leak_comparison,
    plots.secret_distributions,
    plots.epsilon_scale,
)


@pytest.fixture(scope="session")
def arms(make_document: Callable[..., dict[str, Any]], loss: PrivacyLoss) -> list[Arm]:
    return [
        read_arm(make_document("private", loss, leaking=False)),
        read_arm(make_document("plain", None, leaking=True)),
    ]


@pytest.mark.parametrize("draw", DRAWINGS)
def test_figures_are_xml_of_their_own_and_always_the_same(draw: Draw, arms: list[Arm]) -> None:
    svg = draw(arms)
    root = ET.fromstring(svg)  # noqa: S314 - our own text
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert draw(arms) == svg
    assert "<metadata" not in svg


@pytest.mark.parametrize("draw", DRAWINGS)
def test_figures_depend_on_the_numbers(draw: Draw, arms: list[Arm]) -> None:
    secrets = arms[0].secrets
    assert secrets is not None
    other = replace(
        arms[0],
        epsilon_lower=0.7,
        secrets=replace(secrets, extraction_planted=0.5, code_length_bits_planted=(1.0, 2.0)),
    )
    assert draw([other, arms[1]]) != draw(arms)


@pytest.mark.parametrize("draw", DRAWINGS)
def test_missing_canaries_and_many_models_can_be_drawn(draw: Draw, arms: list[Arm]) -> None:
    bare = replace(arms[0], secrets=None, epsilon_lower=None, confidence=None)
    ET.fromstring(draw([bare]))  # noqa: S314
    ET.fromstring(draw([*arms, *arms, bare]))  # noqa: S314


def bar_heights(svg: str, colour: str) -> list[float]:
    """Return the heights of the filled paths of one colour, in points."""
    heights = []
    for path in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"):  # noqa: S314
        if f"fill: {colour}" in path.get("style", "") and path.get("clip-path"):
            points = [float(number) for number in re.findall(r"[\d.]+", path.get("d", ""))]
            heights.append(max(points[1::2]) - min(points[1::2]))
    return heights


def test_bars_are_as_high_as_what_was_measured(arms: list[Arm]) -> None:
    """The AUC axes end at 1.15 and the extraction axes at 115, so one scale serves all."""
    plain = bar_heights(plots.leak_comparison(arms), plots.COLOURS[1])
    secrets = arms[1].secrets
    assert secrets is not None
    expected = [secrets.extraction_planted, secrets.attack.auc, arms[1].records.auc]
    assert [height / plain[0] for height in plain] == pytest.approx(expected, abs=1e-3)


def test_epsilon_over_steps() -> None:
    svg = plots.epsilon_spent([(10, 0.5), (20, 0.9)], 1.0)
    assert svg == plots.epsilon_spent([(10, 0.5), (20, 0.9)], 1.0)
    assert svg != plots.epsilon_spent([(10, 0.5), (20, 0.95)], 1.0)
    ET.fromstring(svg)  # noqa: S314


def test_a_name_is_never_read_as_mathematics(arms: list[Arm]) -> None:
    ET.fromstring(plots.epsilon_scale([replace(arms[0], model=r"$\frac{1$ <b>")]))  # noqa: S314
