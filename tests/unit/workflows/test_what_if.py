from __future__ import annotations

import json

import pytest
from tests.homes import TRAINING, UNITS, checked_books

from llmos.errors import BudgetExceeded, InvalidPrivacyParameter, UnknownDataset
from llmos.system import System

JOB = {"batch": UNITS, "steps": 8, "purpose": "training"}


def test_a_price_is_what_the_training_then_takes(system: System) -> None:
    before = checked_books(system)
    priced = system.budgets.what_if("notes", epsilon=3.0, **JOB)
    assert checked_books(system) == before
    (pool,) = priced.pools
    system.submit(system.plan(**TRAINING))
    held = system.kernel.budget.pool("notes")
    assert held.held_share == pool.share
    assert (pool.pool, pool.remaining_share) == ("notes", 1.0)
    assert 2.9 < priced.epsilon <= 3.0
    assert json.loads(json.dumps(priced.to_dict()))["admitted"] is True


def test_as_many_jobs_fit_as_it_says(system: System) -> None:
    fits = system.budgets.what_if("notes", epsilon=3.0, **JOB).pools[0].jobs_that_fit
    assert fits >= 2
    for number in range(fits):
        system.submit(system.plan(**(TRAINING | {"output": f"model-{number}"})))
    priced = system.budgets.what_if("notes", epsilon=3.0, **JOB)
    assert (priced.admitted, priced.pools[0].jobs_that_fit) == (False, 0)
    with pytest.raises(BudgetExceeded):
        system.submit(system.plan(**(TRAINING | {"output": "one-more"})))
    smaller = system.budgets.what_if("notes", epsilon=priced.pools[0].would_fit["epsilon"], **JOB)
    assert smaller.admitted


def test_noise_or_epsilon_may_be_given(system: System) -> None:
    by_epsilon = system.budgets.what_if("notes", epsilon=3.0, **JOB)
    noise = by_epsilon.mechanism.noise_multiplier
    assert system.budgets.what_if("notes", noise_multiplier=noise, **JOB) == by_epsilon
    for wrong in ({}, {"epsilon": 3.0, "noise_multiplier": noise}):
        with pytest.raises(InvalidPrivacyParameter, match="epsilon"):
            system.budgets.what_if("notes", **JOB, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon": float("nan")},
        {"epsilon": 0.0},
        {"delta": 1.0},
        {"batch": 0},
        {"batch": UNITS + 1},
        {"steps": 0},
        {"epsilon": None, "noise_multiplier": 0.0},
    ],
)
def test_numbers_out_of_range(system: System, wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidPrivacyParameter):
        system.budgets.what_if("notes", **({"epsilon": 3.0} | JOB | wrong))


def test_an_unknown_dataset(system: System) -> None:
    with pytest.raises(UnknownDataset):
        system.budgets.what_if("nothing", epsilon=3.0, **JOB)
