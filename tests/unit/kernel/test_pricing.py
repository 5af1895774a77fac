from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

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
    tenant=None,
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


def test_a_refusal_says_what_was_asked_and_who_holds_what() -> None:
    refusal = pricing.refusal(POOL, JOB.after(2000), ("job-1", "job-2"))
    assert "25.00% is left (spent 25.00%, held 50.00% by job-1, job-2)" in refusal.message
    assert refusal.pool == "patients"
    spent = pricing.refusal(replace(POOL, spent=POOL.cap, held=0), JOB, ())
    assert "held 0.00%)" in spent.message
