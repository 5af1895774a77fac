from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel.pools import PoolState, Reservation, ReservationState, mechanism_text
from llmos.privacy import (
    Mechanism,
    PoissonSampledGaussian,
    PrivacyLoss,
    PrivacyUnit,
    mechanism_from_dict,
)

mechanisms = st.builds(
    PoissonSampledGaussian,
    st.floats(0, 1, exclude_min=True),
    st.floats(0, exclude_min=True, allow_infinity=False),
    st.integers(0, 2**53 - 1),
)


@given(mechanism=mechanisms, other=mechanisms)
def test_a_mechanism_is_its_text(mechanism: Mechanism, other: Mechanism) -> None:
    text = mechanism_text(mechanism)
    assert mechanism_from_dict(json.loads(text)) == mechanism
    assert (mechanism_text(other) == text) is (other == mechanism)


def test_shares_of_a_pool_add_up() -> None:
    total = PrivacyLoss(3.0, 1e-6, PrivacyUnit("patient_id"))
    pool = PoolState("d", "d", None, None, total, "f", 8.0, cap=1000, spent=100, held=250)
    assert pool.remaining == 650
    assert (pool.spent_share, pool.held_share, pool.remaining_share) == (0.1, 0.25, 0.65)
    assert (pool.epsilon, pool.delta) == (3.0, 1e-6)


@pytest.mark.parametrize("state", ReservationState)
def test_a_reservation_is_plain_json(state: ReservationState) -> None:
    reservation = Reservation(
        "job", "d", "training", "ward", PoissonSampledGaussian(0.1, 1.5, 7), {"d": 12}, 3, state
    )
    assert json.loads(json.dumps(reservation.to_dict())) == {
        "id": "job",
        "dataset": "d",
        "purpose": "training",
        "tenant": "ward",
        "mechanism": {
            "schema": "llmos.mechanism/v1",
            "type": "poisson-sampled-gaussian",
            "sampling_probability": 0.1,
            "noise_multiplier": 1.5,
            "steps": 7,
        },
        "cost": 12,
        "costs": {"d": 12},
        "steps_done": 3,
        "state": str(state),
    }
