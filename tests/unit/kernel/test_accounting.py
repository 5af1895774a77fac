from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from llmos.errors import UnaccountableMechanism
from llmos.kernel import accounting
from llmos.privacy import Neighboring, PoissonSampledGaussian

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "vectors" / "accounting.json").read_text()
)
JOB = PoissonSampledGaussian(0.01, 1.0, 1000)

epsilons = st.floats(0.05, 50)
deltas = st.floats(1e-12, 1e-2)


def mechanism(row: dict[str, Any]) -> PoissonSampledGaussian:
    return PoissonSampledGaussian(
        row["sampling_probability"], row["noise_multiplier"], row["steps"]
    )


@pytest.mark.parametrize("row", VECTORS["rows"])
def test_epsilon_agrees_with_other_accountants(row: dict[str, Any]) -> None:
    found = accounting.epsilon(mechanism(row), row["delta"])
    assert found == pytest.approx(row["epsilon_pld"], abs=2e-4)
    assert row["epsilon_prv"] - 0.02 < found < row["epsilon_prv"]
    replaced = accounting.epsilon(mechanism(row), row["delta"], Neighboring.REPLACE_ONE)
    assert replaced == pytest.approx(row["epsilon_pld_replace_one"], abs=2e-3)


@pytest.mark.parametrize("row", VECTORS["rows"])
def test_renyi_agrees_with_other_accountants(row: dict[str, Any]) -> None:
    bounds = [
        accounting.renyi_to_epsilon(
            accounting.renyi(mechanism(row), float(order)), float(order), row["delta"]
        )
        for order in range(2, 64)
    ]
    # the golden value also looks at fractional orders, which matters with little noise
    assert row["epsilon_rdp"] - 1e-4 <= min(bounds) <= row["epsilon_rdp"] * row["integer_orders"]


@pytest.mark.parametrize(("q", "noise", "order"), [(0.01, 1.0, 8), (0.5, 4.0, 2), (1.0, 3.0, 5)])
def test_renyi_is_the_integral_that_defines_it(q: float, noise: float, order: int) -> None:
    def integrand(x: float) -> float:
        density = math.exp(-x * x / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))
        ratio = 1 - q + q * math.exp((2 * x - 1) / (2 * noise**2))
        return float(density * ratio**order)

    moment, _ = quad(integrand, -40 * noise, order + 40 * noise, epsabs=0, limit=500)
    expected = 7 * math.log(moment) / (order - 1)
    found = accounting.renyi(PoissonSampledGaussian(q, noise, 7), float(order))
    assert found == pytest.approx(expected, rel=1e-6)


def test_no_step_is_no_loss() -> None:
    assert accounting.epsilon(JOB.after(0), 1e-5) == 0
    assert accounting.renyi(JOB.after(0), 8.0) == 0


def test_hardly_any_noise_is_no_guarantee() -> None:
    bare = replace(JOB, noise_multiplier=1e-3)
    assert accounting.epsilon(bare, 1e-6) == math.inf
    assert accounting.renyi(replace(JOB, noise_multiplier=1e-6), 2.0) > 1e12
    for noise in (0.99e-6, 1e-160, 1e-170):  # the last ones have no square that is a normal float
        assert accounting.renyi(replace(JOB, noise_multiplier=noise), 256.0) == math.inf
    # large but finite, in a second and not in a minute
    assert 150 < accounting.epsilon(PoissonSampledGaussian(0.02, 0.2, 300), 1e-6) < 250


@pytest.mark.parametrize("order", [1.5, 2.5, 1.0, 257.0, math.inf, math.nan])
def test_renyi_refuses_orders_without_an_exact_form(order: float) -> None:
    with pytest.raises(UnaccountableMechanism):
        accounting.renyi(JOB, order)


def test_a_divergence_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_step_divergences", lambda *_: [math.nan])
    with pytest.raises(UnaccountableMechanism, match="no number"):
        accounting.renyi(PoissonSampledGaussian(0.123, 4.56, 7), 8.0)


@given(epsilon=epsilons, delta=deltas)
def test_the_fixed_order_is_one_that_can_be_computed(epsilon: float, delta: float) -> None:
    order = accounting.fixed_order(epsilon, delta)
    assert order.is_integer()
    assert 2 <= order <= 256
    formula = 0.8 * (1 + 2 * math.log(1 / delta) / epsilon)
    assert abs(order - min(max(formula, 2), 256)) <= 0.5


@pytest.mark.parametrize("job", VECTORS["filter"]["jobs"])
def test_the_filter_admits_more_than_adding_epsilons(job: dict[str, Any]) -> None:
    wanted = VECTORS["filter"]
    order = accounting.fixed_order(wanted["budget_epsilon"], wanted["delta"])
    assert order == wanted["order"]
    cap = accounting.renyi_cap(wanted["budget_epsilon"], wanted["delta"], order)
    admitted = cap // accounting.renyi(mechanism(job), order)
    assert admitted == job["admitted"] > job["admitted_by_adding_epsilons"]


def test_the_whole_factor_would_admit_nothing_with_little_noise() -> None:
    """Why 0.8: at the order that is best for plain Gaussians, subsampled ones explode."""
    epsilon, delta = 3.0, 1e-6
    little_noise = PoissonSampledGaussian(0.01, 1.0, 300)
    gaussian_best = float(round(1 + 2 * math.log(1 / delta) / epsilon))
    cap = accounting.renyi_cap(epsilon, delta, gaussian_best)
    assert cap < accounting.renyi(little_noise, gaussian_best)


@given(epsilon=epsilons, delta=deltas)
def test_the_cap_is_the_divergence_that_implies_the_budget(epsilon: float, delta: float) -> None:
    order = accounting.fixed_order(epsilon, delta)
    cap = accounting.renyi_cap(epsilon, delta, order)
    if cap > 0:
        back = accounting.renyi_to_epsilon(cap, order, delta)
        assert back == pytest.approx(epsilon, rel=1e-9)


def test_the_conversion_is_proposition_12() -> None:
    """arXiv:2004.00010: eps = rho + log((a-1)/a) - (log delta + log a) / (a-1)."""
    rho, a, delta = 0.7, 8.0, 1e-6
    expected = rho + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1)
    assert accounting.renyi_to_epsilon(rho, a, delta) == pytest.approx(expected, rel=1e-12)
    assert accounting.renyi_to_epsilon(0.0, a, delta) == 0.0
    assert accounting.renyi_to_epsilon(1e-9, 256.0, 0.9) == 0.0  # never negative


@pytest.mark.parametrize(("q", "noise", "steps"), [(0.1, 1.3, 10), (0.5, 6.0, 50), (1.0, 2.0, 1)])
def test_the_filters_bound_is_above_the_tight_one(q: float, noise: float, steps: int) -> None:
    planned = PoissonSampledGaussian(q, noise, steps)
    tight = accounting.epsilon(planned, 1e-6)
    for order in (2.0, 4.0, 8.0, 16.0):
        bound = accounting.renyi_to_epsilon(accounting.renyi(planned, order), order, 1e-6)
        assert bound > tight


def test_importing_the_kernel_does_not_load_the_accountant() -> None:
    script = (
        "import sys; from llmos.kernel import accounting, budget, monitor; "
        "print({'dp_accounting', 'scipy', 'torch', 'alembic'} & set(sys.modules))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert shown.stdout == "set()\n"
