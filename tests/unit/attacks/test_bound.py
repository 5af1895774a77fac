from __future__ import annotations

import bisect
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from llmos.attacks.bound import (
    epsilon_lower_bound,
    guess_count,
    one_run_bound,
    p_value,
)
from llmos.errors import MeasurementError

# Lower bounds at 95 %, delta = 1e-5, m = r guesses of which 100/95/90/80/70 % are right, computed
# with an independent program when the measurement was designed.
POWER = {
    20: (1.82, 1.29, 0.93, 0.40, 0.0),
    40: (2.55, 1.74, 1.30, 0.70, 0.24),
    60: (2.97, 1.95, 1.46, 0.83, 0.36),
    100: (3.49, 2.17, 1.63, 0.96, 0.47),
    200: (4.19, 2.40, 1.80, 1.09, 0.58),
    400: (4.88, 2.56, 1.92, 1.18, 0.66),
    1000: (5.78, 2.70, 2.02, 1.25, 0.73),
}


@pytest.mark.parametrize("guesses", sorted(POWER))
def test_the_known_power_table(guesses: int) -> None:
    found = [
        epsilon_lower_bound(guesses, guesses, round(share * guesses), 1e-5)
        for share in (1.0, 0.95, 0.9, 0.8, 0.7)
    ]
    assert found == pytest.approx(POWER[guesses], abs=0.006)


def reference_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Algorithm 1 of arXiv:2305.08846 as printed there, with its loop over all m."""
    q = 1 / (1 + math.exp(-epsilon))
    beta = binom.sf(v - 1, r, q)
    alpha = summed = 0.0
    for i in range(1, m + 1):
        summed += binom.pmf(v - i, r, q) if v >= i else 0.0
        alpha = max(alpha, summed / i)
    return float(min(1.0, beta + alpha * delta * 2 * m))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_the_p_value_is_the_printed_algorithm(data: st.DataObject) -> None:
    m = data.draw(st.integers(1, 60))
    r = data.draw(st.integers(0, m))
    v = data.draw(st.integers(0, r))
    epsilon = data.draw(st.floats(0, 10))
    delta = data.draw(st.sampled_from([0.0, 1e-6, 1e-3, 0.1]))
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(
        reference_p_value(m, r, v, epsilon, delta), rel=1e-9, abs=1e-15
    )


def test_all_guesses_right_has_a_closed_form() -> None:
    right = 0.05 ** (1 / 50)
    assert epsilon_lower_bound(100, 50, 50, 0.0) == pytest.approx(math.log(right / (1 - right)))


@settings(deadline=None, max_examples=50)
@given(r=st.integers(2, 80), delta=st.sampled_from([0.0, 1e-6, 1e-4]), data=st.data())
def test_more_right_guesses_never_lower_the_bound(
    r: int, delta: float, data: st.DataObject
) -> None:
    v = data.draw(st.integers(0, r - 1))
    assert (
        epsilon_lower_bound(2 * r, r, v, delta)
        <= epsilon_lower_bound(2 * r, r, v + 1, delta) + 1e-9
    )


@settings(deadline=None, max_examples=50)
@given(r=st.integers(2, 80), data=st.data())
def test_a_larger_delta_or_confidence_never_raises_the_bound(r: int, data: st.DataObject) -> None:
    v = data.draw(st.integers(0, r))
    plain = epsilon_lower_bound(2 * r, r, v, 0.0)
    assert epsilon_lower_bound(2 * r, r, v, 1e-3) <= plain + 1e-9
    assert epsilon_lower_bound(2 * r, r, v, 0.0, confidence=0.99) <= plain + 1e-9


@settings(deadline=None, max_examples=50)
@given(r=st.integers(1, 200), epsilon=st.floats(0.01, 6))
def test_the_bound_is_wrong_in_at_most_one_run_of_twenty(r: int, epsilon: float) -> None:
    """Exact, without sampling: randomized response is the worst mechanism that is epsilon-DP."""
    right = 1 / (1 + math.exp(-epsilon))
    alarming = bisect.bisect_right(
        range(r + 1), epsilon, key=lambda v: epsilon_lower_bound(2 * r, r, v, 0.0)
    )
    assert binom.sf(alarming - 1, r, right) <= 0.05 + 1e-9


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomized_response_stays_above_its_bound(epsilon: float) -> None:
    """Whole path on simulated runs.

    Of 400 runs Binomial(400, 0.05) may overshoot; more than the limit happens with chance 1e-6 if
    the bound is valid. The seed is fixed, so the test gives one answer.
    """
    rng = np.random.default_rng(20231)
    runs, canaries = 400, 200
    overshot = found = 0
    for _ in range(runs):
        planted = rng.random(canaries) < 0.5
        told = rng.random(canaries) < 1 / (1 + math.exp(-epsilon))
        reported = np.where(told, planted, ~planted)
        bound = one_run_bound(reported + 0.01 * rng.random(canaries), planted, 0.0)
        overshot += bound.lower > epsilon
        found += bound.lower > 0
    assert overshot <= binom.isf(1e-6, runs, 0.05)
    assert found > runs * 0.5  # and it is no bound that is always zero


def test_the_guess_count_is_half_and_even() -> None:
    assert [guess_count(m) for m in (0, 3, 4, 7, 100, 101)] == [0, 0, 2, 2, 50, 50]


def test_a_perfect_separation_guesses_all_right() -> None:
    planted = np.arange(100) % 2 == 0
    bound = one_run_bound(np.where(planted, 1.0, -1.0) + np.arange(100) / 1e4, planted, 0.0)
    assert (bound.guesses, bound.correct, bound.canaries) == (50, 50, 100)
    assert bound.lower == pytest.approx(2.785, abs=1e-3)


@pytest.mark.parametrize("planted_first", [True, False])
def test_ties_never_help_in_whatever_order_the_canaries_come(planted_first: bool) -> None:
    planted = (np.arange(100) < 50) == planted_first
    bound = one_run_bound(np.zeros(100), planted, 0.0)
    assert bound.correct == 0
    assert bound.lower == 0


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_the_order_of_the_canaries_does_not_matter(data: st.DataObject) -> None:
    scores = np.array(data.draw(st.lists(st.integers(0, 3), min_size=8, max_size=40)), dtype=float)
    planted = np.array(
        data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    )
    order = np.array(data.draw(st.permutations(range(len(scores)))))
    assert one_run_bound(scores, planted, 0.0) == one_run_bound(scores[order], planted[order], 0.0)


def test_nonsense_is_refused() -> None:
    planted = np.array([True, False])
    with pytest.raises(MeasurementError, match="not a number"):
        one_run_bound(np.array([1.0, math.nan]), planted, 0.0)
    with pytest.raises(MeasurementError, match="do not fit"):
        one_run_bound(np.zeros(3), planted, 0.0)
    with pytest.raises(MeasurementError, match="cannot be"):
        epsilon_lower_bound(10, 5, 6, 0.0)
    with pytest.raises(MeasurementError, match="cannot be"):
        epsilon_lower_bound(10, 5, 5, 1.0)
