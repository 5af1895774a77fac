from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.errors import InvalidPrivacyParameter
from llmos.kernel import accounting
from llmos.privacy import Neighboring, PoissonSampledGaussian
from llmos.workflows import calibration

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "vectors" / "accounting.json").read_text()
)


def test_calibration_agrees_with_other_accountants() -> None:
    wanted = VECTORS["calibration"]
    noise = calibration.calibrate_noise(
        wanted["sampling_probability"], wanted["steps"], wanted["epsilon"], wanted["delta"]
    )
    assert noise == pytest.approx(wanted["noise_multiplier_pld"], rel=3e-3)
    assert noise < wanted["noise_multiplier_rdp"]


@pytest.mark.parametrize(
    ("q", "steps", "epsilon", "delta"),
    [(0.05, 200, 0.5, 1e-6), (1.0, 1, 1.0, 1e-5), (0.2, 60, 8.0, 1e-6), (0.5, 20, 0.05, 1e-6),
     (0.02, 300, 50.0, 1e-6)],
)  # fmt: skip
def test_calibrated_noise_is_proven_and_hardly_more_than_needed(
    q: float, steps: int, epsilon: float, delta: float
) -> None:
    noise = calibration.calibrate_noise(q, steps, epsilon, delta)
    planned = PoissonSampledGaussian(q, noise, steps)
    assert accounting.epsilon(planned, delta) <= epsilon
    assert accounting.epsilon(replace(planned, noise_multiplier=noise * 0.99), delta) > epsilon


def test_calibration_adds_noise_until_the_fine_check_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A coarse distribution that is too optimistic must not decide."""
    exact = accounting.pld_epsilon

    def optimistic(
        planned: PoissonSampledGaussian, delta: float, relation: Neighboring, interval: float
    ) -> float:
        return exact(planned, delta, relation, interval) * (1.0 if interval < 5e-4 else 0.995)

    monkeypatch.setattr(accounting, "pld_epsilon", optimistic)
    noise = calibration.calibrate_noise(0.1, 10, 2.0, 1e-5)
    monkeypatch.undo()
    assert accounting.epsilon(PoissonSampledGaussian(0.1, noise, 10), 1e-5) <= 2.0


@pytest.mark.parametrize(
    ("q", "steps", "epsilon", "delta"),
    [(0.1, 0, 1.0, 1e-5), (0.0, 1, 1.0, 1e-5), (0.1, 1, 0.0, 1e-5), (0.1, 1, 1.0, 1.0),
     (0.5, 100_000, 1e-6, 1e-12)],
)  # fmt: skip
def test_calibration_refuses_what_cannot_be_reached(
    q: float, steps: int, epsilon: float, delta: float
) -> None:
    with pytest.raises(InvalidPrivacyParameter):
        calibration.calibrate_noise(q, steps, epsilon, delta)


@given(threshold=st.floats(1e-3, 9e5), start=st.floats(1e-200, 2e200))
def test_least_noise_finds_any_threshold_from_anywhere(threshold: float, start: float) -> None:
    found = calibration.least_noise(lambda noise: noise >= threshold, start=start)
    assert threshold <= found <= threshold * 1.001


def test_least_noise_gives_up_at_a_million() -> None:
    assert calibration.least_noise(lambda _: False) == math.inf


@given(value=st.floats(1e-6, 1e6))
def test_rounding_keeps_to_its_side(value: float) -> None:
    up, down = calibration.round_up(value), calibration.round_down(value)
    assert down <= value * (1 + 1e-12)
    assert up >= value * (1 - 1e-12)
    assert up - down <= 1.1e-3 * value
    assert float(f"{up:.4g}") == up


def test_rounding_zero() -> None:
    assert calibration.round_down(0.0) == 0.0
