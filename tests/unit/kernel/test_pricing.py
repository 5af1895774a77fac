from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.kernel import accounting, pricing
from llmos.kernel.pools import PoolState
from llmos.privacy import Mechanism, PoissonSampledGaussian, PrivacyLoss, PrivacyUnit

ORDER = 8.0
JOB = PoissonSampledGaussian(0.05, 4.0, 200)
POOL = PoolState(
    id="patients",
    dataset="patients",
    purpose=None,
    total=PrivacyLoss(3.0, 1e-6, PrivacyUnit("patient_id")),
    fingerprint="f",
    renyi_order=ORDER,
    cap=10**12,
    spent=25 * 10**10,
    held=50 * 10**10,
)

mechanisms = st.builds(
    PoissonSampledGaussian, st.floats(1e-6, 1.0), st.floats(0.3, 500.0), st.integers(0, 10_000)
)


@settings(deadline=None)
@given(mechanism=mechanisms, order=st.sampled_from([2.0, 4.0, 8.0, 64.0]))
def test_a_cost_is_never_below_the_divergence_and_exact_in_steps(
    mechanism: Mechanism, order: float
) -> None:
    one = Fraction(accounting.renyi(mechanism.after(1), order)) * pricing.UNITS_PER_NAT
    found = pricing.cost(mechanism, order)
    assert mechanism.steps * (one + 1) <= found <= mechanism.steps * (one + 2)
    assert found == mechanism.steps * pricing.cost(mechanism.after(1), order)


def test_without_noise_the_cost_is_more_than_any_pool_holds() -> None:
    assert pricing.cost(replace(JOB, noise_multiplier=1e-170), ORDER) == pricing.TOO_MUCH
    assert pricing.cost(JOB.after(0), ORDER) == 0


@pytest.mark.parametrize("available", [10**9, 10**11, 10**12])
def test_what_is_feasible_fits_and_slightly_more_does_not(available: int) -> None:
    fits = pricing.feasible(JOB, ORDER, 1e-6, available)
    steps, noise = int(fits["steps"]), fits["noise_multiplier"]
    assert pricing.cost(JOB.after(steps), ORDER) <= available
    assert pricing.cost(JOB.after(steps + 1), ORDER) > available
    assert pricing.cost(replace(JOB, noise_multiplier=noise), ORDER) <= available
    assert pricing.cost(replace(JOB, noise_multiplier=noise * 0.997), ORDER) > available
    at_that_noise = accounting.epsilon(replace(JOB, noise_multiplier=noise), 1e-6)
    assert 0.999 * at_that_noise <= fits["epsilon"] <= at_that_noise


def test_nothing_fits_into_nothing() -> None:
    assert pricing.feasible(JOB, ORDER, 1e-6, 0) == {"epsilon": 0.0, "steps": 0.0}
    spent = pricing.refusal(replace(POOL, spent=POOL.cap, held=0), JOB, ())
    assert "used up" in spent.hint
    assert "held 0.00%)" in spent.message


def test_a_refusal_says_who_holds_what_and_what_would_fit() -> None:
    refusal = pricing.refusal(POOL, JOB.after(2000), ("job-1", "job-2"))
    assert "25.00% is left (spent 25.00%, held 50.00% by job-1, job-2)" in refusal.message
    assert f"{refusal.feasible['steps']:.0f} steps" in refusal.hint
    assert f"epsilon {refusal.feasible['epsilon']:g} at delta 1e-06" in refusal.hint
