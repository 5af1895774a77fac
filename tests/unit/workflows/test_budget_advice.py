from __future__ import annotations

import json
from dataclasses import replace

import pytest
from sqlalchemy import update
from tests.unit.kernel.test_budget import DATA, JOB, TOTAL, budget, commit, reserve, store

from llmos.errors import BudgetExceeded
from llmos.kernel import accounting, pricing, schema
from llmos.kernel.budget import Budget
from llmos.kernel.store import Store
from llmos.privacy import Mechanism, PoissonSampledGaussian
from llmos.workflows.budget_advice import explain, feasible, with_advice
from llmos.workflows.calibration import calibrate_noise

__all__ = ["budget", "store"]  # fixtures

ORDER = 8.0


@pytest.mark.parametrize("available", [10**9, 10**11, 10**12])
def test_what_is_feasible_fits_and_slightly_more_does_not(available: int) -> None:
    fits = feasible(JOB, ORDER, 1e-6, available)
    steps, noise = int(fits["steps"]), fits["noise_multiplier"]
    assert pricing.cost(JOB.after(steps), ORDER) <= available
    assert pricing.cost(JOB.after(steps + 1), ORDER) > available
    assert pricing.cost(replace(JOB, noise_multiplier=noise), ORDER) <= available
    assert pricing.cost(replace(JOB, noise_multiplier=noise * 0.997), ORDER) > available
    at_that_noise = accounting.epsilon(replace(JOB, noise_multiplier=noise), 1e-6)
    assert 0.999 * at_that_noise <= fits["epsilon"] <= at_that_noise


def test_nothing_fits_into_nothing() -> None:
    assert feasible(JOB, ORDER, 1e-6, 0) == {"epsilon": 0.0, "steps": 0.0}


@pytest.mark.parametrize("taken", [0, 6])
def test_the_refusal_says_what_would_fit_and_no_more_would(
    store: Store, budget: Budget, taken: int
) -> None:
    for number in range(taken):
        reserve(store, f"job-{number}")
    big = PoissonSampledGaussian(0.1, 1.2, 150)
    with pytest.raises(BudgetExceeded) as caught:
        reserve(store, "big", big)
    refused = with_advice(caught.value, big, budget)
    fits = refused.feasible
    assert set(fits) == {"epsilon", "steps", "noise_multiplier"}
    assert f"{fits['noise_multiplier']:g}" in refused.hint
    free = budget.pool(DATA).remaining

    def by_epsilon(epsilon: float) -> Mechanism:
        noise = calibrate_noise(0.1, 150, epsilon, TOTAL.delta)
        return replace(big, noise_multiplier=noise)

    steps, noise = int(fits["steps"]), fits["noise_multiplier"]
    assert budget.cost(DATA, big.after(steps)) <= free < budget.cost(DATA, big.after(steps + 1))
    assert budget.cost(DATA, replace(big, noise_multiplier=noise)) <= free
    assert budget.cost(DATA, replace(big, noise_multiplier=noise * 0.997)) > free
    assert budget.cost(DATA, by_epsilon(fits["epsilon"])) <= free
    assert budget.cost(DATA, by_epsilon(fits["epsilon"] * 1.02)) > free
    reserve(store, "smaller", big.after(steps))


def test_a_used_up_pool_says_that_nothing_fits(store: Store, budget: Budget) -> None:
    step = budget.cost(DATA, JOB.after(1))
    reserve(store, "all", JOB.after(budget.pool(DATA).cap // step))
    with store.transaction() as conn:  # spend the last remainder too
        conn.execute(update(schema.budget_pools).values(spent=budget.pool(DATA).remaining))
    with pytest.raises(BudgetExceeded) as caught:
        reserve(store, "more", JOB.after(1))
    refused = with_advice(caught.value, JOB.after(1), budget)
    assert refused.feasible == {"epsilon": 0.0, "steps": 0.0}
    assert "used up" in refused.hint
    assert reserve(store, "nothing", JOB.after(0)).cost == 0


def test_without_noise_nothing_is_affordable(store: Store, budget: Budget) -> None:
    bare = replace(JOB, noise_multiplier=1e-170)
    with pytest.raises(BudgetExceeded) as caught:
        reserve(store, "bare", bare)
    fits = with_advice(caught.value, bare, budget).feasible
    assert fits["steps"] == 0
    assert fits["noise_multiplier"] > 0.1


def test_explain_names_numbers_and_theorems(store: Store, budget: Budget) -> None:
    assert explain(budget.pool(DATA), budget.holders(DATA))["spent_epsilon"] == 0
    reserve(store, "open")
    commit(store, "done", reserve(store, "done").mechanism)
    facts = json.loads(json.dumps(explain(budget.pool(DATA), budget.holders(DATA))))
    pool = budget.pool(DATA)
    assert facts["held_by"] == ["open"]
    assert facts["spent_share"] == facts["held_share"] == pool.spent / pool.cap
    assert facts["remaining_share"] == pytest.approx(1 - 2 * facts["spent_share"])
    assert facts["cap_nats"] == pool.cap / pricing.UNITS_PER_NAT
    assert 0 < facts["spent_epsilon"] < 3.0
    assert "2008.11193" in facts["admission"]
    assert "2309.05901" in facts["admission"]
    assert (facts["unit"], facts["neighboring"]) == ("patient_id", "add-or-remove-one")
