"""The plan: one source for sampler, noise and mechanism."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmos.engines.dp.plan import AdamWSettings, DPPlan, GaussianClipping, Performance
from llmos.errors import InvalidPrivacyParameter
from llmos.privacy import PoissonSampledGaussian

PLAN = DPPlan(units=200, expected_batch_units=16, steps=50, privacy=GaussianClipping(0.5, 1.3))


def test_mechanism_says_what_is_run() -> None:
    assert PLAN.mechanism == PoissonSampledGaussian(16 / 200, 1.3, 50)
    assert PLAN.privacy is not None
    assert PLAN.privacy.noise_std == 0.65


def test_without_privacy_there_is_no_mechanism() -> None:
    assert replace(PLAN, privacy=None).mechanism is None


@pytest.mark.parametrize(
    "fields",
    [
        {"units": 0},
        {"steps": 0},
        {"max_records_per_unit": 0},
        {"expected_batch_units": 0},
        {"expected_batch_units": 201},
        {"expected_batch_units": float("nan")},
    ],
)
def test_impossible_plans_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(InvalidPrivacyParameter):
        replace(PLAN, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_bounds_that_bound_nothing_are_refused(value: float) -> None:
    with pytest.raises(InvalidPrivacyParameter, match="clip_norm"):
        GaussianClipping(value, 1.0)
    with pytest.raises(InvalidPrivacyParameter, match="noise_multiplier"):
        GaussianClipping(1.0, value)


@pytest.mark.parametrize(
    "fields",
    [
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"warmup": 1.5},
        {"final_rate": -0.1},
        {"floor": 0.0},
        {"weight_decay": -1.0},
    ],
)
def test_impossible_optimizers_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(InvalidPrivacyParameter):
        AdamWSettings(**fields)


def test_rate_rises_then_falls_to_its_last_value() -> None:
    settings = AdamWSettings(learning_rate=2.0, warmup=0.25, final_rate=0.5)
    rates = [settings.rate(step, 40) for step in range(40)]
    assert max(rates) == rates[9] == 2.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(1.0)


def test_digest_changes_with_every_field() -> None:
    others = [
        replace(PLAN, units=201),
        replace(PLAN, steps=51),
        replace(PLAN, privacy=None),
        replace(PLAN, privacy=GaussianClipping(0.5, 1.31)),
        replace(PLAN, max_records_per_unit=2),
        replace(PLAN, optimizer=AdamWSettings(beta2=0.98)),
    ]
    assert len({plan.digest() for plan in [PLAN, *others]}) == len(others) + 1
    assert PLAN.digest() == replace(PLAN).digest()


@pytest.mark.parametrize("name", ["microbatch_tokens", "threads", "prefix_cache_bytes"])
def test_performance_refuses_negative_sizes(name: str) -> None:
    with pytest.raises(InvalidPrivacyParameter):
        Performance(**{name: -1})  # type: ignore[arg-type]
