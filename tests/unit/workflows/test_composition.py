"""Two trainings of the same data: their epsilon together is proven, and not much too large."""

from __future__ import annotations

import pytest

from llmos.errors import InvalidPrivacyParameter
from llmos.kernel import accounting
from llmos.privacy import PoissonSampledGaussian
from llmos.workflows.composition import epsilon

DELTA = 1e-5
FIRST = PoissonSampledGaussian(0.02, 0.9, 200)
SECOND = PoissonSampledGaussian(0.1, 1.4, 50)


def test_one_mechanism_has_its_tight_epsilon() -> None:
    assert epsilon([FIRST], DELTA) == accounting.epsilon(FIRST, DELTA)


@pytest.mark.parametrize("mechanism", [FIRST, SECOND, PoissonSampledGaussian(1.0, 30.0, 10)])
def test_twice_the_same_is_one_mechanism_of_twice_the_steps(
    mechanism: PoissonSampledGaussian,
) -> None:
    tight = accounting.epsilon(mechanism.after(2 * mechanism.steps), DELTA)
    assert tight <= epsilon([mechanism, mechanism], DELTA) <= 1.25 * tight


def test_together_they_lose_more_than_each_and_less_than_the_sum() -> None:
    alone = [accounting.epsilon(one, DELTA) for one in (FIRST, SECOND)]
    together = epsilon([FIRST, SECOND], DELTA)
    assert max(alone) < together < sum(alone)
    assert together == epsilon([SECOND, FIRST], DELTA)


def test_what_was_not_run_costs_nothing() -> None:
    idle = FIRST.after(0)
    assert epsilon([idle, idle], DELTA) == 0
    assert epsilon([FIRST, idle], DELTA) >= accounting.epsilon(FIRST, DELTA)


def test_delta_is_a_probability() -> None:
    with pytest.raises(InvalidPrivacyParameter):
        epsilon([FIRST, SECOND], 1.0)
